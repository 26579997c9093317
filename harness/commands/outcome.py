"""The end of a command that has run units."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import Any

    from harness.engine.run import Outcome


def reports_as(settings: Any) -> AbstractContextManager[None]:
    """Return a context in which reports have the figures that the settings of a run want."""
    from harness.engine.settings import ReportSettings
    from harness.tables.drawing import reports_with

    return reports_with(getattr(settings, "report", ReportSettings()).figures)


def exit_status(outcome: Outcome) -> int:
    """Return 0 if no unit failed, else 1. The main process then says how to find out why."""
    if not outcome.failed:
        return 0
    from harness.engine.ranks import is_main_process

    if is_main_process():
        n = outcome.done + outcome.failed
        print(f"harness: {outcome.failed} of {n} units failed; harness status {outcome.folder} --failed shows why",
              file=sys.stderr)
    return 1


def ignore(line: str) -> None:
    """Print nothing."""
