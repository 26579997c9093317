"""The Python of tests/warm.py behaves as Python's own."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.studies import wait_until


def test_the_server_outlives_a_slurm_of_the_tests(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/that/of/the/first/test/that/asks")
    server = subprocess.run([warm.python(), "-c", "import os; print(os.getppid())"], capture_output=True, text=True)
    given = Path(f"/proc/{server.stdout.strip()}/environ").read_bytes().split(b"\0")
    assert any(one.startswith(b"HARNESS_TESTS=") for one in given)
    assert not any(one.startswith(b"SLURM") for one in given)


def test_what_a_process_gets_and_gives(tmp_path):
    program = "import os, sys; print(sys.argv, os.getcwd(), os.environ['MINE'], sys.stdin.read()); sys.exit(3)"
    done = subprocess.run([warm.python(), "-c", program, "word"], cwd=tmp_path, env={**os.environ, "MINE": "±"},
                          input="read", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['-c', 'word'] {tmp_path} ± read\n", "")
    done = subprocess.run([warm.python(), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    done = subprocess.run([warm.python(), "-m", "harness", "status", "/no/such"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("harness: ")


def test_signals():
    killed = subprocess.run([warm.python(), "-c", f"import os; os.kill(os.getpid(), {signal.SIGKILL:d})"])
    assert killed.returncode == -signal.SIGKILL
    program = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
print(os.getpid(), flush=True)
time.sleep(1000)
"""
    for number, status in ((signal.SIGUSR2, 7), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([warm.python(), "-c", program], stdout=subprocess.PIPE, text=True)
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == status
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), lambda: "the process outlives the executable", 60)


@pytest.mark.parametrize("sent", [b"", b"\0\0\0", (10).to_bytes(8, "big"), (10).to_bytes(8, "big") + b"{"])
def test_whoever_ends_before_it_has_asked_ends_nobody_else(sent):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.connect(warm.listening())
        if sent:
            socket.send_fds(killed, [sent], [0, 1, 2])
    done = subprocess.run([warm.python(), "-c", "print('there')"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr
