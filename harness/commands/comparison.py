"""The command `harness compare`, which takes folders of runs that were measured before."""

from __future__ import annotations

import argparse

from harness.errors import InputError


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="folder", help="folders of studies; the first is compared with"
                        " each of the others. With --expected: the folder of one run of any kind")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the comparison (results/compare-<id>)")
    parser.add_argument("--expected", metavar="FILE", help="a CSV file of published numbers (docs/compare.md)")


def compare(arguments: argparse.Namespace) -> int:
    """Compare studies with each other, or one run with published numbers."""
    if arguments.expected is None:
        from harness.measurements.comparison.report import compare

        compare(arguments.folders, arguments.output)
        return 0
    if len(arguments.folders) != 1 or arguments.output is not None:
        raise InputError("compare: --expected takes one folder and no --output; it writes into the folder's report/")
    from harness.measurements.comparison.expected import against

    against(arguments.folders[0], arguments.expected)
    return 0
