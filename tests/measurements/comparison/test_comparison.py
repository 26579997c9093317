"""`harness compare`: the join, its numbers against scipy, what it refuses, and the two doors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats

import harness as sh
from harness.cli import main
from harness.engine.manifest import checksum_of
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.measurements.comparison.tables import TABLES
from tests.pages import page_data
from tests.studies import SMALL, run_here

ROOT = Path(__file__).parents[3]
COLUMNS = (
    "task metric target region model_a model_b n value_a value_b baseline_a baseline_b delta_a delta_b difference"
    " difference_stderr p_value p_holm energy_removed_a energy_removed_b protocol_a protocol_b"
).split()


@pytest.fixture(scope="module")
def pair(clean_small, tmp_path_factory) -> tuple[Path, Path]:
    """The small study, and the same of a model that was trained from another seed and without one of the regions."""
    other = [*SMALL, "model.recall.seed=1", "region.deciles=[1,10]"]
    return clean_small, run_here(other, tmp_path_factory.mktemp("other") / "other")


@pytest.fixture(scope="module")
def compared(pair, tmp_path_factory):
    return sh.compare(*pair, output=tmp_path_factory.mktemp("compared"))


def changed(folder: Path, to: Path, edit) -> Path:
    """A copy of a study, whose manifest `edit` changes."""
    shutil.copytree(folder, to)
    content = json.loads((to / "manifest.json").read_text())
    edit(content)
    content["checksum"] = checksum_of(content)
    (to / "manifest.json").write_text(json.dumps(content))
    return to


def per_example(folder: Path, row: pd.Series, baseline: bool) -> np.ndarray:
    metrics = read_metrics(folder)
    target, region = ("baseline", "none") if baseline else (row.target, row.region)
    cell = metrics[(metrics.task == row.task) & (metrics.target == target) & (metrics.region == region)].cell_id.iloc[0]
    examples = read_examples(folder, [cell])
    return examples[examples.metric == row.metric].set_index("example_id").score


def test_rows_are_the_paired_test_of_scipy(pair, compared):
    rows = compared.rows
    assert list(rows) == COLUMNS == list(TABLES["compare"].names())
    assert len(rows[(rows.task == "recall") & (rows.metric == "accuracy_clean")]) == 1 + 1 + 3 * 6 * 0 + 12
    checked = 0
    for _, row in rows[rows.metric.str.startswith("accuracy")].iloc[::5].iterrows():
        a, b = pair
        difference = per_example(b, row, False) - per_example(a, row, False)
        if row.target != "baseline":
            difference = difference - (per_example(b, row, True) - per_example(a, row, True))
        examples = read_examples(a, task=row.task)
        weight = examples[examples.metric == row.metric].drop_duplicates("example_id").weight
        if not (weight == 1).all():
            continue
        checked += 1
        if difference.std() == 0:
            continue
        expected = stats.ttest_1samp(difference, 0)
        assert row.difference == pytest.approx(difference.mean(), abs=1e-12)
        assert row.difference_stderr == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)), rel=1e-9)
        assert row.p_value == pytest.approx(expected.pvalue, rel=1e-7)
    ablated = rows[rows.target != "baseline"]
    np.testing.assert_allclose(ablated.difference, ablated.delta_b - ablated.delta_a, atol=1e-9)
    baselines = rows[rows.target == "baseline"]
    np.testing.assert_allclose(baselines.difference, baselines.value_b - baselines.value_a, atol=1e-12)
    assert (rows.p_holm >= rows.p_value).all() and rows.protocol_a.equals(rows.protocol_b)


def test_what_one_study_lacks_is_named(pair, compared):
    left_out = compared.left_out
    metrics = read_metrics(pair[0])
    only = metrics[metrics.region.str.startswith("decile 5")]
    assert len(left_out) == len(only) > 0
    assert set(left_out.region) == set(only.region) and left_out.reason.str.contains("has no such cell").all()
    assert len(compared.rows) + len(left_out) == len(metrics)
    assert any("Not compared" in line for line in compared.summary)
    page = (compared.folder / "compare.md").read_text()
    content = page_data(compared.folder / "index.html")
    n_primary = sum(table["n"] for table in content["tables"])
    assert len(content["charts"]) >= 2 and 0 < n_primary <= len(compared.rows)
    assert "| b | target | region |" in page and all(f"]({one.name})" in page for one in compared.folder.glob("*.png"))


def test_both_doors_write_the_same(pair, compared, tmp_path, capsys):
    assert main(["compare", *map(str, pair), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in compared.summary)
    for name in ("compare", "left_out"):
        one, other = (pq.read_table(folder / f"{name}.parquet") for folder in (compared.folder, tmp_path / "out"))
        assert one.equals(other) and one.schema.equals(TABLES.arrow_schema(name), check_metadata=True)
    assert list((tmp_path / "out").glob("*.png"))


def test_it_needs_no_torch(pair, tmp_path):
    code = f"""
import sys
from harness.cli import main
assert main(["compare", *{[str(one) for one in pair]!r}, "--output", {str(tmp_path / "out")!r}]) == 0
print("loaded:", [name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_three_models_are_compared_with_the_first(pair, tmp_path):
    third = run_here([*SMALL, "model.recall.seed=2", "region.deciles=[1]"], tmp_path / "third")
    found = sh.compare(*pair, third, output=tmp_path / "out", figures=False).rows
    assert found.model_a.nunique() == 1 and found.model_b.nunique() == 2
    of_third = found[found.model_b == found.model_b.unique()[1]]
    alone = sh.compare(pair[0], third, output=tmp_path / "alone", figures=False).rows
    values = [column for column in COLUMNS if not column.startswith(("model", "p_holm"))]
    pd.testing.assert_frame_equal(of_third[values].reset_index(drop=True), alone[values])
    # corrected for the ablations of both pairs
    assert (of_third.p_holm.to_numpy() >= alone.p_holm.to_numpy()).all()


def test_tasks_that_asked_other_tokens(pair, tmp_path):
    """Named with what differs; refused where nothing else is left."""
    def other_window(content):
        content["tasks"]["recall"] |= {"digest": "other"}
        content["tasks"]["recall"]["protocol"]["seed"] = 77

    other = changed(pair[1], tmp_path / "other", other_window)
    found = sh.compare(pair[0], other, output=tmp_path / "out", figures=False)
    assert set(found.rows.task) == {"noisy"}
    of_task = found.left_out[found.left_out.task == "recall"]
    assert of_task.reason.tolist() == ["the tasks asked different tokens: their protocols differ in seed (0, 77)"]

    def other_tokens(content):
        for one in content["tasks"].values():
            one["digest"] = "other"

    with pytest.raises(sh.InputError, match="no cell of these studies can be compared; .*different tokenizers"):
        sh.compare(pair[0], changed(pair[1], tmp_path / "tokens", other_tokens), output=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_template_on_one_side_compares_means_and_refuses_perplexities(pair, tmp_path):
    def with_template(content):
        content["tasks"]["recall"] |= {"digest": "other"}
        content["tasks"]["recall"]["protocol"]["chat"] = {"template": "abc"}

    other = changed(pair[1], tmp_path / "chat", with_template)
    found = sh.compare(pair[0], other, output=tmp_path / "out", figures=False)
    of_task = found.rows[found.rows.task == "recall"]
    assert "accuracy_clean" in set(of_task.metric) and any("chat template" in line for line in found.summary)
    refused = found.left_out[found.left_out.reason.str.contains("a perplexity of other tokens")]
    assert not set(refused.metric) & set(of_task.metric)


def test_checkpoints_that_end_their_texts_differently_are_compared(pair, tmp_path):
    def other_end(content):
        content["tasks"]["recall"] |= {"digest": "other"}
        content["tasks"]["recall"]["protocol"]["generation"] = {"eos_token_id": [1, 2]}

    found = sh.compare(pair[0], changed(pair[1], tmp_path / "end", other_end), output=tmp_path / "out", figures=False)
    assert "recall" in set(found.rows.task) and any("settings of generation" in line for line in found.summary)


@pytest.mark.parametrize("words, message", [
    (["{a}"], "at least two studies"),
    (["{a}", "{a}"], "hold the same study"),
    (["{a}", "/no/such"], "holds nothing that harness can read"),
    (["{a}", "{b}", "--expected", "x.csv"], "takes one folder"),
    (["{a}", "--expected", "/no/such.csv"], "no such file"),
])
def test_wrong_input_is_one_line(words, message, pair, capsys):
    places = {"a": str(pair[0]), "b": str(pair[1])}
    assert main(["compare", *(word.format(**places) for word in words)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_examples_that_do_not_give_the_value_are_refused(pair, tmp_path):
    """A value that somebody changed in the table of metrics."""
    from harness.measurements.ablation.tables import TABLES as STUDY
    from harness.tables.store import read_table, write_unit

    copy = shutil.copytree(pair[1], tmp_path / "copy")
    rows = read_table(copy, STUDY, "metrics")
    cell = rows[rows.target == "baseline"].cell_id.iloc[0]
    shutil.rmtree(copy / "metrics")
    run = json.loads((copy / "manifest.json").read_text())["id"]
    rows = rows.astype(object).where(rows.notna(), None)
    for one, of_cell in rows.groupby("cell_id"):
        records = of_cell.to_dict("records")
        for record in records:
            record["value"] = record["value"] * 1.01 if one == cell else record["value"]
        write_unit(copy, STUDY, one, {"metrics": records}, run)
    with pytest.raises(sh.InputError, match=f"the examples of cell {cell} do not give its"):
        sh.compare(pair[0], copy, output=tmp_path / "out", figures=False)
