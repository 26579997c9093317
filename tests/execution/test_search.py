"""`harness search` end to end on trained weights, its statistics against scipy, its choices against plain recounts."""

import itertools
import json
import sys

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import spearmanr, ttest_rel

from harness.cli import main
from harness.compose import compose_config
from harness.errors import InputError
from harness.execution import runner
from harness.execution.ablating import ablated
from harness.execution.planned import plan
from harness.execution.search import search, split_tasks, with_cells
from harness.models.loading import load
from harness.spectral.decomposition import decompose
from harness.tables.store import read_examples, read_metrics

search_module = sys.modules[search.__module__]
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
    ids = {part: set(read_examples(output / part, task="ioi").example_id) for part in ("selection", "report")}
    assert ids["selection"] and ids["report"] and not ids["selection"] & ids["report"]
    grid = read_metrics(output / "selection")
    assert set(grid.task) == {"ioi"}
    grid = grid[~grid.target_kind.isin(["baseline", "control"])]
    assert grid.cell_id.nunique() == 10  # 5 blocks x 2 regions
    verdict = pandas.read_parquet(output / "verdict.parquet")
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
    metrics, examples = read_metrics(output / "report"), read_examples(output / "report")
    verdict = pandas.read_parquet(output / "verdict.parquet")

    def scores(target, region, metric):
        inside = (metrics.target == target) & (metrics.region == region) & (metrics.task == "ioi")
        cell = metrics[inside].cell_id.iloc[0]
        of_cell = examples[(examples.cell_id == cell) & (examples.metric == metric)]
        return of_cell.set_index("example_id").score

    for row in verdict.itertuples():
        best, plain = scores(row.target, row.region, row.metric), scores("baseline", "none", row.metric)
        test = ttest_rel(best, plain[best.index])
        assert row.p_value == pytest.approx(test.pvalue, rel=1e-9) or best.equals(plain[best.index])
        interval = test.confidence_interval(0.95)
        assert (row.delta_low, row.delta_high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        for control, label in (("random", "random"), ("energy_matched", "energy_matched")):
            drawn = [scores(row.target, f"{label} ({row.region}) seed {seed}", row.metric)[best.index]
                     for seed in (0, 1)]
            mean = np.mean(drawn, axis=0)
            over = getattr(row, f"over_{control}")
            assert over == pytest.approx((best - mean).mean(), abs=1e-12)
            if over:
                assert getattr(row, f"over_{control}_p") == pytest.approx(ttest_rel(best, mean).pvalue, rel=1e-9)
        beside = metrics[(metrics.target == row.target) & (metrics.region == row.region) & (metrics.task == "text")]
        assert row.text_token_perplexity_delta == beside[beside.metric == "token_perplexity"].delta.iloc[0]
        improved = row.delta > 0 and row.p_holm < 0.05
        assert (row.verdict == "no") == (not improved)
        assert (row.verdict == "yes") == (improved and row.beats_controls)
    assert (output / "verdict.md").read_text().count("\n") == 2 + len(verdict)


def failing_where(monkeypatch, fails):
    """Cells for which `fails(cell)` holds raise instead of being measured."""
    real = runner.measure

    def measure(cell, *arguments):
        if fails(cell):
            raise ValueError("a bug in this cell")
        return real(cell, *arguments)

    monkeypatch.setattr(runner, "measure", measure)


@pytest.mark.parametrize(("fails", "draws", "verdicts"), [
    (lambda cell: cell.ablation.region.kind == "random" and cell.ablation.region.seed == 1, 1, {"yes", "no"}),
    (lambda cell: cell.ablation.region.kind == "random", 0, {"failed"}),
])
def test_controls_that_fail_do_not_take_the_verdict_with_them(assets, prompts, tmp_path, monkeypatch, fails, draws,
                                                              verdicts):
    failing_where(monkeypatch, fails)
    folder = search(compose_config(_settings(assets, prompts, tmp_path / "s")), progress=False, report_to=print)
    verdict = pandas.read_parquet(folder / "verdict.parquet")
    assert set(verdict.random_draws) == {draws} and set(verdict.energy_matched_draws) == {2}
    assert set(verdict.verdict) <= {*verdicts, "no more than its controls"} - ({"yes"} if draws == 0 else set())
    assert ("failed" in set(verdict.verdict)) == (draws == 0)
    monkeypatch.undo()
    again = search(compose_config(_settings(assets, prompts, tmp_path / "s")), progress=False, report_to=print)
    complete = pandas.read_parquet(again / "verdict.parquet")
    assert set(complete.random_draws) == {2} and "failed" not in set(complete.verdict)
    assert (complete.delta == verdict.delta).all()


def test_a_best_cell_that_fails_on_the_report_part_is_said_to_have_failed(assets, prompts, tmp_path, monkeypatch):
    real, reporting = search_module.winners, []
    monkeypatch.setattr(search_module, "winners", lambda *arguments: reporting.append(1) or real(*arguments))
    failing_where(monkeypatch, lambda cell: reporting and cell.task == "ioi" and cell.ablation.region.kind == "small")
    folder = search(compose_config(_settings(assets, prompts, tmp_path / "s")), progress=False, report_to=print)
    verdict = pandas.read_parquet(folder / "verdict.parquet")
    assert list(verdict.verdict) == ["failed", "failed"] and verdict.selection_delta.notna().all()


def test_a_grid_of_which_nothing_could_be_measured(assets, prompts, tmp_path, monkeypatch):
    failing_where(monkeypatch, lambda cell: cell.ablation.region.kind == "small")
    with pytest.raises(InputError, match="tasks.ioi: no cell of the grid could be measured; harness status .*--failed"):
        search(compose_config(_settings(assets, prompts, tmp_path / "s")), progress=False, report_to=print)


def test_predictions_cover_the_grid_and_the_comparison_is_spearmans(done):
    output, _ = done
    predictions = pandas.read_parquet(output / "predictions.parquet")
    assert len(predictions) == 10 and set(predictions.metric) == {"logprob"}  # accuracy has no derivative
    grid = read_metrics(output / "selection")
    comparison = pandas.read_parquet(output / "comparison.parquet").set_index(["measured", "cells"])
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
    output, settings = done
    steps = pandas.read_parquet(output / "composition.parquet")
    config = compose_config(settings)
    config.tasks = {"ioi": config.tasks["ioi"]}
    from dataclasses import replace

    for metric, rows in steps.groupby("metric"):
        walked = rows[rows.step != "report"]
        assert list(walked.step.astype(int)) == sorted(walked.step.astype(int), reverse=True)
        best_so_far = walked.baseline.iloc[0] if len(walked) else None
        for row in walked.itertuples():
            assert row.accepted == (row.value > best_so_far + 1e-12)
            best_so_far = row.value if row.accepted else best_so_far
        config.tasks["ioi"] = replace(config.tasks["ioi"], part="report")
        planned = plan(replace(config, output=None))
        loaded = load(config.model, planned.description, planned.tokenizer)
        before = {m.name: m.read(loaded.model) for m in loaded.matrices}
        by_label = {(c.ablation.target.label, c.ablation.region.label): c.ablation for c in planned.study.cells}
        from contextlib import ExitStack

        from harness.evaluation.scoring import Scorer
        from harness.evaluation.statistics import estimate

        task = planned.tasks["ioi"]
        with ExitStack() as stack:
            for row in walked[walked.accepted].itertuples():
                stack.enter_context(ablated(loaded, by_label[row.target, row.region],
                                            lambda m, before=before: decompose(before[m.name])))
            scores = task.measure(Scorer(loaded, {"ioi": task}, reuse=False).score("ioi"))[metric]
        final = rows[rows.step == "report"].iloc[0]
        assert final.value == pytest.approx(estimate(scores).value, rel=1e-6)
        assert final.n == len(task.example_ids) and final.accepted == bool(walked.accepted.any())
        for matrix in loaded.matrices:
            assert torch.equal(matrix.read(loaded.model), before[matrix.name])


def test_a_finished_search_measures_nothing_again(done):
    output, settings = done
    settings = [*settings, "search.choice=compare", "search.compose=greedy"]
    files = [*output.glob("*/metrics/*"), output / "predictions.parquet", output / "composition.parquet"]
    stamps = [file.stat().st_mtime_ns for file in files]
    said = []
    search(compose_config(settings), progress=False, report_to=said.append)
    assert len(list(output.glob("*/metrics/*"))) == len(files) - 2
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert "12 cells, 12 done" in said[0]
    with pytest.raises(InputError, match="holds another study"):
        search(compose_config([*settings, "tasks.ioi.limit=3"]), progress=False, report_to=said.append)


def test_both_parts_are_studies_like_any_other(done, capsys):
    output, _ = done
    for part in ("selection", "report"):
        assert main(["status", str(output / part)]) == 0
        shown = capsys.readouterr().out
        assert "failed 0  missing 0" in shown


def test_gradient_choice_measures_its_favourites_only(assets, prompts, tmp_path):
    settings = [*_settings(assets, prompts, tmp_path / "s"), "search.choice=gradient", "search.keep=0.2",
                "search.metrics=[logprob]"]
    assert main(["search", "--quiet", *settings]) == 0
    predictions = pandas.read_parquet(tmp_path / "s/predictions.parquet")
    mild = predictions[predictions.region == "small 0.5"]
    favourite = mild.loc[mild.predicted_improvement.idxmax(), "target"]
    grid = read_metrics(tmp_path / "s/selection")
    grid = grid[grid.target_kind == "matrix"]
    assert set(zip(grid.target, grid.region)) == {(favourite, "small 0.5"), (favourite, "small 0.9")}
    assert pandas.read_parquet(tmp_path / "s/verdict.parquet").n_tried.tolist() == [2]


def test_the_cells_of_a_search_are_those_of_a_run(assets, prompts, tmp_path):
    """Same cell ids, so that rows can be reused and compared between the two commands."""
    config = compose_config(_settings(assets, prompts, tmp_path / "s"))
    config.tasks = {"ioi": config.tasks["ioi"]}
    planned = plan(config)
    pairs = [(cell.ablation, cell.task) for cell in planned.study.cells if not cell.is_baseline]
    assert {c.cell_id for c in with_cells(planned, pairs).study.cells} == {c.cell_id for c in planned.study.cells}
    few = with_cells(planned, pairs[:2])
    assert len(few.study.cells) == 3 and few.study.study_id != planned.study.study_id


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
    config = compose_config(settings)
    assert split_tasks(config) == (["ioi"], ["text"])
    del config.tasks["ioi"]
    with pytest.raises(InputError, match="none of text can be split into a selection and a report part"):
        split_tasks(config)
    with pytest.raises(InputError, match="search.compose: greedy goes block by block"):
        search(compose_config([*settings, "target=type", "search.compose=greedy", f"output={tmp_path / 't'}"]),
               progress=False, report_to=lambda line: None)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("name", "tasks"), [
    ("laser", {"ioi": "ioi/ioi", "factual": "counterfact/known_1000", "wikitext": "wikitext-2-raw/validation"}),
    ("laser_coarse", {"blimp": "blimp/passive_1", "lambada": "lambada/test", "wikitext": "wikitext-2-raw/validation",
                      "epistemic_reasoning": "bigbench/epistemic_reasoning", "qa_wikidata": "bigbench/qa_wikidata"}),
])
def test_the_experiments_run(assets, tmp_path, name, tasks):
    settings = [f"experiment={name}", f"model.name={assets / 'models/stories260K'}", "target.blocks=[4]",
                "target.layer_types=[down_proj]", "region.values=[0.9]", "search.report_limit=4",
                "search.control_seeds=[0]", "tasks.wikitext.window=64", f"output={tmp_path / 's'}"]
    for task, file in tasks.items():
        settings += [f"tasks.{task}.data_files={assets / 'data' / file}.jsonl", f"tasks.{task}.limit=4"]
    assert main(["search", "--quiet", *settings]) == 0
    verdict = pandas.read_parquet(tmp_path / "s/verdict.parquet")
    assert set(verdict.task) == set(tasks) - {"wikitext"} and (verdict.n == 4).all()
    assert verdict.wikitext_token_perplexity.notna().all()


@pytest.mark.parametrize("name", [
    "laser_gptj", "laser_llama2", "laser_roberta", "laser_pythia", "laser_stories", "laser_stories_blimp",
])
def test_the_published_targets_compose(name, capsys):
    given = ["model.name=some/model"] if name.startswith("laser_stories") else []
    assert main(["plan", f"experiment={name}", "--show-config", *given]) == 0
    assert "layer_types" in capsys.readouterr().out
