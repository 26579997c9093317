"""Run every test that breaks something on purpose and write the table of what happened.

    python experiments/faults/faults.py                 # needs what the tests need; Slurm's rows need a local Slurm
    python experiments/faults/faults.py -k corrupt      # arguments go to pytest; rows of other tests stay

Each test ends with a rerun whose tables it compares with those of a clean run, every value exactly.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Table:
    """A pytest plugin: one row per test with the mark `fault`."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = {}

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take items away
    def pytest_collection_modifyitems(self, items: list) -> None:
        for item in items:
            mark = item.get_closest_marker("fault")
            if mark:
                self.rows[item.nodeid] = {"fault": mark.args[0], "test": item.nodeid, "outcome": "not run",
                                          "seconds": ""}

    def pytest_runtest_logreport(self, report) -> None:
        row = self.rows.get(report.nodeid)
        if row is None:
            return
        if report.when == "call":
            row |= {"outcome": report.outcome, "seconds": f"{report.duration:.1f}"}
        elif report.outcome != "passed":
            row["outcome"] = "skipped" if report.outcome == "skipped" else "failed"


def main() -> int:
    table = Table()
    status = pytest.main(["-q", "-m", "fault", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / "tests"),
                          *sys.argv[1:]], plugins=[table])
    if not table.rows:  # --help, or tests that could not be collected
        return int(status)
    path = HERE / "faults.csv"
    if path.exists():
        with path.open(newline="") as file:
            before = {row["test"]: row for row in csv.DictReader(file)}
        for test, row in table.rows.items():
            if row["outcome"] == "not run" and test in before:
                row |= {key: before[test][key] for key in ("outcome", "seconds")}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["fault", "test", "outcome", "seconds"])
        writer.writeheader()
        writer.writerows(table.rows.values())
    outcomes = [row["outcome"] for row in table.rows.values()]
    print(f"{len(outcomes)} faults: " + ", ".join(f"{outcomes.count(one)} {one}" for one in sorted(set(outcomes))))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
