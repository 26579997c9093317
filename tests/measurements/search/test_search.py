"""`harness search` end to end on trained weights, its statistics against scipy, its choices against plain recounts."""

import itertools
import json
import math
import runpy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import binomtest, spearmanr, ttest_rel

from harness.cli import main
from harness.engine.manifest import read_manifest
from harness.engine.run import Outcome, run
from harness.errors import InputError
from harness.evaluation.requests import ExampleScores
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.statistics import estimate, over_new_draw
from harness.measurements import ABLATION, SEARCH, compose_settings
from harness.measurements.ablation.cell_run import CellRun
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.summary import measured as measured_metrics
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.measurements.search import measure
from harness.measurements.search.report import _table
from harness.measurements.search.tables import TABLES
from harness.measurements.search.verdict import judge
from harness.models.editing import ablated
from harness.models.loading import load
from harness.spectral.decomposition import decompose
from harness.tables.store import read_table
from tests.pages import page_data
from tests.studies import ROOT, quiet

NAMES = ["Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Tim", "Anna"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"prompt": f"Once upon a time, {a} and {b} went to the park. {b} gave a ball to", "answer": a}
            for a, b in itertools.permutations(NAMES, 2)]
    path = tmp_path_factory.mktemp("data") / "ioi.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(assets, prompts, output):
    return [
        "model=pretrained", f"model.name={assets / 'models/stories260K'}", "target=matrix",
        "target.layer_types=[down_proj]", "region=fraction", "region.kinds=[small]", "region.values=[0.5,0.9]",
        "task=[ioi,text]", f"tasks.ioi.data_files={prompts}", "tasks.ioi.selection_share=0.4",
        f"tasks.text.data_files={assets / 'data/tinystories/validation_first_stories.txt'}", "tasks.text.limit=2",
        "tasks.text.window=64", f"output={output}", "search.control_seeds=[0,1]", "runtime.threads=1",
        "runtime.cache_gib=0",
    ]


def table(folder: Path, name: str):
    """A table of a search, as a DataFrame."""
    return read_table(folder, TABLES, name)


def selection(folder: Path) -> Path:
    return folder / "studies" / "selection"


def reported(folder: Path) -> Path:
    return folder / "studies" / "report"


def search(words: list[str], said: list[str] | None = None) -> Outcome:
    return run(SEARCH, compose_settings("search", words), quiet(said))


@pytest.fixture(scope="module")
def done(assets, prompts, tmp_path_factory):
    """A search with everything switched on, through the command line."""
    output = tmp_path_factory.mktemp("search") / "s"
    settings = _settings(assets, prompts, output)
    assert main(["search", "--quiet", *settings, "search.choice=compare", "search.compose=greedy"]) == 0
    return output, settings


pytestmark = pytest.mark.assets


def test_the_parts_do_not_meet_and_the_winner_is_the_best_of_the_grid(done):
    output, _ = done
    ids = {part: set(read_examples(output / "studies" / part, task="ioi").example_id)
           for part in ("selection", "report")}
    assert ids["selection"] and ids["report"] and not ids["selection"] & ids["report"]
    grid = read_metrics(selection(output))
    assert set(grid.task) == {"ioi"}
    grid = grid[~grid.target_kind.isin(["baseline", "control"])]
    assert grid.cell_id.nunique() == 10  # 5 blocks x 2 regions
    verdict = table(output, "verdict")
    assert list(verdict.metric) == ["accuracy", "logprob"]
    logprob = grid[grid.metric == "logprob"].set_index(["target", "region"])
    row = verdict[verdict.metric == "logprob"].iloc[0]
    assert (row.target, row.region) == logprob.delta.idxmax()
    assert row.selection_p_holm >= row.selection_p and row.n_tried == 10
    accuracy = grid[grid.metric == "accuracy"].set_index(["target", "region"])
    best = accuracy.index[accuracy.delta == accuracy.delta.max()]
    row = verdict[verdict.metric == "accuracy"].iloc[0]
    assert (row.target, row.region) == logprob.loc[best].delta.idxmax()  # ties fall to the loss, as LASER does


def test_the_verdict_is_what_scipy_says_of_the_reported_examples(done):
    output, _ = done
    metrics, examples = read_metrics(reported(output)), read_examples(reported(output))
    verdict, beside = table(output, "verdict"), table(output, "beside")

    def scores(target, region, metric):
        inside = (metrics.target == target) & (metrics.region == region) & (metrics.task == "ioi")
        cell = metrics[inside].cell_id.iloc[0]
        of_cell = examples[(examples.cell_id == cell) & (examples.metric == metric)]
        return of_cell.set_index("example_id").score

    for row in verdict.itertuples():
        best, plain = scores(row.target, row.region, row.metric), scores("baseline", "none", row.metric)
        change = best - plain[best.index]
        if row.metric == "accuracy":  # McNemar's exact test
            gained, changed = int((change > 0).sum()), int((change != 0).sum())
            assert row.p_value == pytest.approx(binomtest(gained, changed).pvalue if changed else 1.0, rel=1e-9)
            assert row.delta_low < row.delta < row.delta_high
            assert (row.delta_low > 0 or row.delta_high < 0) == (row.p_value < 0.05)
        else:
            test = ttest_rel(best, plain[best.index])
            interval = test.confidence_interval(0.95)
            assert row.p_value == pytest.approx(test.pvalue, rel=1e-9)
            assert (row.delta_low, row.delta_high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        for control in ("random", "energy_matched", "random_disjoint", "energy_matched_disjoint"):
            label = control.replace("_disjoint", " outside")
            if control.endswith("disjoint") and getattr(row, f"{control}_draws") != 2:
                # 90 % of the values cannot be drawn from the other 10 %
                assert row.region == "small 0.9" and np.isnan(getattr(row, f"over_{control}"))
                continue
            drawn = [scores(row.target, f"{label} ({row.region}) seed {seed}", row.metric)[best.index]
                     for seed in (0, 1)]
            means = [draw.mean() for draw in drawn]
            assert getattr(row, f"over_{control}") == pytest.approx(best.mean() - np.mean(means), abs=1e-12)
            assert getattr(row, f"{control}_spread") == pytest.approx(np.std(means, ddof=1), abs=1e-12)
            of_best, *of_draws = (ExampleScores(one.to_numpy(), np.ones(len(one))) for one in (best, *drawn))
            expected = over_new_draw(of_best, of_draws).p_value
            assert getattr(row, f"over_{control}_p") == pytest.approx(expected, rel=1e-9)
        of_text = metrics[(metrics.target == row.target) & (metrics.region == row.region) & (metrics.task == "text")]
        price = of_text[of_text.metric == "token_perplexity"].iloc[0]
        (paid,) = beside[beside.metric == row.metric].itertuples()
        assert (paid.task, paid.beside_task, paid.beside_metric) == ("ioi", "text", "token_perplexity")
        assert (paid.baseline, paid.value, paid.delta) == (price.baseline, price.value, price.delta)
        assert price.n_clusters == 2 and np.isnan(price.p_value) and np.isnan(paid.p_value)  # a short text
        improved = row.delta > 0 and row.p_holm < 0.05
        assert (row.verdict == "no") == (not improved)
        assert (row.verdict == "yes") == (improved and row.beats_controls)
    assert len(beside) == len(verdict)


def test_the_page_has_every_table_and_the_report_is_made_from_tables_alone(done, tmp_path, capsys):
    output, _ = done
    assert not (output / "report").exists()
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    shown = capsys.readouterr().out.splitlines()
    verdict = table(output, "verdict")
    rows = [line for line in shown if line.startswith("| ioi |")]
    assert [row.rstrip(" |").rpartition(" | ")[2] for row in rows] == list(verdict.verdict)
    page = (output / "report" / "search.md").read_text()
    content = page_data(output / "report" / "index.html")
    assert content["tables"][0]["n"] == len(verdict)
    assert content["charts"][0]["views"][0]["traces"][0]["name"] == "best cell"
    assert (output / "report" / "grid.png").is_file() and "](grid.png)" in page
    last = [line for line in shown if " fresh examples, controls random " in line]
    assert [line.rpartition(": ")[2] for line in last] == list(verdict.verdict)
    assert all(line.startswith(f"ioi, {row.metric}: {row.target}, bottom ") for line, row in zip(
        last, verdict.itertuples()))
    for line in (*last, *page.splitlines()):
        assert not line.startswith("| task | metric | cell") or line.count("|") == 9
    sections = page.split("\n## ")[1:]
    assert [section.count("\n| ") for section in sections] == [
        1 + len(table(output, name)) for name in ("verdict", "beside", "comparison", "composition")
    ]
    for name in ("verdict", "beside", "comparison", "composition", "predictions"):
        lines = (output / "report" / f"{name}.csv").read_text().splitlines()
        assert len(lines) == 1 + len(table(output, name)) and "stage_id" not in lines[0]
    for part in ("manifest.json", "studies", *TABLES.names()):
        (tmp_path / part).symlink_to(output / part)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "search.md").read_text() == page


def test_the_figures_of_the_experiment(done, tmp_path):
    """experiments/laser/figures.py on the folder of a search: every table as CSV, every figure."""
    output, _ = done
    script = runpy.run_path(str(ROOT / "experiments" / "laser" / "figures.py"))
    script["main"](str(output), f"{tmp_path}/ioi")
    assert {path.name for path in tmp_path.iterdir()} == {
        "ioi-grid.csv", "ioi-grid.png", "ioi-gradient.png",
        *(f"ioi-{name}.csv" for name in ("verdict", "beside", "comparison", "composition")),
    }
    grid = pandas.read_csv(tmp_path / "ioi-grid.csv")
    assert len(grid) == 10 * 2 and set(grid.metric) == {"accuracy", "logprob"}
    verdict = pandas.read_csv(tmp_path / "ioi-verdict.csv")
    np.testing.assert_allclose(verdict.delta, table(output, "verdict").delta, rtol=1e-5)
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 10_000


def failing_where(monkeypatch, fails):
    """Cells for which `fails(cell)` holds raise instead of being measured."""
    real = CellRun._measure

    def measure_cell(cell_run, cell, *arguments):
        if fails(cell):
            raise ValueError("a bug in this cell")
        return real(cell_run, cell, *arguments)

    monkeypatch.setattr(CellRun, "_measure", measure_cell)


@pytest.mark.parametrize("draws", [1, 0])
def test_controls_that_fail_do_not_take_the_verdict_with_them(assets, prompts, tmp_path, monkeypatch, draws):
    failing_where(monkeypatch, lambda cell: cell.ablation.region.label.startswith("random (")
                  and cell.ablation.region.seed >= draws)
    outcome = search(_settings(assets, prompts, tmp_path / "s"))
    folder, verdict = outcome.folder, table(outcome.folder, "verdict")
    assert (outcome.done, outcome.failed) == (1, 2)  # the stages report and verdict read cells that failed
    stages = table(folder, "stages").set_index("stage")
    assert stages.status.to_dict() == {"selection": "ok", "report": "error", "verdict": "error"}
    assert stages.n_failed["report"] == (2 - draws) * len(set(zip(verdict.target, verdict.region)))
    n_failed = f"{stages.n_failed['report']:.0f} cells behind it failed"
    assert stages.error["verdict"] == f"{n_failed} (harness status {folder} --failed); run the search again"
    assert set(verdict.random_draws) == {draws} and set(verdict.energy_matched_draws) == {2}
    assert set(verdict.verdict) == {"failed"}  # two draws are the fewest that differ by a known amount
    monkeypatch.undo()
    again = search(_settings(assets, prompts, tmp_path / "s"))
    assert again == Outcome(folder, 3, 0)
    complete = table(folder, "verdict")
    assert set(complete.random_draws) == {2} and "failed" not in set(complete.verdict)
    assert (complete.delta == verdict.delta).all()


@pytest.mark.parametrize("failing", [False, True])
def test_in_low_precision_the_verdict_reads_the_noise_floor(assets, prompts, tmp_path, monkeypatch, failing):
    """The floor is that of the report study; if it could not be measured, there is no verdict."""
    if failing:
        failing_where(monkeypatch, lambda cell: cell.in_other_order and cell.task == "ioi")
    words = [*_settings(assets, prompts, tmp_path / "s"), "model.dtype=bfloat16", "region.values=[0.9]"]
    folder = search(words).folder
    verdict, beside = table(folder, "verdict"), table(folder, "beside")
    reports = measured_metrics(read_metrics(reported(folder)))
    floors = {(one.task, one.metric): one.noise_floor for one in reports}
    assert list(beside.noise_floor) == [floors["text", name] for name in beside.beside_metric]
    assert floors["text", "token_perplexity"] > 0
    if failing:
        assert set(verdict.verdict) == {"failed"} and verdict.noise_floor.isna().all()
        return
    assert [floors["ioi", name] for name in verdict.metric] == list(verdict.noise_floor)
    again = verdict.to_dict("records")
    judge(again)
    assert [row["verdict"] for row in again] == list(verdict.verdict)
    small = [{**row, "delta": 0.9 * row["noise_floor"], "higher_is_better": True, "p_value": 1e-9} for row in again]
    judge(small)
    assert {row["verdict"] for row in small} <= {"below the noise floor"}


def test_the_page_puts_what_is_below_the_noise_floor_in_parentheses():
    rows = pandas.DataFrame({"delta": [0.1, -0.1, 0.3, np.nan], "noise_floor": [0.2, 0.2, 0.2, np.nan]})
    lines = [line.split("|")[1].strip() for line in _table(rows).splitlines()[2:]]
    assert lines == ["(0.1)", "(-0.1)", "0.3", ""]
    assert "(" not in _table(rows.assign(noise_floor=np.nan))


@pytest.mark.parametrize(("changed", "verdict"), [
    ({}, "yes"), ({"noise_floor": 0.3}, "below the noise floor"), ({"noise_floor": 0.2}, "yes"),
    ({"noise_floor": math.nan}, "yes"), ({"noise_floor": 0.3, "p_value": 0.03}, "no"),
    ({"noise_floor": 0.3, "beats_controls": False}, "below the noise floor"),
    ({"beats_controls": False}, "no more than its controls"), ({"beats_controls": None}, "failed"),
    ({"delta": -0.2}, "no"), ({"delta": -0.2, "higher_is_better": False}, "yes"),
    ({"delta": -0.2, "higher_is_better": False, "noise_floor": 0.25}, "below the noise floor"),
    ({"p_value": math.nan}, "failed"),
])  # fmt: skip
def test_the_rule_of_the_verdict(changed, verdict):
    row = {"delta": 0.2, "higher_is_better": True, "p_value": 0.01, "beats_controls": True, "noise_floor": None}
    rows = [{**row, **changed}, {**row, "p_value": 0.5}]
    judge(rows)
    assert [one["verdict"] for one in rows] == [verdict, "no"]


def test_the_best_cell_may_be_one_that_failed_before(assets, prompts, tmp_path, monkeypatch):
    undisturbed = search(_settings(assets, prompts, tmp_path / "undisturbed")).folder
    best = set(table(undisturbed, "verdict").target)
    failing_where(monkeypatch, lambda cell: cell.ablation.target.label in best)
    folder = search(_settings(assets, prompts, tmp_path / "s")).folder
    assert not best & set(table(folder, "verdict").target)
    earlier = read_manifest(reported(folder)).id
    monkeypatch.undo()
    assert search(_settings(assets, prompts, tmp_path / "s")).failed == 0
    assert table(folder, "verdict").drop(columns="stage_id").equals(table(undisturbed, "verdict").drop(
        columns="stage_id"))
    assert read_manifest(reported(folder)).id == read_manifest(reported(undisturbed)).id != earlier
    assert read_manifest(folder / "studies" / f"report-{earlier}").id == earlier


def test_a_best_cell_that_fails_on_the_report_part_is_said_to_have_failed(assets, prompts, tmp_path, monkeypatch):
    real, reporting = measure.winners, []
    monkeypatch.setattr(measure, "winners", lambda *arguments: reporting.append(1) or real(*arguments))
    failing_where(monkeypatch, lambda cell: reporting and cell.task == "ioi" and cell.ablation.region.kind == "small")
    verdict = table(search(_settings(assets, prompts, tmp_path / "s")).folder, "verdict")
    assert list(verdict.verdict) == ["failed", "failed"] and verdict.selection_delta.notna().all()


def test_a_grid_of_which_nothing_could_be_measured(assets, prompts, tmp_path, monkeypatch):
    failing_where(monkeypatch, lambda cell: cell.ablation.region.kind == "small")
    with pytest.raises(InputError, match="tasks.ioi: no cell of the grid could be measured; harness status .*--failed"):
        search(_settings(assets, prompts, tmp_path / "s"))


def test_predictions_cover_the_grid_and_the_comparison_is_spearmans(done):
    output, _ = done
    predictions = table(output, "predictions")
    assert len(predictions) == 10 and set(predictions.metric) == {"logprob"}  # accuracy has no derivative
    grid = read_metrics(selection(output))
    comparison = table(output, "comparison").set_index(["measured", "cells"])
    assert len(comparison) == 2 * 4  # two metrics; all, two regions, targets
    for measured in ("accuracy", "logprob"):
        both = grid[grid.metric == measured].merge(predictions, on=["target", "region"])
        mild = both[both.region == "small 0.5"].sort_values("predicted_delta", ascending=False)
        for cells, part in (("all", both), ("small 0.5", mild), ("small 0.9", both[both.region == "small 0.9"])):
            expected = spearmanr(part.predicted_delta, part.delta).statistic
            assert comparison.loc[(measured, cells), "spearman"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
        first = both.sort_values("predicted_delta", ascending=False).delta.iloc[0]
        assert comparison.loc[(measured, "all"), "regret_0.1"] == pytest.approx(both.delta.max() - first, abs=1e-12)
        # the target whose mildest region is predicted best, measured at both regions
        chosen = both[both.target == mild.target.iloc[0]].delta.max()
        regret = comparison.loc[(measured, "targets"), "regret_0.2"]
        assert regret == pytest.approx(both.delta.max() - chosen, abs=1e-12)


def test_composition_keeps_what_it_accepts_and_nothing_else(done):
    """The accepted edits, applied again by hand, give the composition's numbers; the rejected ones left no trace."""
    output, words = done
    steps = table(output, "composition")
    study = study_settings(words, part="report")
    for metric, rows in steps.groupby("metric"):
        walked = rows[rows.step != "report"]
        assert list(walked.step.astype(int)) == sorted(walked.step.astype(int), reverse=True)
        best_so_far = walked.baseline.iloc[0] if len(walked) else None
        for row in walked.itertuples():
            assert row.accepted == (row.value > best_so_far + 1e-12)
            best_so_far = row.value if row.accepted else best_so_far
        plan = ABLATION.units.plan(study)
        loaded = load(study.model, plan.description, plan.prepared.tokenizer)
        before = {m.name: m.read(loaded.model) for m in loaded.matrices}
        by_label = {(c.ablation.target.label, c.ablation.region.label): c.ablation for c in plan.units}
        task = plan.tasks["ioi"]
        with ExitStack() as stack:
            for row in walked[walked.accepted.astype(bool)].itertuples():
                stack.enter_context(ablated(loaded, by_label[row.target, row.region],
                                            lambda m, before=before: decompose(before[m.name])))
            scores = task.measure(Scorer(loaded, {"ioi": task}, ScoringOptions(reuse=False)).score("ioi"))[metric]
        final = rows[rows.step == "report"].iloc[0]
        assert final.value == pytest.approx(estimate(scores).value, rel=1e-6)
        assert final.n == len(task.example_ids) and final.accepted == bool(walked.accepted.any())
        for matrix in loaded.matrices:
            assert torch.equal(matrix.read(loaded.model), before[matrix.name])


def study_settings(words: list[str], part: str | None = None) -> StudySettings:
    """The grid of a search as the settings of a study of its searched task alone."""
    own = [word for word in words if not word.startswith(("search.", "output=", "task=", "tasks.text."))]
    study = compose_settings("ablation", [*own, "task=ioi"])
    return replace(study, tasks={"ioi": replace(study.tasks["ioi"], part=part)})


def test_a_finished_search_measures_nothing_again(done):
    output, words = done
    words = [*words, "search.choice=compare", "search.compose=greedy"]
    parts = [*output.rglob("*.parquet")]
    stamps = {file: file.stat().st_mtime_ns for file in parts}
    assert {file.parent.name for file in parts} >= {"metrics", "stages", "verdict", "predictions", "composition"}
    said = []
    outcome = search(words, said)
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*.parquet")} == stamps
    assert len(said) == 1 and ": 6 units, 6 done, in " in said[0] and outcome == Outcome(output, 6, 0)
    with pytest.raises(InputError, match="holds another search .*; tasks.ioi.limit is None there, 3 here"):
        search([*words, "tasks.ioi.limit=3"], said)


def test_a_lost_row_of_a_study_is_measured_again_and_the_tables_are_made_anew(assets, prompts, tmp_path):
    words = [*_settings(assets, prompts, tmp_path / "s"), "search.choice=compare"]
    folder = search(words).folder
    before = {name: table(folder, name) for name in TABLES.names()}
    lost = sorted((selection(folder) / "metrics").glob("*.parquet"))[2]
    lost.unlink()
    said = []
    assert search(words, said) == Outcome(folder, 5, 0)
    assert lost.exists() and ": 5 units, 0 done, in " in said[0]
    for name in TABLES.names()[1:]:
        assert table(folder, name).equals(before[name]), name
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("studies/*/metrics/*.parquet")}
    (folder / "stages" / f"{before['stages'].stage_id.iloc[0]}.parquet").unlink()
    said.clear()
    assert search(words, said) == Outcome(folder, 5, 0) and ": 5 units, 4 done, in " in said[0]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("studies/*/metrics/*.parquet")} == kept


def test_both_parts_are_studies_like_any_other(done, capsys):
    output, _ = done
    for part in (selection(output), reported(output)):
        assert main(["status", str(part)]) == 0
        shown = capsys.readouterr().out
        assert "failed 0  missing 0" in shown
    assert main(["status", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("search ") and lines[1] == "units 6  done 6  failed 0  missing 0"
    assert [line for line in lines if line.startswith(str(output))] == [str(reported(output)), str(selection(output))]
    assert sum(line.startswith("ablation ") for line in lines) == 2


def test_gradient_choice_measures_its_favourites_only(assets, prompts, tmp_path):
    settings = [*_settings(assets, prompts, tmp_path / "s"), "search.choice=gradient", "search.keep=0.2",
                "search.metrics=[logprob]"]
    assert main(["search", "--quiet", *settings]) == 0
    predictions = table(tmp_path / "s", "predictions")
    mild = predictions[predictions.region == "small 0.5"]
    favourite = mild.loc[mild.predicted_improvement.idxmax(), "target"]
    grid = read_metrics(selection(tmp_path / "s"))
    grid = grid[grid.target_kind == "matrix"]
    assert set(zip(grid.target, grid.region)) == {(favourite, "small 0.5"), (favourite, "small 0.9")}
    assert table(tmp_path / "s", "verdict").n_tried.tolist() == [2]


def test_components_are_chosen_by_gradients_and_composed(assets, prompts, tmp_path):
    """Of all components of two matrices the best tenth is measured; those accepted together are what NumPy removes."""
    output = tmp_path / "s"
    own = [word for word in _settings(assets, prompts, output) if not word.startswith(("region", "task"))]
    words = [*own, "task=ioi", f"tasks.ioi.data_files={prompts}", "tasks.ioi.selection_share=0.4", "region=component",
             "region.all=true", "target.blocks=[3,4]", "search.choice=gradient", "search.keep=0.1",
             "search.metrics=[logit_difference]", "search.compose=greedy"]
    assert main(["search", "--quiet", *words]) == 0
    predictions, grid = table(output, "predictions"), read_metrics(selection(output))
    best = predictions.sort_values("predicted_improvement", ascending=False, kind="stable").head(13)  # of 2 x 64
    assert set(zip(grid.target, grid.region)) >= set(zip(best.target, best.region))
    (verdict,) = table(output, "verdict").itertuples()
    assert verdict.n_tried == 13 and verdict.rotated_draws == 2 and verdict.random_disjoint_draws == 2
    steps = table(output, "composition")
    walked, last = steps[steps.step != "report"], steps[steps.step == "report"].iloc[0]
    kept = [f"{row.target}:{row.region.split()[1]}" for row in walked[walked.accepted.astype(bool)].itertuples()]
    assert last.region == ",".join(kept) and len(kept) > 1
    study = ABLATION.units.plan(study_settings(words, part="report"))
    loaded = load(study.settings.model, study.description, study.prepared.tokenizer)
    for name in {one.partition(":")[0] for one in kept}:
        matrix = next(one for one in loaded.matrices if one.name == name)
        u, s, vt = np.linalg.svd(matrix.read(loaded.model).double().numpy(), full_matrices=False)
        s[[int(one.partition(":")[2]) for one in kept if one.startswith(f"{name}:")]] = 0
        matrix.write(loaded.model, torch.from_numpy((u * s) @ vt).float())
    task = study.tasks["ioi"]
    scores = task.measure(Scorer(loaded, {"ioi": task}, ScoringOptions(reuse=False)).score("ioi"))["logit_difference"]
    assert last.value == pytest.approx(estimate(scores).value, rel=1e-4)


def test_the_cells_of_a_search_are_those_of_a_run(assets, prompts, tmp_path):
    """Same cell ids, so that rows can be reused and compared between the two commands."""
    words = _settings(assets, prompts, tmp_path / "s")
    study = ABLATION.units.plan(study_settings(words))
    pairs = [(cell.ablation, cell.task) for cell in study.units if not cell.is_baseline]
    assert {c.id for c in study.with_cells(pairs).units} == {c.id for c in study.units}
    few = study.with_cells(pairs[:2])
    assert len(few.units) == 3 and few.id != study.id
    selected = ABLATION.units.plan(study_settings(words, part="selection"))
    assert SEARCH.units.plan(compose_settings("search", words)).selection.units == selected.units


def test_bad_searches_are_one_line(assets, prompts, tmp_path, capsys):
    settings = _settings(assets, prompts, tmp_path / "s")
    for extra, words in (
        (["search.choice=best"], "search.choice: 'best' is wrong; use one of exhaustive, gradient, compare"),
        (["search.keep=0"], "search.keep"),
        (["search.keep=0.2"], "search.keep: 0.2 is wrong; only search.choice=gradient reads it"),
        (["search.gradient_examples=7"], "search.gradient_examples: 7 is wrong; only search.choice=gradient or"),
        (["search.gradient_examples=0"], "search.gradient_examples"),
        (["search.report_limit=1"], "search.report_limit"),
        (["search.control_seeds=[]"], "search.control_seeds"),
        (["search.compose=all"], "search.compose"),
        (["search.metrics=[]"], "search.metrics"),
        (["tasks.ioi.part=report"], "tasks.ioi.part: leave it unset"),
        (["runtime.examples=false"], "runtime.examples"),
        (["search.metrics=[bleu]"], "search.metrics: task ioi has none of bleu; it has accuracy, "),
    ):
        assert main(["search", "--quiet", *settings, *extra]) == 2, extra
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    config = compose_settings("search", settings)
    assert (config.searched(), config.beside()) == (["ioi"], ["text"])
    with pytest.raises(InputError, match="none of text can be split into a selection and a report part"):
        compose_settings("search", [word for word in settings if "ioi" not in word] + ["task=text"])
    with pytest.raises(InputError, match="search.compose: 'greedy' is wrong; it goes block by block"):
        search([*settings, "target=type", "search.compose=greedy", f"output={tmp_path / 't'}"])
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("name", "tasks"), [
    ("laser", {"ioi": "ioi/ioi", "factual": "counterfact/known_1000", "wikitext": "wikitext-2-raw/validation"}),
    ("laser_coarse", {"blimp": "blimp/passive_1", "lambada": "lambada/test", "wikitext": "wikitext-2-raw/validation",
                      "epistemic_reasoning": "bigbench/epistemic_reasoning", "qa_wikidata": "bigbench/qa_wikidata"}),
])
def test_the_experiments_run(assets, tmp_path, name, tasks):
    settings = [f"experiment={name}", f"model.name={assets / 'models/stories260K'}", "target.blocks=[4]",
                "target.layer_types=[down_proj]", "region.keep=[0.1]", "search.report_limit=4",
                "search.control_seeds=[0,1]", "tasks.wikitext.window=64", f"output={tmp_path / 's'}"]
    for task, file in tasks.items():
        settings += [f"tasks.{task}.data_files={assets / 'data' / file}.jsonl", f"tasks.{task}.limit=4"]
    assert main(["search", "--quiet", *settings]) == 0
    verdict = table(tmp_path / "s", "verdict")
    assert set(verdict.task) == set(tasks) - {"wikitext"} and (verdict.n == 4).all()
    beside = table(tmp_path / "s", "beside")
    assert beside.groupby(["task", "metric"]).ngroups == len(beside) == len(verdict)
    assert set(beside.beside_metric) == {"token_perplexity"} and beside.value.notna().all()


@pytest.mark.parametrize("name", [
    "laser_gptj", "laser_llama2", "laser_roberta", "laser_pythia", "laser_stories", "laser_stories_blimp",
])
def test_the_published_targets_compose(name, capsys):
    given = ["model.name=some/model"] if name.startswith("laser_stories") else []
    assert main(["plan", f"experiment={name}", "--show-config", *given]) == 0
    assert "layer_types" in capsys.readouterr().out
