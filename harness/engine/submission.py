"""Records of submissions in the folder of a run: the units of each shard, and how the shard's job ended.

    <folder>/shards/<submission>/plan.json      written before anything is submitted
    <folder>/shards/<submission>/<index>.json   written by the shard's job when it starts and ends
    <folder>/shards/<submission>/logs/          submitit's folder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.engine.manifest import reading
from harness.files import write_json

SHARDS = "shards"


@dataclass(frozen=True)
class Submission:
    """One call of `harness submit`.

    run_id: the id of the run. cluster: the cluster settings as plain values. shards: for each shard, the positions of
    its units in the manifest.
    """

    name: str
    run_id: str
    cluster: dict[str, Any]
    shards: list[list[int]] = field(repr=False)
    retry_failed: bool = False

    def job_name(self, first: int) -> str:
        """Return the name of the Slurm array whose task 0 is shard `first`. squeue gives its parts back to slurm.py."""
        return f"harness.{self.run_id}.{self.name}.{first}"


@dataclass(frozen=True)
class Record:
    """What a shard's job wrote about itself.

    done: how many units were done when it started. stalled: how many starts in a row reached the time limit without
    finishing a unit. ended: None while it runs; then "done", "preempted", "time limit" or an error.
    """

    job: str
    host: str
    log: str
    started_at: str
    starts: int = 1
    done: int = 0
    stalled: int = 0
    ended: str | None = None


def submission_folder(folder: Path, name: str) -> Path:
    """Return the folder of one submission."""
    return Path(folder) / SHARDS / name


def write_submission(folder: Path, submission: Submission) -> None:
    """Write plan.json, whole or not at all."""
    write_json(submission_folder(folder, submission.name) / "plan.json", asdict(submission))


def read_submission(folder: Path, name: str) -> Submission:
    """Read plan.json. Raises InputError if it is not as it was written."""
    path = submission_folder(folder, name) / "plan.json"
    with reading(path, "the submission"):
        found = Submission(**json.loads(path.read_text()))
        if not all(isinstance(position, int) for shard in found.shards for position in shard):
            raise TypeError("shards are not lists of whole numbers")
        return found


def submission_names(folder: Path) -> list[str]:
    """Return the names of all submissions of a folder, the oldest first."""
    return sorted(path.parent.name for path in (Path(folder) / SHARDS).glob("*/plan.json"))


def submissions(folder: Path) -> list[Submission]:
    """Return all submissions of a folder, the oldest first."""
    return [read_submission(folder, name) for name in submission_names(folder)]


def write_record(folder: Path, name: str, index: int, record: Record) -> None:
    """Write <index>.json, whole or not at all."""
    write_json(submission_folder(folder, name) / f"{index}.json", asdict(record))


def read_record(folder: Path, name: str, index: int) -> Record | None:
    """Return the record of a shard, or None if the shard has not started.

    Raises InputError if it is not as it was written.
    """
    path = submission_folder(folder, name) / f"{index}.json"
    try:
        with reading(path, "the record of the shard"):
            return Record(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
