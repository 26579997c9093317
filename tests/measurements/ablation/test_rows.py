"""Rows of a cell: what is ok has a finite value, what has none is an error row of its own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.evaluation.adaptive import Sampled, SampledMetric
from harness.evaluation.requests import ExampleScores, ScoredTask
from harness.evaluation.statistics import estimate, paired, paired_interval
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.outcomes import Failed, SampledPart, Scored
from harness.measurements.ablation.region_settings import NO_REGION
from harness.measurements.ablation.rows import RowMaker
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.tables import TABLES
from harness.models.editing import Ablation
from harness.models.targets import BASELINE, Target
from harness.spectral.regions import Random, small
from tests.models.tiny import tiny_config

TARGET = Target("all", "all", ("0.q_proj", "1.q_proj", "1.up_proj", "3.q_proj"), 0, None, None)
CELL = Cell("cell", Ablation(TARGET, Random(small(0.1), 3)), "text")


def scores(*values, transform="identity"):
    return ExampleScores(np.array(values, dtype=float), np.ones(len(values)), transform, higher_is_better=False)


@pytest.fixture
def maker():
    task = ScoredTask("text", {"window": 8}, [], [f"e{i}" for i in range(4)], lambda scores: {})
    description = SimpleNamespace(identity={"digest": "d"}, config=tiny_config("llama"), dtype="float32")
    study = SimpleNamespace(id="study", settings=StudySettings(), description=description, tasks={"text": task},
                            prepared=SimpleNamespace(calibration=None, reference=None))
    matrices = [SimpleNamespace(name=name, block=int(name[0]), layer_type=name[2:]) for name in TARGET.matrices]
    return RowMaker(study, SimpleNamespace(blocks=[None] * 4, matrices=matrices, device=torch.device("cpu")))


def test_values_deltas_and_examples(maker):
    now, baseline = scores(1.0, 2.0, 3.0, 5.0), scores(1.0, 1.0, 2.0, 2.5)
    measured = maker.measured(CELL, Scored({"nll": now}, {"batch_tokens": 7}), {"nll": baseline}, None, 1.5)
    (row,) = measured.rows["metrics"]
    assert row["status"] == "ok" and row["value"] == estimate(now).value == 2.75 and row["seconds"] == 1.5
    assert row["baseline"] == 1.625 and row["delta"] == paired(now, baseline).delta == 1.125
    ends = paired_interval(now, baseline, 0.95)
    assert (row["delta_low"], row["delta_high"], row["delta_freedom"]) == (*ends, pytest.approx(3))
    assert (row["target"], row["region"], row["region_seed"]) == ("all", "random (small 0.1) seed 3", 3)
    assert (row["blocks"], row["layer_types"], row["n_matrices"]) == ("0-1,3", "q_proj,up_proj", 4)
    assert json.loads(row["settings"])["batch_tokens"] == 7 and json.loads(row["protocol"]) == {"window": 8}
    examples = measured.rows["examples"]
    assert examples["example_id"].tolist() == ["e0", "e1", "e2", "e3"] and examples["score"].tolist() == [1, 2, 3, 5]
    assert measured.rows.keys() == set(TABLES.names()) and row.keys() <= set(TABLES["metrics"].names())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_an_error_beside_the_others(maker, bad):
    """The store does not look at values: nothing that is ok may leave here without one."""
    outcome = Scored({"good": scores(1, 2, 3, 4), "bad": scores(1, 2, 3, bad)})
    baseline = {"good": scores(1, 2, 3, 4), "bad": scores(1, 2, 3, 4)}
    good, row = maker.measured(CELL, outcome, baseline, None, 0.0).rows["metrics"]
    assert good["status"] == "ok" and good["delta"] == 0
    assert row["status"] == "error" and row["error"] == f"bad is {bad}: not a finite number" and "value" not in row
    # perplexities overflow where the log-probabilities are finite
    overflown = maker.measured(CELL, Scored({"ppl": scores(800, 800, transform="exp")}), None, None, 0.0)
    assert [one["error"] for one in overflown.rows["metrics"]] == ["ppl is inf: not a finite number"]


def test_a_baseline_that_is_not_finite_leaves_the_value_without_a_delta(maker):
    baseline = {"nll": scores(float("inf"), 1, 1, 1)}
    (row,) = maker.measured(CELL, Scored({"nll": scores(1, 2, 3, 4)}), baseline, None, 0.0).rows["metrics"]
    assert row["status"] == "ok" and row["value"] == 2.5 and not row.keys() & {"baseline", "delta", "p_value"}


def sampled(**changes):
    values = dict(value=2.0, stderr=0.1, baseline=1.5, delta=0.5, delta_stderr=0.1, low=0.3, high=0.7, p_value=0.01,
                  n=2, n_clusters=2, n_available=4)
    part = {"nll": scores(1.0, 3.0)}
    return SampledPart(Sampled(np.array([1, 3]), part, {"nll": SampledMetric(**values | changes)}))


def test_rows_of_a_sample(maker):
    measured = maker.measured(CELL, sampled(), {"nll": scores(1, 1, 2, 2)}, None, 0.0)
    (row,) = measured.rows["metrics"]
    assert (row["status"], row["precision"], row["ci_low"], row["ci_high"]) == ("ok", "adaptive", 0.3, 0.7)
    assert (row["n"], row["n_available"], row["higher_is_better"]) == (2, 4, False)
    assert measured.rows["examples"]["example_id"].tolist() == ["e1", "e3"]
    (row,) = maker.measured(CELL, sampled(high=float("inf")), None, None, 0.0).rows["metrics"]
    assert row["status"] == "ok" and row["ci_low"] == 0.3 and row["ci_high"] is None
    (row,) = maker.measured(CELL, sampled(value=float("nan")), None, None, 0.0).rows["metrics"]
    assert row["status"] == "error" and row["error"] == "nll is nan: not a finite number" and "value" not in row
    (row,) = maker.measured(CELL, sampled(baseline=float("inf")), None, None, 0.0).rows["metrics"]
    assert row["status"] == "ok" and row["delta"] is row["p_value"] is row["ci_low"] is None


def test_failures_are_a_row_per_metric_of_the_baseline(maker):
    outcome = Failed(RuntimeError("boom"), {"batch_tokens": 3})
    rows = maker.measured(CELL, outcome, {"a": scores(1), "b": scores(1)}, None, 0.0).rows
    assert rows.keys() == {"metrics"} and [row["metric"] for row in rows["metrics"]] == ["a", "b"]
    assert all(row["status"] == "error" and "RuntimeError: boom" in row["error"] for row in rows["metrics"])
    assert json.loads(rows["metrics"][0]["settings"])["batch_tokens"] == 3
    (row,) = maker.measured(CELL, outcome, None, None, 0.0).rows["metrics"]
    assert row["metric"] == "all"
    # an outcome that does not fit the task is this cell's error and no end of the run
    (row,) = maker.measured(CELL, Scored({"nll": scores(1, 2)}), {"other": scores(1)}, None, 0.0).rows["metrics"]
    assert row["status"] == "error" and "KeyError: 'nll'" in row["error"]


def test_the_baseline_has_no_region(maker):
    cell = Cell("base", Ablation(BASELINE, NO_REGION), "text")
    (row,) = maker.measured(cell, Scored({"nll": scores(1, 2, 3, 4)}), None, None, 0.0).rows["metrics"]
    assert (row["target"], row["region"], row["region_by"], row["region_kind"]) == ("baseline", "none", None, None)
    assert row["blocks"] is row["layer_types"] is None and row["n_matrices"] == 0 and "delta" not in row
