"""The settings of the Slurm jobs of `harness submit`, and of the report at the end of a run."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from harness.errors import wrong
from harness.settings.constraints import at_least
from harness.settings.plain_values import refuse_lines


@dataclass
class ReportSettings:
    """The report at the end of a run, which `harness report` writes again; nothing here changes a number."""

    figures: Literal["all", "none"] = "all"


@dataclass
class ClusterSettings:
    """How `harness submit` runs the shards of a run as Slurm jobs; nothing here changes a number."""

    shards: Annotated[int, at_least(1)] = 4  # jobs, each with about the same predicted cost
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None  # per job, e.g. gpu:1
    constraint: str | None = None
    cpus_per_task: Annotated[int, at_least(1)] = 4
    memory_gib: Annotated[float, at_least(0.1)] | None = None  # null: the partition's default
    time_minutes: Annotated[int, at_least(1)] = 240  # of one start; a shard that needs more requeues itself and goes on
    signal: str = "USR2"  # sent before the time limit, and on clusters that warn before preempting
    signal_seconds: Annotated[int, at_least(1)] = 120  # so long before the time limit
    array_parallelism: Annotated[int, at_least(1)] | None = None  # jobs of an array that run at once; null: 256
    setup: list[str] = field(default_factory=list)  # shell lines before the worker: module load, source, export
    python: str | None = None  # command that starts Python in the job, e.g. in a container; null: this one
    srun_args: list[str] = field(default_factory=list)  # e.g. --container-image=...
    options: list[str] = field(default_factory=list)  # others of sbatch: [nodelist=n1,exclusive]
    retry_failed: bool = False  # submit units with error rows again
    wait: bool = False  # stay until no shard is left, with a progress bar; false: submit and return
    poll_seconds: Annotated[float, at_least(0.1)] = 15.0  # between two looks while waiting

    def __post_init__(self) -> None:
        # They become lines of the script of a job.
        for one in fields(self):
            value = getattr(self, one.name)
            for text in value if isinstance(value, list) else [value]:
                refuse_lines(one.name, text if isinstance(text, str) else None)
        if self.signal.startswith("SIG") or not hasattr(signal, f"SIG{self.signal}"):
            raise wrong("signal", self.signal, "it must be the name of a signal without SIG, for example USR2")
        # Slurm may send the signal a minute early, and kills at the limit whatever the job is doing then
        least = math.ceil((2 * self.signal_seconds + 60) / 60)
        if self.time_minutes < least:
            right = f"with cluster.signal_seconds={self.signal_seconds} it must be at least {least}"
            raise wrong("time_minutes", self.time_minutes, right)
