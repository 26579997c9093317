"""runtime.precision=adaptive from settings to rows and report, beside the same study in exact mode."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.errors import InputError
from harness.evaluation.settings import AdaptiveSettings
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.report import terminal_summary
from harness.measurements.ablation.tables import read_examples, read_metrics
from tests.studies import MODEL, run_here

STUDY = [*MODEL, "tasks.recall.n_sequences=600", "target.layer_types=[v_proj,up_proj,down_proj]", "region=fraction",
         "region.values=[0.2]", "runtime.threads=1", "runtime.batch_tokens=1024"]
ADAPTIVE = [*STUDY, "runtime.precision=adaptive", "runtime.adaptive.absolute=0.06"]
KEY = ["target", "region", "metric"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    return run_here(STUDY, folder / "exact"), run_here(ADAPTIVE, folder / "adaptive")


def _joined(exact, adaptive):
    return read_metrics(adaptive).merge(read_metrics(exact), on=KEY, suffixes=("", "_exact"), validate="1:1")


def test_cells_stop_and_their_intervals_hold_the_exact_delta(both):
    rows = _joined(*both)
    rows = rows[rows["target_kind"] == "matrix"]
    assert (rows["precision"] == "adaptive").all() and (rows["n_available"] == rows["n_exact"]).all()
    primary = rows[rows["metric"] == "accuracy_clean"]
    assert (primary["n"] < primary["n_available"]).mean() > 0.5
    allowed = np.maximum(0.06, np.maximum(0.1 * primary["delta"].abs(), 0.005 * primary["baseline"]))
    assert ((primary["ci_high"] - primary["ci_low"]) / 2 <= allowed + 1e-12).all()
    known = rows.dropna(subset=["ci_low", "ci_high"])
    slack = 1e-6 * known["value_exact"].abs()
    held = (known["ci_low"] - slack <= known["delta_exact"]) & (known["delta_exact"] <= known["ci_high"] + slack)
    assert len(known) > 60 and (~held).sum() <= stats.binom.ppf(0.9985, len(known), 0.05)
    assert np.allclose(rows["value"], rows["baseline"] + rows["delta"], rtol=1e-12)
    assert np.allclose(rows["baseline"], rows["baseline_exact"], rtol=1e-6)
    # two estimates of one standard error, from other numbers of examples
    assert (rows["delta_stderr"] >= 0.5 * rows["delta_stderr_exact"]).mean() > 0.9


def test_what_was_not_stopped_is_exact(both):
    rows = _joined(*both)
    whole = rows[rows["n"] == rows["n_available"]]
    for column in ("value", "stderr", "delta", "delta_stderr"):
        assert np.allclose(whole[column], whole[f"{column}_exact"], rtol=1e-5, atol=1e-7, equal_nan=True), column
    baseline = rows[rows["target_kind"] == "baseline"]
    assert (baseline["precision"] == "exact").all() and baseline["ci_low"].isna().all()
    assert len(baseline) == 6 and set(baseline["n"]) == {baseline["n"].max()}
    assert (rows["precision_exact"] == "exact").all() and rows["ci_low_exact"].isna().all()


def test_the_mode_and_its_settings_are_part_of_the_cell(both, tmp_path):
    exact, adaptive = (read_metrics(folder) for folder in both)
    assert not set(exact["cell_id"]) & set(adaptive["cell_id"])
    stated = json.loads(adaptive["settings"].iloc[0])
    assert stated["adaptive"]["absolute"] == 0.06 and stated["adaptive"]["confidence"] == 0.95
    assert "adaptive" not in json.loads(exact["settings"].iloc[0])
    for change in ("runtime.adaptive.absolute=0.07", "runtime.adaptive.confidence=0.9", "runtime.batch_tokens=2048",
                   "seed=1"):
        changed = ABLATION.units.plan(compose_settings("ablation", [*ADAPTIVE, f"output={tmp_path}/x", change]))
        assert not {cell.id for cell in changed.units} & set(adaptive["cell_id"]), change


def test_the_table_of_examples_has_those_used(both):
    exact, adaptive = (read_examples(folder) for folder in both)
    counts = adaptive.groupby(["cell_id", "metric"]).size()
    rows = read_metrics(both[1]).set_index(["cell_id", "metric"])
    assert (counts == rows["n"].reindex(counts.index)).all()
    cell = rows[rows["n"] < rows["n_available"]].index[0][0]
    identity = rows.loc[cell].iloc[0]
    there = read_metrics(both[0])
    same = there[(there["target"] == identity["target"]) & (there["region"] == identity["region"])]["cell_id"].iloc[0]
    pairs = adaptive[adaptive["cell_id"] == cell].merge(exact[exact["cell_id"] == same], on=["example_id", "metric"],
                                                        suffixes=("", "_exact"), validate="1:1")
    assert len(pairs) == (adaptive["cell_id"] == cell).sum()
    assert np.allclose(pairs["score"], pairs["score_exact"], rtol=1e-4, atol=1e-5)


def test_resumed_and_full_forwards_use_the_same_examples_and_give_the_same_bits(both, tmp_path):
    plain = run_here([*ADAPTIVE, "runtime.reuse=false"], tmp_path / "plain")
    columns = [*KEY, "n", "value", "delta", "ci_low", "ci_high", "p_value"]
    first, second = (read_metrics(folder).sort_values(KEY)[columns].reset_index(drop=True) for folder in
                     (both[1], plain))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_plan_says_that_it_is_the_most(tmp_path):
    settings = [compose_settings("ablation", [*study, f"output={tmp_path}/x"]) for study in (STUDY, ADAPTIVE)]
    texts = [ABLATION.units.describe(ABLATION.units.plan(of_study)) for of_study in settings]
    assert ["precision adaptive: that is the most" in text for text in texts] == [False, True]


def test_report_shows_how_many_were_used(both):
    rows = read_metrics(both[1])
    text = terminal_summary(rows, width=140)
    one = rows[(rows["metric"] == "accuracy_clean") & (rows["target_kind"] == "matrix")].iloc[0]
    assert f"{one['n']}/{one['n_available']}" in text
    assert "/600" not in terminal_summary(read_metrics(both[0]), width=140)


@pytest.mark.parametrize(("overrides", "line"), [
    (["runtime.precision=fast"], "runtime.precision: 'fast' is wrong; use one of exact, adaptive"),
    (["runtime.precision=adaptive", "runtime.adaptive.relative=0"], "runtime.adaptive.relative: 0 is wrong"),
    (["runtime.precision=adaptive", "runtime.adaptive.confidence=95"], "runtime.adaptive.confidence: 95 is wrong"),
    (["runtime.precision=adaptive", "runtime.adaptive.min_examples=1"], "runtime.adaptive.min_examples: 1 is wrong"),
    (["runtime.precision=adaptive", "runtime.adaptive.relative=null", "runtime.adaptive.of_baseline=null"],
     "set relative, of_baseline, absolute or sign"),
    (["runtime.adaptive.absolute=0.1"], "need runtime.precision=adaptive"),
])
def test_settings_that_cannot_be_meant_are_one_line(overrides, line):
    with pytest.raises(InputError, match=line) as caught:
        compose_settings("ablation", [*MODEL, *overrides])
    assert "\n" not in str(caught.value)


@pytest.mark.assets
def test_real_windows(assets, tmp_path):
    """Perplexity of a real model on real text: intervals hold the exact delta over cells and orders, and a run in
    adaptive mode does what replaying the exact run's examples through the rule does."""
    from experiments.speed import adaptive as experiment

    study = ["model=pretrained", f"model.name={assets}/models/stories260K", "task=wikitext", "runtime.threads=1",
             f"tasks.wikitext.data_files={assets}/data/wikitext-2-raw/test.jsonl", "tasks.wikitext.window=64",
             "tasks.wikitext.limit=300", "target.layer_types=[down_proj]", "target.blocks=[2,4]", "region=fraction",
             "region.values=[0.1]", "region.controls=[]", "runtime.batch_tokens=1024"]
    exact = run_here(study, tmp_path / "exact")
    ran = run_here([*study, "runtime.precision=adaptive", "runtime.adaptive.of_baseline=0.02",
                    "runtime.adaptive.relative=0.2"], tmp_path / "adaptive")
    settings = AdaptiveSettings(of_baseline=0.02, relative=0.2)
    metrics, scores, tokens = experiment.by_cell(exact, "wikitext")
    (baseline,) = metrics.index[metrics["target_kind"] == "baseline"]
    rows = _joined(exact, ran)
    rows = rows[rows["metric"] == "token_perplexity"].set_index("cell_id_exact")
    tried, missed, orders = 0, 0, 25
    for cell in metrics.index.drop(baseline):
        found = [experiment.replayed(scores[cell], scores[baseline], tokens, 1024, settings, seed)
                 for seed in range(orders)]
        assert found[0][0] == rows.loc[cell, "n"] < rows.loc[cell, "n_available"]
        assert found[0][1] == (rows.loc[cell, "ci_low"] <= rows.loc[cell, "delta_exact"] <= rows.loc[cell, "ci_high"])
        missed, tried = missed + sum(not held for _, held in found), tried + orders
    assert tried == 150 and missed <= stats.binom.ppf(0.9985, tried, 0.05)
