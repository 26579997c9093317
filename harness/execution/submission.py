"""What a study folder knows of its submissions: which cells each shard has, and what became of it.

    <folder>/shards/<submission>/plan.json      written before anything is submitted
    <folder>/shards/<submission>/<index>.json   written by the shard's job when it starts and ends
    <folder>/shards/<submission>/logs/          submitit's folder
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.execution.json_file import write_json

SHARDS = "shards"


@dataclass(frozen=True)
class Submission:
    """shards: for each, the positions of its cells in the manifest. cluster: the settings as plain values."""

    name: str
    study_id: str
    cluster: dict[str, Any]
    shards: list[list[int]] = field(repr=False)
    retry_failed: bool = False

    def job_name(self, first: int) -> str:
        """Of the array whose task 0 is shard `first`; `shard_of` reads it back from squeue."""
        return f"harness.{self.study_id}.{self.name}.{first}"


@dataclass(frozen=True)
class Record:
    """What a shard's job wrote of itself. ended: None while it runs; "done", "preempted", "time limit" or an error.

    done: cells that were done at the start. stalled: starts in a row that met the time limit without ending a cell.
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
    return Path(folder) / SHARDS / name


def write_submission(folder: Path, submission: Submission) -> None:
    write_json(submission_folder(folder, submission.name) / "plan.json", asdict(submission))


def read_submission(folder: Path, name: str) -> Submission:
    return Submission(**json.loads((submission_folder(folder, name) / "plan.json").read_text()))


def submission_names(folder: Path) -> list[str]:
    """Of all submissions of a study folder, oldest first."""
    return sorted(path.parent.name for path in (Path(folder) / SHARDS).glob("*/plan.json"))


def submissions(folder: Path) -> list[Submission]:
    return [read_submission(folder, name) for name in submission_names(folder)]


def write_record(folder: Path, name: str, index: int, record: Record) -> None:
    write_json(submission_folder(folder, name) / f"{index}.json", asdict(record))


def read_record(folder: Path, name: str, index: int) -> Record | None:
    """None where the shard has not started."""
    try:
        return Record(**json.loads((submission_folder(folder, name) / f"{index}.json").read_text()))
    except FileNotFoundError:
        return None
