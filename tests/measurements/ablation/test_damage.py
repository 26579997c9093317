"""Deltas beside what was removed: tables of the report from rows whose numbers are written down here."""

from __future__ import annotations

import pandas as pd
import pytest
import scipy.stats

from harness.measurements.ablation.damage import by_region, outliers, per_removed, tables, together_and_alone
from harness.measurements.ablation.report import report
from harness.measurements.ablation.summary import measured
from harness.measurements.ablation.tables import read_metrics
from tests.tables.synthetic import metric_row, write_cell

MP = "mp above gavish_donoho"


def row(cell, target, kind, delta, norm, **columns):
    block = None if kind == "type" else int(target[0])
    return metric_row(cell, "nll", target=target, target_kind=kind, block=block, layer_type="up_proj", delta=delta,
                      norm_removed=norm, n_matrices=2 if kind == "type" else 1, n_removed=5, **columns)


def one_of(rows):
    (one,) = measured(pd.DataFrame(rows))
    return one


def test_medians_over_targets_and_columns_of_rows():
    rows = [row(f"c{i}", f"{i}.up_proj", "matrix", delta, 2.0, output_norm_removed=energy**0.5)
            for i, (delta, energy) in enumerate([(1.0, 0.5), (3.0, 1.0), (8.0, 2.0)])]
    rows.append(row("none", "3.up_proj", "matrix", 0.0, 0.0))
    found = per_removed(one_of(rows).cells).set_index("cell_id")
    assert found.delta_per_norm["c1"] == 1.5 and found.delta_per_output_energy["c2"] == pytest.approx(4.0)
    assert found.loc["none", ["delta_per_norm", "delta_per_output_energy"]].isna().all()
    (median,) = by_region(one_of(rows))
    assert (median["targets"], median["delta"], median["delta / norm"]) == ("3 matrix", 3.0, 1.5)
    assert median["delta / energy of outputs"] == pytest.approx(3.0)


def test_outliers_beside_as_many_values_of_the_bulk_paired_over_examples(tmp_path):
    scores = {"out": [3.0, 5.0, 2.0, 6.0], "bulk": [1.0, 2.0, 2.5, 2.0]}
    shared = {"target": "0.up_proj", "kind": "matrix"}
    controlled = {"region": f"lower_bulk ({MP})", "region_by": "control", "region_kind": "lower_bulk"}
    of_cell = {
        "out": row("out", **shared, delta=2.0, norm=4.0, value=4.0, region=MP, region_by="mp", region_kind="above"),
        "bulk": row("bulk", **shared, delta=-0.125, norm=0.5, value=1.875, **controlled),
        "alone": row("alone", "1.up_proj", "matrix", 9.0, 1.0, region=MP, region_by="mp", region_kind="above"),
    }
    for cell, one in of_cell.items():
        examples = None if cell == "alone" else {
            "study_id": "study", "cell_id": cell, "task": "text", "metric": "nll", "score": scores[cell],
            "example_id": ["a", "b", "c", "d"], "weight": [1.0] * 4, "cluster": None,
        }  # fmt: skip
        write_cell(tmp_path, cell, [one], examples)
    (one,) = measured(read_metrics(tmp_path))
    (found,) = outliers(one, tmp_path)
    assert (found["target"], found["n"], found["difference"]) == ("0.up_proj", 5, 2.125)
    assert (found["delta / norm"], found["delta / norm of bulk"]) == (0.5, -0.25)
    test = scipy.stats.ttest_rel(scores["out"], scores["bulk"])
    assert found["p"] == pytest.approx(test.pvalue)
    assert found["stderr"] == pytest.approx(2.125 / test.statistic)
    assert outliers(one)[0]["stderr"] is None
    text = report(tmp_path, write=lambda line: None, figures=False).read_text()
    assert "Outliers against as many values from the lower end" in text and "| 2.125 |" in text


def test_a_type_in_all_blocks_beside_its_matrices():
    rows = [row("all", "up_proj", "type", 6.0, 1.0), row("a", "0.up_proj", "matrix", 1.0, 1.0),
            row("b", "1.up_proj", "matrix", 3.0, 1.0)]
    (found,) = together_and_alone(one_of(rows))
    assert (found["sum"], found["ratio"], found["largest"], found["its delta"]) == (4.0, 1.5, "1.up_proj", 3.0)
    assert together_and_alone(one_of(rows[:2])) == []  # one of the two matrices was not measured
    assert len(tables(one_of(rows))) == 2 and tables(one_of([metric_row("x", delta=None)])) == []
