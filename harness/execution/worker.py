"""The far side: running a share of a frozen study from its manifest, in a job of any scheduler."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from harness.errors import InputError
from harness.execution.preemption import requeue_on
from harness.execution.submission import Record, read_record, read_submission, submission_folder, write_record

# Starts in a row that met the time limit without ending one cell, before a shard gives up.
STALLED_STARTS = 2


def work(
    folder: Path, shard: int | None = None, of: int = 1, progress: bool = True,
    report_to: Callable[[str], None] | None = None,
) -> Path:
    """Run what is missing of a frozen study, or of one of `of` shards (counted from 0); returns its folder.

    All workers of one study must be given the same `of`; the split is that of all its cells, so it does not depend on
    when a worker starts. Under a launcher the share is split over its processes. Raises InputError.
    """
    requeue_on()
    from harness.execution.costs import study_costs
    from harness.execution.planned import plan_frozen
    from harness.execution.ranks import join
    from harness.execution.runner import run_planned
    from harness.execution.shards import split
    from harness.models.loading import pick_device

    if of < 1:
        raise InputError(f"--of: {of} is wrong; it must be at least 1")
    if shard is not None and not 0 <= shard < of:
        raise InputError(f"--shard: {shard} of {of} shards is not there; shards are 0 to {of - 1}")
    planned = plan_frozen(folder)
    pick_device(planned.study.config.model.device)
    cells = planned.study.cells
    if shard is not None:
        costs = study_costs(planned.study.config, planned.description, planned.matrices, planned.tasks)
        shards = split(cells, of, costs)
        cells = shards[shard] if shard < len(shards) else []
    return run_planned(planned, cells, join(), progress, report_to)


def run_shard(folder: Path, name: str, index: int) -> str:
    """One shard of a submission, as submitit's job calls it; returns "done". Its record says what became of it.

    At the cluster's signal the job requeues itself and the process exits. A job that is requeued goes on from the rows.
    Raises InputError, also when two starts in a row reached the time limit without ending a cell.
    """
    submission = read_submission(folder, name)
    cluster, started = submission.cluster, time.monotonic()
    before = read_record(folder, name, index)
    record = Record(
        job=_job_id(), host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        log=str(submission_folder(folder, name) / "logs" / _log_name()),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"), starts=before.starts + 1 if before else 1,
    )

    def note(ended: str) -> None:
        write_record(folder, name, index, dataclasses.replace(record, ended=ended))

    def at_signal() -> None:
        # Slurm sends the signal up to a minute early
        near_the_limit = time.monotonic() - started > 60 * cluster["time_minutes"] - cluster["signal_seconds"] - 90
        note("time limit" if near_the_limit else "preempted")

    requeue_on(cluster["signal"], at_signal)
    write_record(folder, name, index, record)
    from harness.execution.planned import plan_frozen
    from harness.execution.ranks import join
    from harness.execution.runner import run_planned
    from harness.tables.store import cell_states

    try:
        planned = plan_frozen(folder)
        cells = [planned.study.cells[position] for position in submission.shards[index]]
        states = cell_states(folder)
        done = sum(cell.cell_id in states for cell in cells)
        stalled = before.stalled + 1 if before and before.ended == "time limit" and done <= before.done else 0
        record = dataclasses.replace(record, done=done, stalled=stalled)
        write_record(folder, name, index, record)
        if stalled >= STALLED_STARTS:
            raise InputError(
                f"cluster.time_minutes: {stalled} starts of {cluster['time_minutes']} minutes ended no cell; give more"
            )
        submitted = (submission_folder(folder, name) / "plan.json").stat().st_mtime
        failed_after = submitted if submission.retry_failed else 0.0
        run_planned(planned, cells, join(), progress=False, failed_after=failed_after)
    except Exception as error:
        note(f"failed: {' '.join(str(error).split()) or type(error).__name__}")
        raise
    note("done")
    return "done"


def _job_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def _log_name() -> str:
    return f"{_job_id()}_0_log.err"
