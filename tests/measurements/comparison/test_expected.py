"""`harness compare RUN --expected FILE`: measured beside published, and what a file may hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.comparison.expected import ADDED

KEYS = "task,metric,target,region,column,expected,over,tolerance,source,note"


@pytest.fixture(scope="module")
def study(clean_small, tmp_path_factory) -> Path:
    """A copy of the small study, because the comparison writes into its folder."""
    return shutil.copytree(clean_small, tmp_path_factory.mktemp("expected") / "study")


@pytest.fixture(scope="module")
def rows(study) -> pd.DataFrame:
    return read_metrics(study)


def told(folder: Path, file: Path, *lines: str, head: str = KEYS) -> int:
    file.write_text("\n".join([head, *lines]) + "\n")
    return main(["compare", str(folder), "--expected", str(file)])


def test_measured_beside_published(study, rows, tmp_path, capsys):
    one = rows[(rows.task == "recall") & (rows.target == "0.v_proj") & (rows.metric == "accuracy_clean")].iloc[0]
    key = f"recall,accuracy_clean,0.v_proj,{one.region}"
    lines = [
        f'{key},value,{one.value},,,"Table 1, exact",here',
        f"{key},value,{one.value + 10 * one.stderr + 0.02},,0.01,far,",
        f"{key},value,{one.value + 1.9 * one.stderr + 0.01},,0.0101,near,",
        f"{key},n_removed/n_values,0.1,,,a quotient,",
        "recall,accuracy_clean,,,delta,0,mean,,the mean over all cells,",
        "recall,accuracy_clean,9.v_proj,,value,0.5,,0.1,no such block,",
    ]
    assert told(study, tmp_path / "expected.csv", *lines) == 0
    said = capsys.readouterr().out
    assert "5 of 6 published numbers were measured here" in said
    found = pd.read_csv(study / "report" / "expected.csv")
    assert list(found)[-len(ADDED):] == list(ADDED) and found.note[0] == "here"
    assert found.status.tolist() == ["measured"] * 5 + ["not measured"]
    assert found.difference[0] == 0 and found.measured_stderr[0] == one.stderr
    assert found.agrees.iloc[:3].tolist() == [True, False, True] and found.agrees.iloc[3:].isna().all()
    assert found.measured[3] == pytest.approx(one.n_removed / one.n_values)
    of_metric = rows[(rows.task == "recall") & (rows.metric == "accuracy_clean")]
    assert found.measured[4] == pytest.approx(of_metric.delta.mean()) and found.n_rows[4] == len(of_metric)
    assert "Table 1, exact" in (study / "report" / "expected.md").read_text()


@pytest.mark.parametrize("line, head, message", [
    ("recall,1", "task,expected", "it has no column 'column'"),
    ("recal,value,1", "tsk,column,expected", "'tsk' is no column of the table metrics; did you mean"),
    ("recall,valu,1", "task,column,expected", "'valu' is no column of the table metrics"),
    ("recall,model,1", "task,column,expected", "must be a column of numbers"),
    ("recall,value,43.2 %", "task,column,expected", "give a finite number"),
    ("recall,value,", "task,column,expected", "expected is empty"),
    ("recall,value,nan", "task,column,expected", "give a finite number"),
    ("recall,value,1,-2", "task,column,expected,tolerance", "give a finite number"),
    ("recall,value,1,middle", "task,column,expected,over", "over 'middle' is wrong"),
    ("recall,value,1", "task,column,expected", "rows of metrics match, which differ in"),
    ("nothing,value,1", "table,column,expected", "'nothing' is no table of ablation"),
    ("", "task,column,expected", "it has no rows"),
])
def test_a_wrong_file_is_one_line(line, head, message, study, tmp_path, capsys):
    assert told(study, tmp_path / "expected.csv", line, head=head) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said and "expected.csv" in said


def test_a_file_that_is_no_text(study, tmp_path, capsys):
    (tmp_path / "expected.csv").write_bytes(b"\xff\xfe\x00column,expected\n\x00\x01")
    assert main(["compare", str(study), "--expected", str(tmp_path / "expected.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
