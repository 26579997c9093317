"""The two tables under experiments/ can be made, and say what they should on small matrices."""

import runpy
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_speed_table_shows_the_contract_held():
    script = runpy.run_path(str(EXPERIMENTS / "speed/decomposition.py"))
    rows = script["measure"]("40x64", "cpu", repeats=0, only=None) + script["measure"]("64x40", "cpu", 0, ["gesdd"])
    assert all(row["holds_contract"] for row in rows if "float64" in row["method"])
    assert {row["shape"] for row in rows if row["chosen"]} == {"40x64", "64x40"}
    table = script["markdown"](rows, "cpu", 0)
    assert table.count("| **harness auto") == 2 and table.count("| 40x64 |") == len(script["CPU_METHODS"])


def test_calibration_table_shows_noise_inside():
    script = runpy.run_path(str(EXPERIMENTS / "spectra/calibration.py"))
    rows = {row["rule"]: row for row in script["measure"]((96, 384), 1)}
    assert rows["mp bulk_fit + tracy_widom"]["noise_above"] == 0 == rows["mp usvt + tracy_widom"]["noise_below"]
    assert rows["laserRMT"]["noise_above"] == 1
    assert script["markdown"](list(rows.values()), 1).count("| 96x384 |") == len(rows)
