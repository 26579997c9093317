"""What reports say of failed units: one line for each, or one line for all."""

import pandas as pd

from harness.tables.failures import failure_count, failure_lines, last_line

ROWS = pd.DataFrame({
    "id": ["a", "b", "b", "c"], "matrix": ["0.q_proj", "1.q_proj", "1.q_proj", "2.q_proj"],
    "status": ["ok", "error", "error", "error"],
    "error": [None, "Traceback ...\nValueError: no\n", "Traceback ...\nValueError: no\n", None],
})


def test_the_last_line_of_a_traceback():
    assert last_line("Traceback ...\n  File ...\nValueError: no\n\n") == "ValueError: no"
    assert last_line(None) == last_line(float("nan")) == last_line("") == last_line(" \n") == "unknown"


def test_one_line_for_each_failed_row():
    assert failure_lines(ROWS, lambda row: row["matrix"]) == [
        "failed: 1.q_proj: ValueError: no", "failed: 1.q_proj: ValueError: no", "failed: 2.q_proj: unknown",
    ]
    assert failure_lines(ROWS[:1], lambda row: row["matrix"]) == []


def test_failed_units_are_counted_once():
    assert failure_count(ROWS, "id", "cell") == ["2 cells failed; the first: ValueError: no"]
    assert failure_count(ROWS[3:], "id", "unit") == ["1 unit failed; the first: unknown"]
    assert failure_count(ROWS[:1], "id", "cell") == []
