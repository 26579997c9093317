"""Slurm: submits the shards of a run as job arrays through submitit, and watches them by squeue, without sacct."""

from __future__ import annotations

import dataclasses
import getpass
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.engine.measurement import Measurement
from harness.engine.plan import Plan
from harness.engine.progress import Progress
from harness.engine.settings import ClusterSettings
from harness.engine.submission import (
    Submission,
    submission_folder,
    submission_names,
    submissions,
    write_submission,
)
from harness.engine.worker import Find, run_shard
from harness.errors import InputError
from harness.optional import require

TIMEOUT = 60  # seconds for one of Slurm's commands
# Requeues are counted by the shard itself, which knows whether it gets on (worker.py).
MANY = 1_000_000
SHARD_NAME = re.compile(r"harness\.[0-9a-f]+\.(?P<submission>[^.]+)\.(?P<first>\d+)")
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@dataclass(frozen=True)
class LiveShard:
    """A shard that squeue knows. state: Slurm's word, PENDING, RUNNING, ...; reason: why it is pending."""

    submission: str
    index: int
    job: str
    state: str
    reason: str


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise InputError(f"{command[0]}: not found, is this a Slurm cluster? on one machine use harness run") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]}: no answer from Slurm within {TIMEOUT} s; try again later") from None
    if done.returncode and re.search(r"contact slurm controller|Connection refused|slurm_load", done.stderr, re.I):
        raise InputError(f"no Slurm controller answers here ({command[0]} reached none); submit from a machine of the"
                         " cluster, or use harness run on this one")
    if done.returncode:
        raise InputError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout


def max_array_size() -> int:
    """Return how many tasks one job array may have on this cluster. Raises InputError if there is no Slurm."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else 1001


def live_shards(folder: Path) -> list[LiveShard]:
    """Return the shards of a folder that are queued or running. Raises InputError if Slurm does not answer."""
    ours = set(submission_names(folder))
    text = _slurm("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%F|%K|%T|%j|%r")
    found = []
    for line in text.splitlines():
        job, task, state, name, reason = line.strip().split("|", 4)
        match = SHARD_NAME.fullmatch(name)
        if match and match["submission"] in ours and state not in _ENDED:
            number = int(task) if task.isdigit() else None
            job = job if number is None else f"{job}_{number}"
            found.append(LiveShard(match["submission"], int(match["first"]) + (number or 0), job, state, reason))
    return found


@dataclass(frozen=True)
class Shard:
    """The callable that submitit runs in the job.

    It pickles as plain values and the name of a function. The job reads everything else from the manifest.
    """

    folder: str
    submission: str
    index: int
    find: Find

    def __call__(self) -> str:
        return run_shard(Path(self.folder), self.submission, self.index, self.find)

    def checkpoint(self) -> Any:
        """Start again. submitit calls this at a signal that comes before the shard has installed its own handler."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def require_slurm() -> None:
    """Raise InputError if submitit or one of Slurm's commands is not installed."""
    require("submitit", "cluster", "harness submit")
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise InputError(f"{program}: not found, is this a Slurm cluster? on one machine use harness run")


def submit(measurement: Measurement, plan: Plan, find: Find, say: Callable[[str], None]) -> Path:
    """Freeze a run, submit what is missing of it as shards, and return its folder.

    Units of shards that are queued or running are left out. Failed units are submitted again if cluster.retry_failed.
    find: the function by which a job finds the measurement; it pickles by its name. Raises InputError, also for what
    Slurm refuses.
    """
    from harness.engine.manifest import freeze
    from harness.engine.run import usable_states
    from harness.engine.shards import split

    plan.require_settled("submit")
    require_slurm()
    plan = dataclasses.replace(plan, folder=plan.folder.resolve())
    folder, cluster = plan.folder, plan.cluster
    largest = max_array_size()
    freeze(measurement, plan)
    states = usable_states(measurement, folder)
    if not cluster.retry_failed:
        states = {unit: "ok" for unit in states}
    busy = _busy_units(folder)
    undone = {unit.id for unit in plan.missing(plan.units, states)}
    wanted = [unit for i, unit in enumerate(plan.units) if unit.id in undone and i not in busy]
    say(f"{measurement.name} {plan.id}: {len(plan.units)} units, {len(wanted)} to submit, {len(busy)} queued or"
        f" running, in {folder}")
    if not wanted:
        return folder
    plan.before_jobs()
    position = {unit.id: i for i, unit in enumerate(plan.units)}
    shards = [[position[unit.id] for unit in shard]
              for shard in split(plan.groups(wanted), cluster.shards, plan.shard_cost)]
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    submission = Submission(name, plan.id, asdict(cluster), shards, cluster.retry_failed)
    write_submission(folder, submission)
    jobs = [job for first in range(0, len(shards), largest)
            for job in _submit_array(folder, submission, cluster, find,
                                     range(first, min(first + largest, len(shards))))]
    arrays = sorted({job.split("_")[0] for job in jobs}, key=int)
    say(f"submission {name}: {len(shards)} shards, Slurm job{'s' * (len(arrays) > 1)} {', '.join(arrays)};"
        f" harness status {folder} shows how they do")
    return folder


def _busy_units(folder: Path) -> set[int]:
    """Return the positions in the manifest of the units whose shards are in the queue."""
    live = {(shard.submission, shard.index) for shard in live_shards(folder)}
    return {
        position for submission in submissions(folder) for i, units in enumerate(submission.shards)
        if (submission.name, i) in live for position in units
    }


def _submit_array(
    folder: Path, submission: Submission, cluster: ClusterSettings, find: Find, indices: range
) -> list[str]:
    import submitit

    executor = submitit.SlurmExecutor(
        submission_folder(folder, submission.name) / "logs", max_num_timeout=MANY, python=cluster.python
    )
    optional = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos, "gres": cluster.gres,
        "constraint": cluster.constraint, "mem": None if cluster.memory_gib is None else _memory(cluster.memory_gib),
        "array_parallelism": cluster.array_parallelism, "setup": list(cluster.setup) or None,
        "srun_args": list(cluster.srun_args) or None,
    }
    executor.update_parameters(
        job_name=submission.job_name(indices[0]), time=cluster.time_minutes, nodes=1, ntasks_per_node=1,
        cpus_per_task=cluster.cpus_per_task, signal_delay_s=cluster.signal_seconds,
        additional_parameters={"signal": f"{cluster.signal}@{cluster.signal_seconds}", "requeue": True,
                               **_options(cluster.options)},
        **{key: value for key, value in optional.items() if value is not None},
    )
    work = [Shard(str(folder), submission.name, index, find) for index in indices]
    try:
        with executor.batch():
            jobs = [executor.submit(shard) for shard in work]
    except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        said = (getattr(error, "stderr", None) or b"") or str(error)
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise InputError(f"sbatch refused the shards: {' '.join(text.split())}; check the cluster settings") from error
    return [job.job_id for job in jobs]


def _options(texts: list[str]) -> dict[str, Any]:
    """Return options by name: ["nodelist=n1", "--exclusive"] becomes {"nodelist": "n1", "exclusive": True}."""
    pairs = (text.removeprefix("--").partition("=") for text in texts)
    return {key: value if equals else True for key, equals, value in pairs}


def _memory(gib: float) -> str:
    return f"{round(gib * 1024)}M"


def watch(
    measurement: Measurement, folder: Path, n_units: int, poll_seconds: float
) -> Iterator[tuple[dict[str, str], int]]:
    """Yield the states of the units and the number of shards in the queue, every `poll_seconds`.

    The number is -1 if Slurm does not answer. The last time is when no shard is left. The states come from the run's
    rows and from squeue, so that sacct is not needed.
    """
    from harness.tables.store import unit_states

    silent = 0
    while True:
        try:
            left, silent = len(live_shards(folder)), 0
        except InputError as error:
            # A controller that restarts is away for a moment: the jobs go on, and so do we.
            silent += 1
            if silent == 20:
                raise InputError(f"waiting: {error} (20 times); the jobs may still run, see harness status {folder}"
                                 ) from error
            left = -1
        states = unit_states(folder, measurement.tables)
        yield states, left
        if left == 0 or (len(states) >= n_units and set(states.values()) == {"ok"}):
            return
        time.sleep(poll_seconds)


def wait(
    measurement: Measurement, folder: Path, unit_ids: list[str], poll_seconds: float, progress: bool = True
) -> bool:
    """Wait until no shard of the run is left in the queue. Return whether all of its units are done then."""
    states: dict[str, str] = {}
    with Progress(len(unit_ids), shown=progress) as bar:
        for states, left in watch(measurement, folder, len(unit_ids), poll_seconds):
            failed = sum(states.get(unit) == "error" for unit in unit_ids)
            bar.describe(f"{left} shards" if left >= 0 else "Slurm is silent")
            bar.update(sum(states.get(unit) == "ok" for unit in unit_ids) - bar.done, failed=failed)
    return all(states.get(unit) == "ok" for unit in unit_ids)
