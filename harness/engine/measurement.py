"""A kind of measurement, as the engine gets it: a package of five modules with agreed names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from harness.engine.plan import Plan
from harness.engine.ranks import Ranks
from harness.evaluation.division import Division
from harness.tables.schema import TableSet
from harness.tables.writer import Rows

if TYPE_CHECKING:
    import torch


def _ignore(text: str) -> None:
    pass


@dataclass(frozen=True)
class Measured:
    """The result of measuring one unit.

    rows: table name -> the unit's rows (tables/writer.py). They are read in another thread while the next unit is
    measured, so a mapping may also make them only then. Rows of the primary table have `status` and, if that is
    "error", `error`. described: the columns of the primary table that are known of the unit whatever happens; they make
    an error row if the rows cannot be written. Columns that are left out are null. The engine fills in those that say
    where and when.
    """

    unit: Any
    rows: Mapping[str, Rows]
    described: Mapping[str, Any] = field(default_factory=dict)


class SpoiledRun(Exception):
    """Something that the units of a run share, such as the weights, has changed during the run."""


def require_same_weights(model: torch.nn.Module, as_loaded: str) -> None:
    """Raise SpoiledRun unless the weights of a model still have the digest that `parameters_digest` gave before."""
    from harness.models.identity import parameters_digest

    if parameters_digest(model) != as_loaded:
        raise SpoiledRun(
            "the weights in memory were not the same at the end of the run as at its beginning, so that no number of"
            " the run can be trusted; run it again"
        )


@dataclass(frozen=True)
class Context:
    """What a measurement is given beside its units.

    session: what its `open_session` returned. division: the processes that measure every unit together; only this one
    if each process has units of its own. describe: a function that puts a text beside the progress bar. progress:
    whether a bar is shown.
    """

    session: Any = None
    division: Division = field(default_factory=Division)
    describe: Callable[[str], None] = _ignore
    progress: bool = False


class SettingsModule(Protocol):
    """The module settings.py. CONFIG: the name of the YAML file in conf/ from which the settings are composed."""

    CONFIG: str
    Settings: type

    def check(self, settings: Any) -> None:
        """Check what is required of settings only if they are run, such as names that are given and files that exist.

        Raises InputError.
        """
        ...


class UnitsModule(Protocol):
    """The module units.py, which says what is measured, and makes the ids."""

    def plan(self, settings: Any) -> Plan:
        """Return the plan of the settings: everything that can be known without weights. Raises InputError."""
        ...

    def restore(self, folder: Path, manifest: Mapping[str, Any], settings: Any) -> Plan:
        """Return the plan that was frozen in a folder. Raises InputError if weights or data are no longer the same."""
        ...

    def describe(self, plan: Plan) -> str:
        """Return the text of `harness plan`."""
        ...


class MeasureModule(Protocol):
    """The module measure.py, which measures units."""

    def open_session(self, plan: Plan, ranks: Ranks, progress: bool) -> Any:
        """Return what all units need, such as the loaded model. Raises InputError."""
        ...

    def measure(self, plan: Plan, units: Sequence[Any], context: Context) -> Iterator[Measured]:
        """Measure the units, in any order. If one of them fails, it gets an error row, and the others are measured.

        After the last unit it may raise SpoiledRun, if it finds that what the units shared was no longer what it should
        be. The rows that this process has written are then withdrawn, and each of these units becomes an error row.
        """
        ...

    # It may also have two more functions:
    # `announce(plan, units, session) -> str` returns a line that is printed before the units are measured.
    # `settled(plan, ranks, progress, say) -> (plan, session)` returns the plan with the settings that only the device
    # can tell, such as the largest batch that fits, and the session if it had to be opened for that, else None.


class TablesModule(Protocol):
    """The module tables.py, which imports neither torch nor transformers."""

    TABLES: TableSet


class ReportModule(Protocol):
    """The module report.py, which imports neither torch nor transformers."""

    def report(self, folder: Path, write: Callable[[str], object] = print) -> Path | None:
        """Write <folder>/report/ from the tables alone, and print a summary with `write`.

        Return the path of the page, or None if there are no rows.
        """
        ...


@dataclass(frozen=True)
class Measurement:
    """A kind of measurement.

    name: the name by which manifests call it. package: the package with the modules settings, units, measure, tables
    and report. Each of them is imported when it is asked for.
    """

    name: str
    package: str

    @property
    def settings(self) -> SettingsModule:
        return cast(SettingsModule, import_module(f"{self.package}.settings"))

    @property
    def units(self) -> UnitsModule:
        return cast(UnitsModule, import_module(f"{self.package}.units"))

    @property
    def measure(self) -> MeasureModule:
        return cast(MeasureModule, import_module(f"{self.package}.measure"))

    @property
    def tables(self) -> TableSet:
        return cast(TablesModule, import_module(f"{self.package}.tables")).TABLES

    @property
    def report(self) -> ReportModule:
        return cast(ReportModule, import_module(f"{self.package}.report"))
