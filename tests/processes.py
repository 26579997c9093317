"""Processes for tests, forked from the one of tests/warm.py that has imported the heavy libraries.

A fork has all that a test wants of a process: an id, a session, an environment, output and an end of its own.
tests/engine/test_ranks.py also starts real ones, by torchrun and by accelerate.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from tests import warm

GRACE_SECONDS = 20  # between SIGTERM and SIGKILL of the ranks that are left when one has failed


class Process:
    """A process that executes the text of a program. Its output goes to `log`."""

    def __init__(self, program: str, log: Path, environment: Mapping[str, str]) -> None:
        with log.open("ab") as output, open(os.devnull) as nothing:
            streams = [nothing.fileno(), output.fileno(), output.fileno()]
            self.pid, self.end = warm.ask(warm.listening(), ["-c", program], streams, environment)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, which is negative after a signal, or None while the process runs."""
        return self._status if self._status is not None or not wait([self.end], timeout=0) else self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status. Raises TimeoutExpired."""
        if self._status is None:
            if not wait([self.end], timeout):
                raise TimeoutExpired(str(self.pid), timeout or 0)
            self._status = warm.status_from(self.end)
        return self._status

    def send(self, number: int) -> None:
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and the server has not yet said so
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)


def start(program: str, log: Path, environment: Mapping[str, str] | None = None) -> Process:
    """Start a process that executes the text of a program.

    environment: variables that it has besides those of this process. With accelerate and gloo, for example, RANK.
    """
    return Process(program, log, {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})


def start_harness(*arguments: str, log: Path) -> Process:
    """Start `harness <arguments>`."""
    return start(f"import sys; from harness.__main__ import main; sys.argv[1:] = {arguments!r}; sys.exit(main())", log)


def run_ranks(program: str, n: int, log: Path, timeout: float = 400) -> CompletedProcess[str]:
    """Run a program in `n` processes that find each other as those of torchrun do, and return what they wrote.

    As torchrun does, it ends the others if one fails, and then its return code is not 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [start(program, log, {**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)]
    end = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < end, log.read_text()[-4000:]
            wait([rank.end for rank in ranks if rank.poll() is None], timeout=1)
    finally:
        for rank in ranks:
            rank.send(signal.SIGTERM)
        for rank in ranks:
            try:
                rank.wait(GRACE_SECONDS)
            except TimeoutExpired:
                rank.kill()
    return CompletedProcess(program, max(abs(rank.wait()) for rank in ranks), "", log.read_text())
