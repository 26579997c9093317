"""Processes for tests, forked from one that has imported the heavy libraries.

A new Python takes some five seconds of processor time to import them. A fork has them at once, and all that a test
wants of a process: an id, a session, an environment, output and an end of its own. tests/engine/test_ranks.py also
starts real ones, by torchrun and by accelerate.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["accelerate", "transformers.models.auto.modeling_auto", "transformers.modeling_utils",
                               "tests.studies", "harness.measurements.ablation.measure"])
GRACE_SECONDS = 20  # between SIGTERM and SIGKILL of the ranks that are left when one has failed


def start(program: str, log: Path, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Start a process that executes the text of a program. Its output goes to `log`.

    environment: variables that it has besides those of this process. With accelerate and gloo, for example, RANK.
    """
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = _FORKS.Process(target=_execute, args=(program, str(log), everything), daemon=True)
    process.start()
    return process


def start_harness(*arguments: str, log: Path) -> BaseProcess:
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
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert time.monotonic() < end, log.read_text()[-4000:]
            wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=1)
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.join(GRACE_SECONDS)
            rank.kill()
    return CompletedProcess(program, max(abs(rank.exitcode or 0) for rank in ranks), "", log.read_text())


def _execute(program: str, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [""]
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
