"""The commands that take the folder of a run: work, compact, status, report and push.

Each is a function from the parsed arguments to the exit status. `add_...` functions add the arguments of a command.
"""

from __future__ import annotations

import argparse

from harness.commands.outcome import exit_status, ignore

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from harness.engine.measurement import Measurement
    from harness.tables.drawing import FigureSettings

FOLDER = "folder of a run: results/<model>-<id>, or the value of output=..."


def add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help=FOLDER)


def add_work(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--shard", type=int, help="only this shard, counted from 0 (SLURM_ARRAY_TASK_ID)")
    parser.add_argument("--of", type=int, default=1, help="number of shards, the same for every worker")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def work(arguments: argparse.Namespace) -> int:
    """Run what is missing of a frozen run, or of one of its shards."""
    from harness.engine.run import RunOptions
    from harness.engine.worker import work
    from harness.measurements import find

    options = RunOptions(progress=False, say=ignore) if arguments.quiet else RunOptions()
    return exit_status(work(arguments.folder, find, arguments.shard, arguments.of, options))


def compact(arguments: argparse.Namespace) -> int:
    """Merge the small files of a run, and of the runs inside it."""
    from harness.files import told_in_one_line
    from harness.tables.store import compact

    for measurement, folder in _runs_in(arguments.folder):
        with told_in_one_line(folder):
            merged = compact(folder, measurement.tables)
        print(", ".join(f"{table}: {n} files merged" for table, n in merged.items() if n) or "no files to merge")
    return 0


def add_status(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--failed", action="store_true", help="print the traceback of every failed unit")


def status(arguments: argparse.Namespace) -> int:
    """Print the states of the units of a run, and of the runs inside it."""
    from harness.engine.manifest import read_manifest
    from harness.engine.status import describe_status
    from harness.files import told_in_one_line

    for i, (measurement, folder) in enumerate(_runs_in(arguments.folder)):
        if i:
            print(f"\n{folder}")
        with told_in_one_line(folder):
            text = describe_status(measurement, folder, read_manifest(folder), arguments.failed)
        print(text)
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="figures.format=pdf or svg beside the PNG"
                        " files; figures.width=column (3.5 inches) or page (7.2 inches); report.figures=none: none")


def report(arguments: argparse.Namespace) -> int:
    """Report on a run from its tables."""
    from harness.files import told_in_one_line
    from harness.tables.drawing import drawn_as, reports_with

    settings, wanted = _figure_settings(arguments.overrides)
    (measurement, folder), *_ = _runs_in(arguments.folder)
    with told_in_one_line(folder), drawn_as(settings), reports_with(wanted):
        measurement.report.report(folder)
    return 0


def _figure_settings(overrides: Sequence[str]) -> tuple[FigureSettings, str]:
    """Return how figures are drawn, and whether "all" or "none" are."""
    from harness.errors import InputError
    from harness.tables.drawing import FigureSettings

    values, wanted = {}, "all"
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "report.figures" and value in ("all", "none"):
            wanted = value
        elif key in ("figures.format", "figures.width") and equals:
            values[key.removeprefix("figures.")] = value
        else:
            raise InputError(f"report: {override!r} is wrong; figures.format=..., figures.width=... and"
                             " report.figures=all or none can be set")
    return FigureSettings(**values), wanted


def add_push(parser: argparse.ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("repository", metavar="OWNER/NAME", help="a data set on the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def push(arguments: argparse.Namespace) -> int:
    """Upload the tables of a run to the hub as a data set with a card."""
    from harness.engine.dataset_card import push_run
    from harness.engine.hub import Repository

    (measurement, folder), *_ = _runs_in(arguments.folder)
    print(push_run(measurement, folder, Repository(arguments.repository, "dataset", arguments.private)))
    return 0


def _runs_in(folder: str) -> list[tuple[Measurement, Path]]:
    """Return the run of a folder, then the runs inside it, which a search has. Raises InputError if there is no run."""
    from pathlib import Path

    from harness.engine.manifest import MANIFEST, read_manifest
    from harness.measurements import find

    found = [(find(read_manifest(folder).kind), Path(folder))]
    for inside in sorted(Path(folder).glob(f"studies/*/{MANIFEST}")):
        found.append((find(read_manifest(inside.parent).kind), inside.parent))
    return found
