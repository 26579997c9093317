"""A worker, which runs in a job: it restores a frozen run from its manifest and measures a share of it."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.measurement import Measurement
from harness.engine.plan import Plan
from harness.engine.preemption import requeue_on
from harness.engine.submission import Record, read_record, read_submission, submission_folder, write_record
from harness.errors import InputError

if TYPE_CHECKING:
    from harness.engine.run import Outcome, RunOptions

# A shard gives up after so many starts in a row that reached the time limit without finishing a unit.
STALLED_STARTS = 2

# A function from the name of a measurement to the measurement; it raises InputError for one that is not installed.
Find = Callable[[str], Measurement]


def restore(folder: str | os.PathLike, find: Find) -> tuple[Measurement, Plan]:
    """Return the run that was frozen in a folder, from its manifest alone.

    The process changes into the working directory in which the run was frozen. Raises InputError, also if weights or
    data are no longer the same.
    """
    from harness.engine.manifest import MANIFEST, read_manifest
    from harness.errors import SettingError
    from harness.settings.validation import validated

    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    measurement = find(manifest.kind)
    manifest.enter()
    try:
        settings: Any = validated(measurement.settings.Settings, manifest.settings)
    except SettingError as error:
        raise InputError(f"{folder / MANIFEST}: {error.below('settings')}") from error
    return measurement, measurement.units.restore(folder, manifest.content, settings)


def work(
    folder: str | os.PathLike, find: Find, shard: int | None = None, of: int = 1, options: RunOptions | None = None
) -> Outcome:
    """Measure what is missing of a frozen run, or of number `shard` (from 0) of its `of` shards.

    All workers of one run must be given the same `of`. The shards split all units of the run, done or not, so a shard
    does not depend on when its worker starts. Under a launcher the shard is split over its processes. Raises
    InputError.
    """
    requeue_on()
    from harness.engine.ranks import join
    from harness.engine.run import RunOptions, run_units
    from harness.engine.shards import split

    if of < 1:
        raise InputError(f"--of: {of} is wrong; it must be at least 1")
    if shard is not None and not 0 <= shard < of:
        raise InputError(f"--shard: {shard} of {of} shards is not there; shards are 0 to {of - 1}")
    measurement, plan = restore(folder, find)
    units = list(plan.units)
    if shard is not None:
        shards = split(plan.groups(units), of, plan.shard_cost)
        units = shards[shard] if shard < len(shards) else []
    return run_units(measurement, plan, units, join(), options or RunOptions())


def run_shard(folder: Path, name: str, index: int, find: Find) -> str:
    """Run one shard of a submission inside its Slurm job, and return "done". The shard's record says how it ended.

    At the cluster's signal the job requeues itself and the process exits; when it starts again, it continues after the
    rows that are there. Raises InputError, also when two starts in a row reached the time limit without finishing a
    unit.
    """
    submission = read_submission(folder, name)
    cluster, started = submission.cluster, time.monotonic()
    before = read_record(folder, name, index)
    record = Record(
        job=_job_id(), host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        log=str(submission_folder(folder, name) / "logs" / _log_name()),
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"), starts=before.starts + 1 if before else 1,
    )

    def note(ended: str) -> None:
        write_record(folder, name, index, dataclasses.replace(record, ended=ended))

    def at_signal() -> None:
        # Slurm sends the signal up to a minute early
        near_the_limit = time.monotonic() - started > 60 * cluster["time_minutes"] - cluster["signal_seconds"] - 90
        note("time limit" if near_the_limit else "preempted")

    requeue_on(cluster["signal"], at_signal)
    write_record(folder, name, index, record)
    from harness.engine.ranks import join
    from harness.engine.run import RunOptions, run_units, to_stderr
    from harness.tables.store import unit_states

    try:
        measurement, plan = restore(folder, find)
        units = [plan.units[position] for position in submission.shards[index]]
        states = unit_states(folder, measurement.tables)
        done = sum(unit.id in states for unit in units)
        stalled = before.stalled + 1 if before and before.ended == "time limit" and done <= before.done else 0
        record = dataclasses.replace(record, done=done, stalled=stalled)
        write_record(folder, name, index, record)
        if stalled >= STALLED_STARTS:
            raise InputError(
                f"cluster.time_minutes: {stalled} starts of {cluster['time_minutes']} minutes ended no unit; give more"
            )
        submitted = (submission_folder(folder, name) / "plan.json").stat().st_mtime
        failed_after = submitted if submission.retry_failed else 0.0
        options = RunOptions(progress=False, failed_after=failed_after)
        outcome = run_units(measurement, plan, units, join(), options)
        if outcome.failed:
            to_stderr(f"{outcome.failed} of {len(units)} units failed; harness status {folder} --failed shows why")
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
