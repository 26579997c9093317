"""Run a foreign Python program in a process of its own, which is confined before it reads the program.

The process (sandbox_process.py) has no network, no other program and no file that it may write, as far as the kernel
offers that: Landlock and namespaces on Linux, limits of resources everywhere but on Windows. An audit hook of Python
refuses the same things a second time. A hook cannot stop a program that corrupts the interpreter's memory, so untrusted
models belong into a container or a virtual machine as well.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.errors import InputError

PROTECTIONS = frozenset({"limits", "files", "network", "signals"})
CHILD = Path(__file__).with_name("sandbox_process.py")
PATIENCE = 10  # times the seconds of processor time, after which a program that waits is stopped


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds of processor time, and MiB of address space."""

    seconds: int
    memory: int


def run_program(program: str, limits: Limits) -> bool:
    """Return whether a program reaches its end, without an error and within the limits.

    A program that ends its process earlier does not reach its end, whatever its exit status is.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        process = _start([str(limits.seconds), str(limits.memory), token], folder)
        try:
            said, _ = process.communicate(program.encode("utf-8", "surrogatepass"), timeout=PATIENCE * limits.seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _stop(process)
    return said == token.encode()


@cache
def protections() -> frozenset[str]:
    """Return what the kernel of this machine confines: some of PROTECTIONS.

    Raises InputError if it has no limits, without which no foreign program may run.
    """
    if os.name != "posix":
        raise InputError("code of a model can be executed on Linux and macOS only")
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        process = _start(["5", "1024"], folder)
        said, _ = process.communicate(b"")
    if process.returncode != 0:
        raise InputError("code of a model cannot be executed: this machine cannot limit the memory of a process")
    return frozenset(said.decode().split())


def _start(arguments: list[str], folder: str) -> subprocess.Popen[bytes]:
    # -S and an empty environment leave the standard library alone; a fixed hash seed makes the order of sets the same.
    return subprocess.Popen(
        [sys.executable, "-S", "-s", "-B", str(CHILD), *arguments], cwd=folder, env={"PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that belong to its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.kill()
    process.communicate()
