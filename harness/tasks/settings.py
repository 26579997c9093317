"""The settings that several kinds of tasks share. Each kind of task has one file in this folder."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from harness.errors import InputError, SettingError, wrong
from harness.evaluation.requests import PreparedTask, TaskContext
from harness.settings.constraints import Bounds, at_least
from harness.settings.validation import plain
from harness.tasks.data import DataSource


@dataclass
class Task:
    """The settings of a task, and its preparation for a model.

    kind: the name of the kind of task in the registry. measured_on: the kinds of model families that can answer it.
    """

    kind: ClassVar[str]
    measured_on: ClassVar[tuple[str, ...]] = ("causal",)

    def __post_init__(self) -> None:
        """Check the settings. Raises SettingError."""

    @abstractmethod
    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task prepared for one model.

        name: the name of the task in the study, which messages show as "tasks.<name>".
        Raises InputError if the data or the settings do not fit the model.
        """

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values, from which the registry makes an equal task."""
        return {"kind": self.kind, **{field.name: plain(getattr(self, field.name)) for field in fields(self)}}


@dataclass
class FilesTask(Task):
    """A task whose examples come from a local file, or from a data set of the Hugging Face hub."""

    dataset: str | None = None  # name of a Hugging Face data set; it is read if data_files is null
    data_files: str | None = None  # .jsonl .json .csv .parquet .txt

    def __post_init__(self) -> None:
        super().__post_init__()
        require_file("data_files", self.data_files)


@dataclass
class DataTask(FilesTask):
    """A task whose examples are the rows of one data set."""

    dataset_config: str | None = None
    split: str = "test"

    def rows(self, key: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the rows in file order, as `DataSource.rows`. key: "tasks.<name>"."""
        return self._source().rows(key, columns)

    def source(self) -> str:
        """Return the name of the data for the protocol, as `DataSource.name`."""
        return self._source().name

    def _source(self) -> DataSource:
        return DataSource(self.data_files, self.dataset, self.dataset_config, self.split)


@dataclass
class LimitedTask(Task):
    """A task that may use only the first examples. limit: their number; null means all."""

    limit: Annotated[int, at_least(1)] | None = None


@dataclass
class SplitTask(LimitedTask):
    """A task whose examples may be split into a selection part and a report part.

    A search over many ablations selects on one part and reports on the other (LASER, arXiv 2312.13558, selects on 20 %
    of the examples and reports on 80 %). A hash of the text of an example decides its part. So the part does not depend
    on the order of the file, the limit or the model, and two copies of one example are always in the same part.
    """

    part: Literal["selection", "report"] | None = None  # null: all examples, in file order
    selection_share: Annotated[float, Bounds(above=0, below=1)] = 0.2  # share of the selection part, if part is set

    def choose(
        self, key: str, rows: Sequence[dict[str, Any]], text: Callable[[dict[str, Any]], str]
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return (row number, row) of the examples to use, at most `limit` of them.

        Without a part these are all rows in file order. The selection part holds the rows whose `position(text(row))`
        is below `selection_share`, the report part the others. Both are ordered by position, so that a limit takes a
        random sample even of a sorted file.

        key: "tasks.<name>". text: a function from a row to the text that decides its part.
        Raises InputError if the part is empty.
        """
        numbered = list(enumerate(rows))
        if self.part is None:
            return numbered[: self.limit]
        placed = sorted((position(text(row)), number) for number, row in numbered)
        selected = self.part == "selection"
        inside = [number for where, number in placed if (where < self.selection_share) == selected]
        if not inside:
            raise InputError(
                f"{key}.part: none of the {len(rows)} examples is in the {self.part} part; change {key}.selection_share"
            )
        return [numbered[number] for number in inside[: self.limit]]

    def part_protocol(self) -> dict[str, Any]:
        """Return what the protocol says of the part, which is nothing if all examples are used."""
        return {} if self.part is None else {"part": self.part, "selection_share": self.selection_share}


@dataclass
class RowsTask(DataTask, SplitTask):
    """A task in which a row of a data set is an example.

    cluster_column: the column whose value the rows of one cluster share, such as the passage that several questions are
        about (see clusters.py); null: all rows are independent.
    """

    cluster_column: str | None = None


@dataclass
class PromptTask(RowsTask):
    """A task in which a row has a prompt and texts that may follow it.

    bos: whether a prompt begins with the BOS token: "auto" (as the tokenizer begins a text), True or False.
    """

    bos: bool | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bos(self.bos)


def check_bos(bos: bool | str) -> None:
    """Raise SettingError unless `bos` is "auto", True or False."""
    if bos not in ("auto", True, False):
        raise wrong("bos", bos, "use auto, true or false")


def position(text: str) -> float:
    """Return the position of a text in [0, 1): 48 bits of its BLAKE2b as a fraction, which spreads texts evenly."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def require_file(key: str, path: str | None) -> None:
    """Raise SettingError if a path is given and nothing is there."""
    if path is not None and not os.path.exists(os.path.expanduser(path)):
        raise SettingError(key, f"no such file {path[:200]!r}; give the path of an existing file")
