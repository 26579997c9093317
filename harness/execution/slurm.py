"""Shards of a study as Slurm job arrays, through submitit: submitting them, and watching without sacct."""

from __future__ import annotations

import getpass
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.config import ClusterConfig, Config, require_batch_tokens
from harness.errors import InputError
from harness.execution.submission import (
    Submission,
    submission_folder,
    submission_names,
    submissions,
    write_submission,
)

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
    if done.returncode:
        raise InputError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout


def max_array_size() -> int:
    """Tasks that one array may have here. Raises InputError where there is no Slurm."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(found.group(1)) if found else 1001


def live_shards(folder: Path) -> list[LiveShard]:
    """The shards of a study folder that are queued or running. Raises InputError where Slurm does not answer."""
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
    """What submitit calls in the job. It pickles as three plain values; everything else comes from the manifest."""

    folder: str
    submission: str
    index: int

    def __call__(self) -> str:
        from harness.execution.worker import run_shard

        return run_shard(Path(self.folder), self.submission, self.index)

    def checkpoint(self) -> Any:
        """For a signal that comes before the shard has its own handler: start again as it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(config: Config, say: Callable[[str], None]) -> Path:
    """Freeze a study and submit what is missing of it as shards; returns its folder.

    Cells of shards that are queued or running are left to them; failed cells are tried again if
    cluster.retry_failed. Raises InputError, also for what Slurm refuses.
    """
    require_batch_tokens(config.runtime, "submit")
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise InputError(f"{program}: not found, is this a Slurm cluster? on one machine use harness run")
    from harness.execution.costs import study_costs
    from harness.execution.manifest import freeze
    from harness.execution.planned import plan
    from harness.execution.runner import usable_states
    from harness.execution.shards import split

    planned = plan(config)
    folder, study, cluster = planned.folder.resolve(), planned.study, config.cluster
    largest = max_array_size()
    freeze(folder, study)
    states = usable_states(folder)
    done = {"ok"} if cluster.retry_failed else {"ok", "error"}
    busy = _busy_cells(folder)
    wanted = [
        cell for i, cell in enumerate(study.cells) if states.get(cell.cell_id) not in done and i not in busy
    ]
    say(f"study {study.study_id}: {len(study.cells)} cells, {len(wanted)} to submit, {len(busy)} queued or running,"
        f" in {folder}")
    if not wanted:
        return folder
    if config.model.name == "recall":
        from harness.models.loading import pick_device
        from harness.models.recall_training import ensure_trained

        ensure_trained(config.model.recall, pick_device(config.model.device))
    costs = study_costs(config, planned.description, planned.matrices, planned.tasks)
    position = {cell.cell_id: i for i, cell in enumerate(study.cells)}
    shards = [[position[cell.cell_id] for cell in shard] for shard in split(wanted, cluster.shards, costs)]
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    submission = Submission(name, study.study_id, asdict(cluster), shards, cluster.retry_failed)
    write_submission(folder, submission)
    jobs = [job for first in range(0, len(shards), largest)
            for job in _submit_array(folder, submission, cluster, range(first, min(first + largest, len(shards))))]
    arrays = sorted({job.split("_")[0] for job in jobs}, key=int)
    say(f"submission {name}: {len(shards)} shards, Slurm job{'s' * (len(arrays) > 1)} {', '.join(arrays)};"
        f" harness status {folder} shows how they do")
    return folder


def _busy_cells(folder: Path) -> set[int]:
    """Positions of the cells that belong to shards in the queue."""
    live = {(shard.submission, shard.index) for shard in live_shards(folder)}
    return {
        position for submission in submissions(folder) for i, cells in enumerate(submission.shards)
        if (submission.name, i) in live for position in cells
    }


def _submit_array(folder: Path, submission: Submission, cluster: ClusterConfig, indices: range) -> list[str]:
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
    work = [Shard(str(folder), submission.name, index) for index in indices]
    try:
        with executor.batch():
            jobs = [executor.submit(shard) for shard in work]
    except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
        said = (getattr(error, "stderr", None) or b"") or str(error)
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise InputError(f"sbatch refused the shards: {' '.join(text.split())}; check the cluster settings") from error
    return [job.job_id for job in jobs]


def _options(texts: list[str]) -> dict[str, Any]:
    """["nodelist=n1", "--exclusive"] -> {"nodelist": "n1", "exclusive": True}."""
    pairs = (text.removeprefix("--").partition("=") for text in texts)
    return {key: value if equals else True for key, equals, value in pairs}


def _memory(gib: float) -> str:
    return f"{round(gib * 1024)}M"


def watch(folder: Path, n_cells: int, poll_seconds: float) -> Iterator[tuple[dict[str, str], int]]:
    """Look every `poll_seconds`; yields the states of the cells and the number of shards in the queue, for the last
    time when no shard is left. Reads our own rows and squeue only, so it needs no sacct and ends without one."""
    from harness.tables.store import cell_states

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
        states = cell_states(folder)
        yield states, left
        if left == 0 or (len(states) >= n_cells and set(states.values()) == {"ok"}):
            return
        time.sleep(poll_seconds)


def wait(folder: Path, cell_ids: list[str], poll_seconds: float, progress: bool = True) -> bool:
    """Return when no shard of the study is left in the queue; whether all its cells are done then."""
    from tqdm import tqdm

    states: dict[str, str] = {}
    with tqdm(total=len(cell_ids), unit="cell", disable=not progress, file=sys.stderr) as bar:
        for states, left in watch(folder, len(cell_ids), poll_seconds):
            failed = sum(states.get(cell) == "error" for cell in cell_ids)
            bar.set_description(f"{left} shards" if left >= 0 else "Slurm is silent")
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(sum(states.get(cell) == "ok" for cell in cell_ids) - bar.n)
    return all(states.get(cell) == "ok" for cell in cell_ids)
