"""The noise floor of low precision: the control with another order of additions, from the plan to the report."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from harness.engine.measurement import Context
from harness.engine.ranks import Ranks
from harness.evaluation.other_order import batches_differ, other_options
from harness.evaluation.packing import pack
from harness.evaluation.requests import Request
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation import heat_map
from harness.measurements.ablation.forecast import forecast
from harness.measurements.ablation.heat_map import heat_map_figure
from harness.measurements.ablation.measure import measure, open_session
from harness.measurements.ablation.region_figure import region_figure
from harness.measurements.ablation.report import report, terminal_summary
from harness.measurements.ablation.summary import MeasuredMetric, measured
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.ablation.units import plan
from harness.tables.labels import region_words
from tests.evaluation.test_division import together
from tests.studies import run_settings
from tests.tables.synthetic import metric_row, sized, study_rows, targets, write_rows


@pytest.fixture(scope="module")
def overrides(assets, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "stories.txt"
    text.write_text((assets / "data/tinystories/validation_first_stories.txt").read_text()[:6000])
    return ["model=pretrained", f"model.name={assets / 'models/stories260K'}", "model.dtype=bfloat16", "task=text",
            f"tasks.text.data_files={text}", "tasks.text.window=64", "target.blocks=[4]", "runtime.threads=1",
            "target.layer_types=[v_proj,down_proj]", "region.kinds=[large,small]", "region.values=[0.02]",
            "region.controls=[]", "runtime.batch_tokens=512", "runtime.cache_gib=0"]


def composed(overrides, folder, *more):
    return compose_settings("ablation", [*overrides, f"output={folder}", *more])


@pytest.fixture(scope="module")
def low(overrides, tmp_path_factory):
    """The folder of a study in bfloat16 whose `region.controls` is empty."""
    return run_settings(composed(overrides, tmp_path_factory.mktemp("low") / "study"))


def others(rows):
    return rows[rows["region_kind"] == "other_order"]


def test_every_study_in_low_precision_has_the_control_and_no_other_has(overrides, tmp_path):
    def planned(*more):
        return plan(composed(overrides, tmp_path, *more))

    low, float32 = planned(), planned("model.dtype=float32")
    (control,) = [cell for cell in low.units if cell.in_other_order]
    assert not control.of_grid and not control.is_baseline and control.ablation.target.matrices == ()
    assert not any(cell.in_other_order for cell in float32.units)
    with_none, asked = planned("region.controls=[none]"), planned("region.controls=[other_order]")
    assert {cell.id for cell in asked.units} == {cell.id for cell in low.units}
    # the control in the baseline's batches is another cell, and all others are the same cells
    (none,) = {cell.id for cell in with_none.units} - {cell.id for cell in low.units}
    assert none not in (control.id, low.units[0].id) and control.id != low.units[0].id
    # its number depends on the batches of the baseline and on how much smaller its own are
    smaller = planned("runtime.batch_tokens=256")
    assert not {cell.id for cell in smaller.units} & {cell.id for cell in low.units}
    region = dataclasses.replace(control.ablation.region, share=0.5)
    half = low.with_cells([(dataclasses.replace(control.ablation, region=region), "text")])
    assert {cell.id for cell in half.units} > {control.id, low.units[0].id} and len({c.id for c in half.units}) == 3
    assert [cell.id for cell in ABLATION.units.restore(tmp_path, _manifest(low), low.settings).units] == [
        cell.id for cell in low.units
    ]


def _manifest(study):
    return json.loads(json.dumps({"units": [[cell.id, cell.part] for cell in study.units], **study.frozen()}))


def test_the_control_is_the_unablated_model_in_other_order(low, overrides, tmp_path):
    rows = read_metrics(low)
    assert set(rows["status"]) == {"ok"}
    row = others(rows)[lambda table: table["metric"] == "token_perplexity"].iloc[0]
    used = json.loads(row["settings"])
    # batches of 8 windows are cut into batches of 2
    assert used["batch_tokens"] == 128 and used["order_differs"] is True and used["share_context"] is False
    assert row["target_kind"] == "control" and row["n_matrices"] == 0 and pd.isna(row["svd_method"])
    others_used = [json.loads(text) for text in rows.loc[rows["region_kind"] != "other_order", "settings"]]
    assert all(one["batch_tokens"] == 512 and "order_differs" not in one for one in others_used)
    assert used["attn_implementation"] == "eager"
    # transformers, with the same attention and in the same batches
    task = plan(composed(overrides, tmp_path)).tasks["text"]
    name = next(one.split("=")[1] for one in overrides if one.startswith("model.name"))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="eager")
    nll, n = 0.0, 0
    order = sorted(task.requests, key=lambda one: (len(one.tokens), one.tokens.astype("<i8").tobytes()), reverse=True)
    for start in range(0, len(order), 2):
        pair = order[start : start + 2]
        tokens = torch.zeros((len(pair), len(pair[0].tokens)), dtype=torch.int64)
        for i, one in enumerate(pair):
            tokens[i, : len(one.tokens)] = torch.from_numpy(one.tokens)
        with torch.no_grad():
            logprob = model(input_ids=tokens).logits.float().log_softmax(-1)
        for i, one in enumerate(pair):
            nll -= float(logprob[i, torch.from_numpy(one.positions), torch.from_numpy(one.targets)].double().sum())
            n += len(one.targets)
    assert math.isclose(row["value"], math.exp(nll / n), rel_tol=1e-7)


def test_a_report_marks_what_is_below_the_floor(low, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # room for whole names
    said = []
    page = report(low, write=said.append)
    rows, csv = read_metrics(low), pd.read_csv(low / "report/metrics.csv")
    one = measured(rows)[0]
    assert one.metric == "token_perplexity" and one.control is None
    control = one.other_order
    assert control["delta"] != 0 and control["delta_stderr"] > 0
    assert control["n_clusters"] == 2 and np.isnan(control["delta_freedom"]) and np.isnan(control["p_value"])
    quantile = stats.t.ppf(0.975, 1)
    floor = abs(control["delta"]) + quantile * np.sqrt(2) * control["delta_stderr"]
    assert math.isclose(one.noise_floor, floor)
    noise = one.cells["delta"].abs() < floor
    assert 0 < noise.sum() < len(noise)
    for text in ("\n".join(said), page.read_text()):
        assert f"oise floor {floor:.2g}; smaller deltas are in parentheses" in text
    lines = "\n".join(said).splitlines()
    for row, below in zip(one.cells.itertuples(), noise):
        line = next(line for line in lines if row.target in line and region_words(row.region) in line)
        assert ("(+" in line or "(-" in line) == below
    floors = csv[csv.target_kind == "matrix"].groupby("metric")["noise_floor"].unique()
    assert [len(values) for values in floors] == [1] * len(floors)
    assert math.isclose(floors["token_perplexity"][0], floor)
    assert csv[csv.target_kind != "matrix"]["noise_floor"].isna().all()


def test_a_float32_study_has_no_floor_unless_asked_for(overrides, tmp_path):
    plain = run_settings(composed(overrides, tmp_path / "plain", "model.dtype=float32", "region.controls=[none]"))
    rows = read_metrics(plain)
    assert not len(others(rows)) and not rows["settings"].str.contains("batch").any()
    one = measured(rows)[0]
    assert one.noise_floor is None and one.floor_note is None and one.control is not None
    said = []
    page = report(plain, write=said.append, figures=False)
    assert "floor" not in page.read_text() + "\n".join(said) and "(+" not in "\n".join(said)
    assert pd.read_csv(plain / "report/metrics.csv")["noise_floor"].isna().all()
    asked = run_settings(composed(overrides, tmp_path / "asked", "model.dtype=float32",
                                  "region.controls=[none,other_order]"))
    control, another = measured(rows)[0], measured(read_metrics(asked))[0]
    assert another.control["delta"] == control.control["delta"] == 0
    assert 0 <= another.noise_floor < 1e-4 and set(rows["cell_id"]) < set(read_metrics(asked)["cell_id"])


def test_adaptive_precision_measures_the_floor_on_every_example(overrides, tmp_path):
    adaptive = ["runtime.precision=adaptive", "runtime.adaptive.of_baseline=0.2", "runtime.adaptive.min_examples=8"]
    rows = read_metrics(run_settings(composed(overrides, tmp_path / "study", *adaptive)))
    control, baseline = others(rows), rows[rows["target_kind"] == "baseline"]
    assert set(rows["status"]) == {"ok"} and "adaptive" in set(rows["precision"])
    assert set(control["precision"]) == {"exact"} and (control["n"] == control["n_available"]).all()
    assert list(control["n"]) == list(baseline["n"])
    used = json.loads(control["settings"].iloc[0])
    assert used["order_differs"] and used["batch_tokens"] < 512 and "adaptive" in used


def _out_of_memory_above(tokens, monkeypatch):
    real = Scorer._score_batch

    def limited(self, key, *others):
        if self._batches[key].input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, key, *others)

    monkeypatch.setattr(Scorer, "_score_batch", limited)


@pytest.mark.parametrize("most, expected", [
    # the baseline fits: the control in 128 tokens
    (512, 128),
    # the baseline had 128 tokens, so that the control has not 128 too, but 32, which is one window
    (128, 32),
    # only one window fits at a time: the pairs of windows that would be other batches do not
    (64, 32),
])  # fmt: skip
def test_without_memory_the_control_is_not_in_the_batches_of_the_baseline(
    overrides, tmp_path, monkeypatch, most, expected
):
    _out_of_memory_above(most, monkeypatch)
    more = ["runtime.batch_tokens=256"] if most == 64 else []
    rows = read_metrics(run_settings(composed(overrides, tmp_path / "study", "target.layer_types=[v_proj]", *more)))
    assert set(rows["status"]) == {"ok"}
    used = json.loads(others(rows)["settings"].iloc[0])
    assert used["batch_tokens"] == expected and used["order_differs"] == (most != 64)
    one = measured(rows)[0]
    assert (one.noise_floor is None) == (most == 64)
    if most == 64:
        assert one.floor_note == "noise floor unknown: there is no other order of additions"


def test_processes_that_measure_together_give_the_floor_of_one(overrides, tmp_path):
    study = plan(composed(overrides, tmp_path))
    cells = [cell for cell in study.units if cell.is_baseline or cell.in_other_order]

    models = [open_session(study, Ranks(), progress=False) for _ in range(3)]

    def rows_of(division):
        return [one.rows["metrics"] for one in measure(study, cells, Context(models[division.rank], division))]

    def numbers(rows):
        return [[(row["metric"], row["value"], row.get("delta"), row["status"]) for row in cell] for cell in rows]

    alone = together(1, rows_of)[0]
    for rows in together(3, rows_of):
        assert numbers(rows) == numbers(alone)
    assert [row["status"] for cell in alone for row in cell] == ["ok"] * sum(map(len, alone))


def requests_of(lengths):
    return [Request(np.arange(n) + 7 * i, np.array([n - 1]), np.array([1])) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [[5] * 9, [100, 4, 4, 4], [100, 50, 4, 4], list(range(1, 40)), [8, 8]])
@pytest.mark.parametrize("batch_tokens", [8, 100, 10_000])
def test_other_batches_are_other_ones(lengths, batch_tokens):
    requests, options = requests_of(lengths), ScoringOptions(batch_tokens=batch_tokens)
    usual = pack(requests, batch_tokens).batches
    again = other_options(options, usual, 0.25)
    other = pack(requests, again.batch_tokens).batches
    assert batches_differ(usual, other) and not batches_differ(usual, usual)
    assert not again.reuse and not again.share_context
    alone = all(batch.input_ids.shape[0] == 1 for batch in usual)
    assert len(other) < len(usual) if alone else len(other) > len(usual)


def test_a_single_sequence_has_no_other_order():
    requests = requests_of([30])
    usual = pack(requests, 64).batches
    again = other_options(ScoringOptions(64), usual, 0.25)
    assert not batches_differ(usual, pack(requests, again.batch_tokens).batches)


def control_row(delta, stderr, n, differ=True, **columns):
    columns = {"target": "control", "target_kind": "control", "region": "other order", "region_by": "control",
               "region_kind": "other_order", "block": None, "layer_type": None, **columns}
    return metric_row("other", delta=delta, delta_stderr=stderr, baseline=20.0, n=n, n_clusters=n, value=20 + delta,
                      settings=json.dumps({"order_differs": differ}), **columns)


def test_another_draw_of_the_noise_is_below_the_floor_at_95_percent():
    """Both draws have the same mean, which is not zero where rounding is biased; they are n examples each."""
    rng = np.random.default_rng(0)
    for n, bias in ((8, 0.0), (8, 3.0), (64, 1.0)):
        below = []
        for _ in range(400):
            draws = rng.normal(bias / np.sqrt(n), 1.0, (2, n))
            row = pd.Series(control_row(draws[0].mean(), draws[0].std(ddof=1) / np.sqrt(n), n))
            one = MeasuredMetric("text", "token_perplexity", True, False, None, None, row, pd.DataFrame())
            below.append(one.is_noise(draws[1].mean()))
        assert np.mean(below) > 0.93, (n, bias)


def test_what_a_report_says_of_the_floor(tmp_path):
    rows = study_rows(targets("matrix", 3), sized((0.1,)))

    def noted(row):
        one = measured(pd.DataFrame([*rows, row]))[0]
        return one.noise_floor, one.floor_note

    assert noted(control_row(0.0, 0.0, 9)) == (0.0, "noise floor 0: another order of additions changes nothing")
    # a single cluster has no standard error
    assert noted(control_row(-0.25, None, 1)) == (0.25, "noise floor 0.25; smaller deltas are in parentheses")
    assert noted(control_row(0.0, 0.0, 1, differ=False)) == (
        None, "noise floor unknown: there is no other order of additions")
    failed = {**control_row(0.0, 0.0, 9), "status": "error", "delta": None, "value": None}
    assert noted(failed) == (None, None)
    text = terminal_summary(pd.DataFrame([*rows, control_row(0.0, 0.0, 9)]), width=60)
    assert "(+" not in text and max(map(len, text.splitlines())) <= 60
    write_rows(tmp_path, [*rows, control_row(0.1, 0.05, 9)])
    page = report(tmp_path, write=lambda text: None).read_text()
    assert page.count("in at least 95 % of cases") == 1 and "| (20.00 ± 0.40) |" in page


def test_figures_show_the_floor(tmp_path):
    rows = study_rows(targets("matrix", 3), sized((0.1,)))
    plain, low = (measured(pd.DataFrame(some))[0] for some in (rows, [*rows, control_row(0.1, 0.05, 9)]))
    floor = low.noise_floor
    for one, expected in ((plain, 0), (low, 1)):
        panel = region_figure(one).axes[0]
        bands = [patch for patch in panel.patches if patch.get_label() == "noise floor"]
        assert len(bands) == expected
        if expected:
            box = bands[0].get_extents().transformed(panel.transData.inverted())
            share = floor / low.baseline["value"]  # the figure shows ratios of perplexities
            assert math.isclose(box.y0, 1 - share) and math.isclose(box.y1, 1 + share)
    hatched = _hatched_cells(low, tmp_path / "low.png")
    assert hatched == int((low.cells["delta"].abs() < floor).sum()) and 0 < hatched < len(low.cells)
    assert _hatched_cells(plain, tmp_path / "plain.png") == 0


def _hatched_cells(one, path):
    """The number of cells of the heat maps that are hatched."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heat_map, "save_figure", lambda figure, path: drawn.append(figure))
        heat_map_figure(one, path)
    hatched = [mesh for panel in drawn[0].axes for mesh in panel.collections if mesh.get_hatch()]
    return sum(len(mesh.get_paths()) for mesh in hatched)


def test_the_forecast_counts_the_pass_in_other_order(overrides, tmp_path):
    low, float32 = (plan(composed(overrides, tmp_path, f"model.dtype={dtype}")) for dtype in ("bfloat16", "float32"))
    more = forecast(low).resumed - forecast(float32).resumed
    assert math.isclose(more, low.costs.other["text"]) and not float32.costs.other
    # the same tokens in smaller batches: as much as a pass from the first block, but for padding
    assert 0.5 < more / low.costs.passes["text"][0] < 2
