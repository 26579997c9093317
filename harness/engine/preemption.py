"""Preemption: at a scheduler's signal a job requeues itself, gives up the unit that it is measuring, and exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from harness.engine.ranks import is_main_process

LONGEST_GOODBYE = 60  # seconds


def requeue_on(name: str = "USR2", before: Callable[[], None] | None = None) -> None:
    """Install a handler: at signal `name`, the Slurm job of this process requeues itself and the process exits.

    A preempted job that merely exits within its grace time counts as completed for Slurm, and never runs again. The
    rows of finished units are on disk, so the next start continues after them. before: a function that is called
    first. Outside of a Slurm job this does nothing. The exit is SystemExit, which no code that measures a unit catches.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    number = getattr(signal, f"SIG{name}")

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        if is_main_process():
            if before is not None:
                before()
            if _requeue(job, name):
                # A task that ends just when Slurm ends its step may leave the step, and the node, waiting for a minute:
                # stay until SIGTERM comes with the requeue (submitit ignores it, so not here).
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(LONGEST_GOODBYE)
        sys.exit(0)

    signal.signal(number, handle)


def _requeue(job: str, name: str) -> bool:
    _say(f"signal {name}: requeueing job {job}; rows that are done are kept")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        _say(f"job {job} could not be requeued ({problem}): submit again to go on")
    return not problem


def _say(line: str) -> None:
    # print raises RuntimeError in a handler that interrupts another print, and the job would not be requeued
    os.write(2, f"{line}\n".encode())
