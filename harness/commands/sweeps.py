"""Sweeps: one run for each combination of values. All are checked before the first, and none stops the others."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.commands.outcome import reports_as
from harness.errors import InputError, complain, printable

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from harness.engine.measurement import Measurement
    from harness.engine.plan import Plan

LONGEST = 100  # characters of an error in the summary; the whole of it is said before


@dataclass(frozen=True)
class Done:
    """The end of a run: its exit status, and its folder."""

    status: int
    folder: Path


@dataclass
class _Run:
    """One run of a sweep. name: the values that only it has. plan: what it will do, or why it cannot be planned.
    error: why it was not done, as one line."""

    name: str
    plan: Plan | InputError
    status: int = 0
    folder: Path | None = None
    error: str = ""


def sweep(
    measurement: Measurement, combinations: Sequence[tuple[str, list[str]]],
    plan: Callable[[list[str]], Plan], job: Callable[[Plan], Done], compared: bool,
) -> int:
    """Plan all runs, do those that can be planned, and print a summary. Return the worst exit status.

    combinations: the name and the overrides of each run. plan: a function from overrides to a plan, without weights.
    job: does one run. compared: whether the studies of different models are compared in the end.
    Raises the first InputError if no run can be planned.
    """
    runs = [_planned(name, words, plan) for name, words in combinations]
    refused = [run.plan for run in runs if isinstance(run.plan, InputError)]
    if len(refused) == len(runs):
        raise refused[0]
    for run in runs:
        if isinstance(run.plan, InputError):
            complain(InputError(f"{run.name}: {run.plan}"))
    for run in runs:
        if not isinstance(run.plan, InputError):
            _do(run, run.plan, job)
    _say(runs)
    if compared:
        _compare(measurement, runs)
    return max(run.status for run in runs)


def _planned(name: str, words: list[str], plan: Callable[[list[str]], Plan]) -> _Run:
    try:
        return _Run(name, plan(words))
    except InputError as error:
        return _Run(name, error, 2, None, str(error))


def _do(run: _Run, plan: Plan, job: Callable[[Plan], Done]) -> None:
    try:
        done = job(plan)
        run.status, run.folder = done.status, done.folder
    except InputError as error:
        complain(InputError(f"{run.name}: {error}"))
        run.status, run.error = 2, str(error)
    except Exception as error:  # whatever it is, the other runs go on
        traceback.print_exc()
        run.status, run.error = 1, f"{type(error).__name__}: {error}"


def _say(runs: Sequence[_Run]) -> None:
    good = sum(run.status == 0 for run in runs)
    print(f"\nsweep: {good} of {len(runs)} runs done", file=sys.stderr)
    width = max(len(run.name) for run in runs)
    for run in runs:
        state = "done" if run.status == 0 else "with failed units" if run.folder is not None else "not done"
        what = str(run.folder) if run.folder is not None else _shortened(run.error)
        print(printable(f"  {run.name:<{width}}  {state}: {what}"), file=sys.stderr, flush=True)


def _shortened(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def _compare(measurement: Measurement, runs: Sequence[_Run]) -> None:
    """Compare the studies of different models with the first of them."""
    found: dict[tuple[Any, ...], Path] = {}
    settings: Any = None
    for run in runs:
        if run.folder is not None and not isinstance(run.plan, InputError) and measurement.name == "ablation":
            settings = run.plan.settings
            model = settings.model
            found.setdefault((model.label, model.revision, model.gguf_file), run.folder)
    if len(found) < 2:
        return
    from harness.measurements.comparison.report import compare

    print()
    try:
        with reports_as(settings):
            compare(list(found.values()))
    except InputError as error:
        complain(error)
