"""The run loop of every measurement: it finds the units that are missing, splits them over processes, and writes the
rows of each, or one error row."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness import startup
from harness.engine.manifest import freeze, require_own
from harness.engine.measurement import Context, Measured, Measurement, SpoiledRun
from harness.engine.plan import Plan
from harness.engine.progress import Progress
from harness.engine.ranks import Ranks, join
from harness.engine.shards import split
from harness.engine.writing import Writer
from harness.errors import InputError
from harness.evaluation.division import Division
from harness.files import describe_os_error, told_in_one_line
from harness.tables.identity import ERROR, OK
from harness.tables.provenance import provenance
from harness.tables.store import (
    compact,
    failed_since,
    list_table,
    quarantine,
    unit_states,
    withdraw,
    write_unit,
)

LOOSE_FILES = 1000  # more files of single units than this are merged when a run ends


def to_stderr(line: str) -> None:
    """Print a line to the standard error."""
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class RunOptions:
    """How a run behaves. None of these options changes a number.

    progress: whether progress bars are shown. say: a function that prints a line about the run. failed_after: a unit
    whose error row was written after this time (in seconds of the file system's clock) is not tried again. tidy:
    whether small files are merged at the end if there are many, because reading 100,000 files takes minutes. session:
    what `open_session` of the measurement returned, if the main process has called it already.
    """

    progress: bool = True
    say: Callable[[str], None] = to_stderr
    failed_after: float = math.inf
    tidy: bool = False
    session: Any = None


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its folder, and how many of the wanted units are done and failed."""

    folder: Path
    done: int
    failed: int


def usable_states(measurement: Measurement, folder: Path, deep: bool = False) -> dict[str, str]:
    """Return the states of the units that have rows. Bad parts are moved aside first, so that their units run again.

    deep: whether every part is read as a whole, and not only its label. Raises SchemaVersionError for tables of another
    schema version.
    """
    if not folder.exists():
        return {}
    with told_in_one_line(folder):
        quarantine(folder, measurement.tables, deep)
        return unit_states(folder, measurement.tables)


def run(measurement: Measurement, settings: Any, options: RunOptions | None = None) -> Outcome:
    """Plan a run from its settings and measure what is missing of it.

    Under a launcher the units are split over its processes. Raises InputError for bad input, and if rows cannot be
    written.
    """
    return run_plan(measurement, measurement.units.plan(settings), options or RunOptions(tidy=True))


def run_plan(measurement: Measurement, plan: Plan, options: RunOptions, ranks: Ranks | None = None) -> Outcome:
    """Measure what is missing of a plan, as `run` does."""
    ranks = ranks or join()
    session, settled = None, getattr(measurement.measure, "settled", None)
    if settled is not None:
        plan, session = settled(plan, ranks, options.progress, options.say)
    if ranks.is_main:
        # A folder that holds another run is refused before any weights are loaded.
        require_own(measurement, plan)
    if session is not None:
        options = replace(options, session=session)
    return run_units(measurement, plan, plan.units, ranks, options)


def run_units(
    measurement: Measurement, plan: Plan, wanted: Sequence[Any], ranks: Ranks, options: RunOptions
) -> Outcome:
    """Measure what is missing of the `wanted` units, which are split over the ranks.

    An exception in one rank is raised there after the others have done their share. Raises InputError.
    """
    return _Run(measurement, plan, ranks, options).measure(wanted)


@dataclass(frozen=True)
class _Run:
    """One run of a plan in this process, which is one of `ranks`."""

    measurement: Measurement
    plan: Plan
    ranks: Ranks
    options: RunOptions

    def measure(self, wanted: Sequence[Any]) -> Outcome:
        """Measure what is missing of the wanted units. Every rank returns the same outcome."""
        plan, ranks = self.plan, self.ranks
        say = self.options.say if ranks.is_main else _silent
        ids = set(ranks.broadcast(self._missing(wanted) if ranks.is_main else None))
        missing = [unit for unit in wanted if unit.id in ids]
        together = 0 < len(missing) and ranks.n > 1 and plan.together(len(missing), ranks.n)
        on = f" on {ranks.n} processes" if ranks.n > 1 else ""
        say(f"{self.measurement.name} {plan.id}: {len(wanted)} units, {len(wanted) - len(missing)} done, in"
            f" {plan.folder}{on}{', which measure each unit together' if together else ''}")
        if missing:
            from harness.models.memory import keeping_freed_memory  # imports torch, which a complete run does not need

            share = missing if together or ranks.n == 1 else self._share(missing)
            with keeping_freed_memory():
                self._measure_share(share, together)
        return self._outcome(wanted, ran=bool(missing))

    def _missing(self, wanted: Sequence[Any]) -> list[str]:
        """Return the ids of the wanted units that are to be measured."""
        measurement, plan = self.measurement, self.plan
        states = usable_states(measurement, plan.folder)
        if all(states.get(unit.id) == OK for unit in wanted):
            # A user who runs a complete study again may have been told of damaged files.
            states = usable_states(measurement, plan.folder, deep=True)
        recent = set()
        if self.options.failed_after < math.inf:
            recent = failed_since(plan.folder, measurement.tables, self.options.failed_after)
        return [unit.id for unit in plan.missing(wanted, states) if unit.id not in recent]

    def _share(self, units: list[Any]) -> list[Any]:
        """Return the units that this rank measures."""
        shards = split(self.plan.groups(units), self.ranks.n, self.plan.shard_cost)
        return shards[self.ranks.rank] if self.ranks.rank < len(shards) else []

    def _measure_share(self, share: Sequence[Any], together: bool) -> None:
        """Open the session and measure the units of this rank. together: whether every rank has the same units."""
        measurement, plan, ranks, options = self.measurement, self.plan, self.ranks, self.options
        division = ranks.division()

        def open_first() -> Any:
            # The main process comes first, because it downloads or trains what all of them load.
            if not ranks.is_main:
                return None
            session = options.session or measurement.measure.open_session(plan, ranks, options.progress)
            freeze(measurement, plan)
            return session

        session = division.agree("opening", open_first)
        problem = None
        try:
            if share:
                if session is None and not ranks.is_main:
                    session = measurement.measure.open_session(plan, ranks, options.progress)
                progress = options.progress and ranks.is_main
                announce = getattr(measurement.measure, "announce", None)
                if progress and announce is not None and (line := announce(plan, share, session)):
                    options.say(line)
                context = Context(session, division if together else Division(), progress=progress)
                measure_units(measurement, plan, share, context)
        except Exception as error:
            if together:
                raise
            problem = error
        # A barrier alone would wait for ever for a process that is at another step.
        division.together("the end", lambda: None)
        ranks.wait()
        if problem is not None:
            raise problem

    def _outcome(self, wanted: Sequence[Any], ran: bool) -> Outcome:
        """Return the outcome, which counts the wanted units. ran: whether some of them were measured now."""
        found, plan, tables = None, self.plan, self.measurement.tables
        if self.ranks.is_main:
            if ran and self.options.tidy and len(list_table(plan.folder, tables.primary.name).done) > LOOSE_FILES:
                with told_in_one_line(plan.folder):
                    compact(plan.folder, tables)
            states = unit_states(plan.folder, tables) if plan.folder.exists() else {}
            failed = sum(states.get(unit.id) == ERROR for unit in wanted)
            found = Outcome(plan.folder, sum(states.get(unit.id) == OK for unit in wanted), failed)
        return self.ranks.broadcast(found)


def measure_units(measurement: Measurement, plan: Plan, units: Sequence[Any], context: Context) -> None:
    """Measure these units and write a file of rows for each.

    context: the processes of its division have the same units and measure each of them together, and the first process
    writes. Its `describe` is replaced by that of the progress bar. Raises InputError if rows cannot be written, and
    LostStep if a process of the division is gone.
    """
    startup.wake()
    division, written = context.division, []
    blank = _blank_rows(measurement, provenance())
    # Only the first process of a division writes.
    write = partial(_write, measurement, plan, blank) if division.rank == 0 else _ignore
    with Progress(len(units), shown=context.progress) as bar, Writer(write) as rows:
        try:
            for measured in measurement.measure.measure(plan, units, replace(context, describe=bar.describe)):
                division.agree("writing", partial(rows.put, measured))
                written.append(measured.unit.id)
                bar.update()
            division.agree("written", rows.close)
        except SpoiledRun as error:
            division.agree("written", rows.close)
            own = written if division.rank == 0 else []
            division.agree("withdrawing", partial(withdraw, plan.folder, measurement.tables, own, plan.id, str(error)))


def _ignore(measured: Measured) -> None:
    pass


def _blank_rows(measurement: Measurement, where: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a row of each table in which only the columns that say where and when are filled in."""
    return {
        table.name: {**table.blank(), **{key: value for key, value in where.items() if key in table.names()}}
        for table in measurement.tables.tables
    }


def _write(
    measurement: Measurement, plan: Plan, blank: Mapping[str, Mapping[str, Any]], measured: Measured
) -> None:
    """Write the rows of a unit. If they are refused, write one error row that says why.

    blank: as `_blank_rows` returns. Raises InputError if the folder cannot be written.
    """
    tables, unit_id = measurement.tables, measured.unit.id
    try:
        rows = {name: _completed(blank[name], of_table) for name, of_table in measured.rows.items()}
        try:
            write_unit(plan.folder, tables, unit_id, rows, plan.id)
        except ValueError as error:
            row = error_row(measured.described, error)
            primary = tables.primary.name
            write_unit(plan.folder, tables, unit_id, {primary: _completed(blank[primary], [row])}, plan.id)
    except OSError as error:
        raise InputError(
            f"cannot write rows: {describe_os_error(error, plan.folder)}; what is done is kept: run the same command"
            " again afterwards"
        ) from error


def _completed(blank: Mapping[str, Any], rows: Any) -> Any:
    if isinstance(rows, Mapping):
        return {**blank, **rows}
    return [{**blank, **row} for row in rows]


def error_row(described: Mapping[str, Any], error: BaseException) -> dict[str, Any]:
    """Return a row of the primary table for a unit that failed, with the traceback."""
    return {**described, "status": ERROR, "error": "".join(traceback.format_exception(error))}
