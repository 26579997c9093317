"""Hostile programs: none reaches its end, and none leaves a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.errors import InputError
from harness.tasks import sandbox
from harness.tasks.sandbox import CHILD, PROTECTIONS, Limits, protections, run_program

LIMITS = Limits(seconds=1, memory=256)
HOSTILE = {
    "write a file": "open('{folder}/a', 'w').write('x')",
    "write a file by its number": "import os\nos.write(os.open('{folder}/a', os.O_CREAT | os.O_WRONLY), b'x')",
    "make a folder": "import os\nos.mkdir('{folder}/a')",
    "remove a file": "import os\nos.remove('{folder}/kept')",
    "empty a file": "import os\nos.truncate('{folder}/kept', 0)",
    "rename a file": "import os\nos.rename('{folder}/kept', '{folder}/a')",
    "change the rights of a file": "import os\nos.chmod('{folder}/kept', 0)",
    "remove a folder": "import shutil\nshutil.rmtree('{folder}')",
    "write by pathlib": "import pathlib\npathlib.Path('{folder}/a').write_text('x')",
    "loop forever": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "take memory": "x = bytearray(1 << 30)",
    "take memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "recurse without end": "def f(): f()\nf()",
    "start a program": "import subprocess\nsubprocess.run(['true'])",
    "start a shell": "import os\nos.system('true')",
    "become another program": "import os\nos.execv('/bin/true', ['true'])",
    "fork": "import os\nos.fork()",
    "kill the harness": "import os\nos.kill(os.getppid(), 9)",
    "open a connection": "import socket\nsocket.socket()",
    "load a library": "import ctypes\nctypes.CDLL(None)",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
    "leave early": "import os\nos._exit(0)",
    "leave early by an exception": "raise SystemExit(0)",
    "fail": "assert 1 == 2",
    "be no program": "def f(:",
    "read the settings of the user": "import os\nassert os.environ.get('HOME')",
    "import what is installed": "import numpy",
    "import the harness": "import harness",
    "import its neighbours": "import humaneval",
    "ask a question": "input()",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs(program: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    assert not run_program(program.replace("{folder}", str(tmp_path)), LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept" and kept.stat().st_mode & 0o600 == 0o600


def test_a_program_that_waits_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 1)
    start = time.monotonic()
    assert not run_program("import time\ntime.sleep(1000)", LIMITS)
    assert time.monotonic() - start < 500


def test_what_right_programs_need() -> None:
    program = (
        "import collections, datetime, decimal, functools, hashlib, heapq, itertools, math, random, re, statistics\n"
        "from typing import List\nimport os\nassert os.listdir('.') == []\nprint('x' * 100_000)\n"
        "assert hashlib.md5(b'x').hexdigest().startswith('9dd4')\nassert 'é' == '\\u00e9'\n"
        "x = bytearray(1 << 20)\n# é\n"
    )
    assert run_program(program, LIMITS)
    assert run_program("", LIMITS)
    order = "assert list({'a', 'b', 'c', 'd', 'e', 'f'}) == %r"
    listed = subprocess.run([sys.executable, "-c", "print(list({'a', 'b', 'c', 'd', 'e', 'f'}))"],
                            env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True).stdout
    assert run_program(order % eval(listed), LIMITS)


# The same without the audit hook: what the kernel refuses by itself.
BARE = """
import os, signal, socket, subprocess, sys
sys.path.insert(0, {folder!r})
import sandbox_process
sandbox_process.limit_resources(5, 512)
done = sandbox_process.confine()
def tried(what):
    try:
        what()
    except (OSError, subprocess.SubprocessError):
        return False
    return True
found = [
    ("files", lambda: open({file!r}, "w")), ("files", lambda: os.mkdir({file!r} + "d")),
    ("files", lambda: os.remove({kept!r})), ("files", lambda: os.rename({kept!r}, {file!r})),
    ("files", lambda: os.execv("/bin/true", ["true"])),
    ("network", lambda: socket.create_connection(("127.0.0.1", {port}), 1)),
    ("signals", lambda: os.kill({pid}, 0)),
]
open({kept!r}).read()
print(done, sorted({{name for name, what in found if name in done and tried(what)}}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the protections are those of Linux")
def test_the_kernel_refuses_without_the_hook(tmp_path: Path) -> None:
    import socket

    kept = tmp_path / "kept"
    kept.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = BARE.format(folder=str(CHILD.parent), file=str(tmp_path / "a"), kept=str(kept), pid=os.getpid(),
                           port=server.getsockname()[1])
        said = subprocess.run([sys.executable, "-S", "-s", "-B", "-c", code], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip().endswith("[]") and "'limits'" in said.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_protections_are_named(monkeypatch) -> None:
    assert {"limits"} <= protections() <= PROTECTIONS
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(InputError, match="Linux and macOS only"):
        protections.__wrapped__()
