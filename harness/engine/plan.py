"""A plan, which is all that the engine must know of a run before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.engine.settings import ClusterSettings
from harness.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class Unit(Protocol):
    """The smallest piece of a run: it can be done, failed or resumed on its own.

    id: a hash of everything that its numbers depend on. part: the part of the run in which `status` counts it, such as
    its task.
    """

    @property
    def id(self) -> str: ...

    @property
    def part(self) -> str: ...


class ShardCost(Protocol):
    """The predicted cost of a shard as loads are added to it, in the order in which they run."""

    total: float

    def load(self, units: Sequence[Any]) -> Any:
        """Return what these units need, in whichever shard they run. `of` and `add` get it as their argument."""
        ...

    def of(self, load: Any) -> float:
        """Return the cost of adding a load. What it shares with the loads of the shard costs nothing more."""
        ...

    def add(self, load: Any) -> None:
        """Add a load."""
        ...


@dataclass
class SumOfCosts:
    """The cost of a shard whose units share nothing: the sum of their costs.

    cost_of: a function that returns the cost of one unit; by default it is 1.
    """

    cost_of: Callable[[Any], float] = lambda unit: 1.0
    total: float = 0.0

    def load(self, units: Sequence[Any]) -> float:
        return float(sum(map(self.cost_of, units)))

    def of(self, load: float) -> float:
        return load

    def add(self, load: float) -> None:
        self.total += load


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of a measurement. A measurement derives a class of its own from this one and adds what it must know.

    folder: where the tables go. settings: the dataclass from which the run was planned. units: all units, in the order
    in which they run. A measurement overrides the methods below in which it is special.
    """

    folder: Path
    settings: Any
    units: tuple[Any, ...]

    @cached_property
    def id(self) -> str:
        """The id of the run, which is a hash of the ids of all units."""
        return run_id(unit.id for unit in self.units)

    @property
    def cluster(self) -> ClusterSettings:
        """The settings of the Slurm jobs in which its shards run."""
        return self.settings.cluster

    def title(self) -> str:
        """Return the words by which `harness status` names the run."""
        return f"model {self.settings.model.label}"

    def restored(self, folder: Path, manifest: Mapping[str, Any]) -> Self:
        """Return this plan, which was made again from the settings of a manifest, with the folder of that manifest.

        Raises InputError if it is not the frozen one, because weights, data or the harness have changed since.
        """
        if self.id != manifest["id"]:
            raise InputError(
                f"model.name: {self.settings.model.name!r}, its data or this harness is no longer what {folder} was"
                " frozen for; restore it or choose another output"
            )
        return replace(self, folder=folder)

    def frozen(self) -> dict[str, Any]:
        """Return further keys of the manifest as JSON, from which `restore` makes the same plan."""
        return {}

    def missing(self, wanted: Sequence[Any], states: Mapping[str, str]) -> list[Any]:
        """Return those of the wanted units that must be measured. states: unit id -> "ok" or "error"."""
        return [unit for unit in wanted if states.get(unit.id) != "ok"]

    def together(self, n_missing: int, n_ranks: int) -> bool:
        """Return whether all processes of a launch measure every unit together, instead of a share each."""
        return False

    def groups(self, units: Sequence[Any]) -> list[list[Any]]:
        """Return the units in groups, in the order in which they run. Each group stays in one shard."""
        return [[unit] for unit in units]

    def shard_cost(self) -> ShardCost:
        """Return the cost of a shard that holds nothing yet."""
        return SumOfCosts()

    def require_settled(self, command: str) -> None:
        """Raise InputError if a setting asks for a value that only `settled` of measure.py can find.

        command: the command that does not call `settled`, for the message.
        """

    def before_jobs(self) -> None:
        """Do once what each of many jobs would do otherwise, such as the training of a model that all of them load."""


def canonical(value: Any) -> str:
    """Return JSON that is the same for equal values, so that it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest(text: str) -> str:
    """Return 96 bits of BLAKE2b of a text, as 24 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def run_id(unit_ids: Iterable[str]) -> str:
    """Return 12 hexadecimal digits that change whenever one of the units does."""
    return digest(canonical(sorted(unit_ids)))[:12]


def folder_of(output: str | None, default: str) -> Path:
    """Return the folder that the settings name, or the one with a default name in results/."""
    return Path(output).expanduser() if output is not None else Path("results") / default
