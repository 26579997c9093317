"""`harness tune`: orders, seeds, interruptions, adapters, and that it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import harness as sh
from harness.cli import main
from harness.engine.run import RunOptions, run, run_plan
from harness.errors import InputError
from harness.measurements import TUNING, compose_settings
from harness.measurements.ablation.treatment_settings import TreatmentSettings
from harness.measurements.tuning import measure, training
from harness.measurements.tuning.effects import effect_of, effects
from harness.models.loading import load
from harness.tables.store import read_table
from tests.checkpoints import save_checkpoint
from tests.encoders import save
from tests.pages import page_data

WORDS = "the a cat dog bird sat ran on under mat tree house and then it was".split()
TUNE = ["tune.steps=6", "tune.batch_size=4", "tune.learning_rate=0.01", "tune.seeds=[0,1]", "threads=1",
        "region.deciles=[1,10]", "cache_gib=0"]
QUIET = RunOptions(progress=False, say=lambda line: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sentences whose label is whether they hold the word "big", for training and for validation."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, n in (("train", 64), ("validation", 24)):
        rows = []
        for i in range(n):
            sentence = [*rng.choice(WORDS, rng.integers(2, 7)), "big" if i % 2 else "small"]
            rows.append({"sentence": " ".join(rng.permutation(sentence)), "label": i % 2})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT without a head for classes."""
    return save(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("decoder"), "llama")


def of_encoder(encoder: Path, data: Path, *more: str) -> list[str]:
    return [f"model.name={encoder}", "task=classification", f"tasks.classification.data_files={data}/validation.jsonl",
            f"tune.data_files={data}/train.jsonl", *TUNE, *more]


def of_decoder(decoder: Path, data: Path, *more: str) -> list[str]:
    return [f"model.name={decoder}", "task=label_words", f"tasks.label_words.data_files={data}/validation.jsonl",
            "tasks.label_words.template='{sentence} it was'", "tasks.label_words.words.0=' red'",
            "tasks.label_words.words.1=' blue'", f"tune.data_files={data}/train.jsonl", *TUNE, *more]


def measured(words: list[str], folder: Path) -> Path:
    return run(TUNING, compose_settings(TUNING, [*words, f"output={folder}"]), QUIET).folder


def tables(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return tuple(read_table(folder, TUNING.tables, name) for name in ("tunings", "results"))


@pytest.fixture(scope="module")
def tuned(encoder, data, tmp_path_factory) -> Path:
    return measured(of_encoder(encoder, data), tmp_path_factory.mktemp("tuned") / "run")


def test_orders_share_what_they_can(tuned):
    tunings, results = tables(tuned)
    assert set(tunings.status) == {"ok"}, tunings.error.dropna().tolist()[:1]
    assert tunings.groupby("order").size().to_dict() == {"tune": 2, "prune_tune": 4, "tune_prune": 4}
    shared = tunings[tunings.order != "prune_tune"]
    assert shared.groupby("seed").training_id.nunique().tolist() == [1, 1] and tunings.training_id.nunique() == 6
    assert tunings.seconds_training.notna().sum() == 6  # each training is done once
    assert not list((tuned / "trainings").glob("*"))
    pruned = tunings[tunings.order != "tune"]
    assert (pruned.n_removed > 0).all() and (pruned.realised_removal > 0.999).all()
    assert set(results.metric) == {"accuracy", "cross_entropy"} and len(results) == 2 * len(tunings)
    assert results.groupby("metric").value.nunique().cross_entropy == 10  # every unit is a model of its own


def test_an_interrupted_training_goes_on_to_the_same_weights(tuned, encoder, data, tmp_path, monkeypatch):
    """It is stopped after four of six steps, with a checkpoint after each second step, of which one is torn."""
    folder = tmp_path / "run"
    settings = compose_settings(TUNING, [*of_encoder(encoder, data, "tune.checkpoint_every=2"), f"output={folder}"])
    real, seen = training._loss, []

    def stop_at_step_5(model, inputs):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return real(model, inputs)

    monkeypatch.setattr(training, "_loss", stop_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        run(TUNING, settings, QUIET)
    (first,) = (folder / "trainings").iterdir()
    assert {path.name for path in first.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (first / "checkpoint-4" / training.COMPLETE).unlink()  # as if the process had been killed while it wrote
    monkeypatch.setattr(training, "_loss", real)
    run(TUNING, settings, QUIET)
    # Every training is done anew here, so that this is also the test that a seed gives the same numbers again.
    one, other = tables(tuned)[1], tables(folder)[1]
    pd.testing.assert_frame_equal(one, other, check_exact=True)  # the ids are the same, too


def test_a_training_that_is_done_is_not_done_again(encoder, data, tmp_path, monkeypatch):
    """Interrupted between the training and its last unit; a damaged file of weights is trained again."""
    words = of_encoder(encoder, data, "tune.order=[tune,tune_prune]", "tune.keep_models=true",
                       "region.deciles=[10]")
    folder = measured(words, tmp_path / "run")
    before = tables(folder)[1]
    kept = sorted((folder / "trainings").iterdir())
    assert len(kept) == 2
    trained: list[int] = []
    real = measure.train
    monkeypatch.setattr(measure, "train", lambda *a, **k: trained.append(1) or real(*a, **k))
    plan = TUNING.units.plan(compose_settings(TUNING, [*words, f"output={tmp_path / 'other'}"]))
    for one in kept:
        target = tmp_path / "other" / "trainings" / one.name
        target.parent.mkdir(parents=True, exist_ok=True)
        one.rename(target)
    with (target / training.MODEL).open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"damaged!")
    run_plan(TUNING, plan, QUIET)
    assert trained == [1]
    pd.testing.assert_frame_equal(tables(tmp_path / "other")[1], before, check_exact=True)


def test_a_full_training_learns(encoder, data, tmp_path):
    words = of_encoder(encoder, data, "tune.steps=80", "tune.learning_rate=0.003", "tune.order=[tune]",
                       "tune.group_by_length=true")
    results = tables(measured(words, tmp_path / "run"))[1]
    assert (results[results.metric == "accuracy"].value >= 0.9).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_decoder_is_trained_on_its_label_words(decoder, data, tmp_path, method):
    rank = ["tune.lora_rank=2"] if method == "lora" else []
    words = of_decoder(decoder, data, "tune.steps=40", f"tune={method}", "tune.order=[tune]", *rank)
    tunings, results = tables(measured(words, tmp_path / "run"))
    assert set(tunings.status) == {"ok"}, tunings.error.dropna().tolist()[:1]
    assert (results[results.metric == "accuracy"].value >= 0.9).all()
    model = sh.load(str(decoder), dtype="float32")
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    adapter = sum(2 * sum(model[name].shape) for name in model.matrices)
    assert set(tunings.n_trained) == {whole if method == "full" else adapter}


def test_the_loss_is_that_of_the_measured_task(decoder, data):
    """One batch: the cross-entropy of the training is that which the task measures."""
    settings = compose_settings(TUNING, of_decoder(decoder, data, "tune.n_examples=16"))
    plan = TUNING.units.plan(dataclasses.replace(settings, model=dataclasses.replace(settings.model)))
    loaded = load(plan.settings.model, plan.description, plan.tokenizer, progress=False)
    batch = training._batch(plan.examples, 0)
    with torch.no_grad():
        loss = float(training._loss(loaded.model, batch))
    asked = dataclasses.replace(settings.tasks["label_words"], data_files=f"{data}/train.jsonl", limit=16)
    scores = sh.load(str(decoder), dtype="float32").score(sh.task("label_words", **{
        key: value for key, value in asked.plain().items() if key != "kind"}))
    metrics = scores.metrics.set_index("metric").value
    assert loss == pytest.approx(metrics.cross_entropy, abs=1e-5)


def test_lora_is_what_peft_merges(encoder, data, tmp_path):
    """The merged weights differ from the base's by a matrix of the adapter's rank, in every matrix of the blocks."""
    words = of_encoder(encoder, data, "tune=lora", "tune.lora_rank=2", "tune.keep_models=true", "tune.order=[tune]")
    folder = measured(words, tmp_path / "run")
    tunings, _ = tables(folder)
    assert set(tunings.status) == {"ok"}, tunings.error.dropna().tolist()[:1]
    from safetensors.torch import load_file

    base = load(compose_settings(TUNING, words).model, progress=False)
    trained = load_file(next((folder / "trainings").iterdir()) / training.MODEL)
    for matrix in base.matrices:
        name = next(key for key in trained if key.endswith(matrix.parameter))
        change = trained[name] - base.model.get_parameter(matrix.parameter)
        sigma = torch.linalg.svdvals(change)
        assert sigma[1] > 1e-6 and sigma[2] < 1e-4 * sigma[0]


def test_kept_and_scaled_regions_are_other_units(encoder, data):
    plans = [TUNING.units.plan(compose_settings(TUNING, of_encoder(encoder, data, *more)))
             for more in ([], ["region.keep=true"], ["region.scale=0.5"])]
    ids = [{unit.id for unit in plan.units if unit.order != "tune"} for plan in plans]
    assert all(len(one) == 8 for one in ids) and len(set.union(*ids)) == 24
    assert plans[1].units[-1].ablation.label.endswith(", kept")
    assert {unit.id for unit in plans[0].units if unit.order == "tune"} <= {unit.id for unit in plans[1].units}


def test_of_a_pair_the_longer_sentence_is_cut_for_training(encoder, tmp_path):
    rows = [{"premise": " ".join(WORDS[:8]), "hypothesis": "the big house", "label": 1}] * 8
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = of_encoder(encoder, tmp_path, "tasks.classification.text_column=premise",
                       "tasks.classification.pair_column=hypothesis")
    whole, cut = (TUNING.units.plan(compose_settings(TUNING, [*pairs, *more])).examples[0]
                  for more in ([], ["tune.max_tokens=10"]))
    assert [len(whole.tokens), len(cut.tokens)] == [14, 10]
    ends = {segment: [text.tokens[text.segments == segment].tolist() for text in (whole, cut)] for segment in (0, 1)}
    assert ends[1][0] == ends[1][1] and ends[0][1] == [*ends[0][0][:5], ends[0][0][-1]]


def test_effects_are_the_paired_t_test_over_seeds():
    rng = np.random.default_rng(0)
    rows = [{"task": "t", "metric": "m", "order": order, "target": "all", "region": region, "seed": seed,
             "value": 0.8 + rng.normal(0, 0.01), "higher_is_better": True}
            for seed in range(5)
            for order, region in (("tune", "none"), ("prune_tune", "r"), ("tune_prune", "r"))]
    found = {row["compared"]: row for row in effects(pd.DataFrame(rows))}
    value = {order: [row["value"] for row in rows if row["order"] == order] for order in
             ("tune", "prune_tune", "tune_prune")}
    for compared, (a, b) in {"prune_tune": ("prune_tune", "tune"), "tune_prune": ("tune_prune", "tune"),
                             "before_minus_after": ("prune_tune", "tune_prune")}.items():
        expected = stats.ttest_rel(value[a], value[b])
        interval = expected.confidence_interval()
        row = found[compared]
        assert (row["n_seeds"], row["p_holm"]) == (5, row["p_value"])
        assert row["p_value"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval))
    assert np.isnan(effect_of([0.1]).p_value)


def test_the_report_says_what_is_incomplete(tuned, tmp_path, capsys):
    assert main(["report", str(tuned)]) == 0
    said = capsys.readouterr().out
    assert "Tuned with nothing removed" in said and "removed before tuning" in said and "Incomplete" not in said
    page = (tuned / "report" / "tune.md").read_text()
    content = page_data(tuned / "report" / "index.html")
    assert len(content["charts"]) == len(content["tables"]) and content["tables"][0]["n"] == 2 * 3
    assert "orders.png" in page and (tuned / "report" / "classification-accuracy-orders.png").is_file()
    assert len(pd.read_csv(tuned / "report" / "effects.csv")) == 2 * 2 * 3


def test_a_training_that_fails_is_rows_and_the_others_go_on(encoder, data, tmp_path, monkeypatch):
    real = measure.train

    def fails_for_seed_0(loaded, examples, settings, seed, folder, progress=False):
        if seed == 0:
            raise RuntimeError("no more memory")
        return real(loaded, examples, settings, seed, folder, progress)

    monkeypatch.setattr(measure, "train", fails_for_seed_0)
    tunings, results = tables(measured(of_encoder(encoder, data, "tune.order=[tune,tune_prune]"), tmp_path / "run"))
    assert tunings.groupby("seed").status.unique().map(list).to_dict() == {0: ["error"], 1: ["ok"]}
    assert tunings[tunings.seed == 0].error.str.contains("no more memory").all() and set(results.seed) == {1}


@pytest.mark.parametrize("more, message", [
    (["tune.seeds=[1]"], "tune.seeds: [1] is wrong; name at least two"),
    (["tune.order=[]"], "tune.order: [] is wrong"),
    (["tune.lora_rank=4"], "tune.lora_rank"),
    (["tune.data_files=null"], "tune.data_files: give the file with the training rows"),
    (["tune.task=nothing"], "tune.task: 'nothing' is wrong; name a task that can be trained on"),
    (["model.dtype=bfloat16"], "weights are trained in float32"),
    (["model.name=recall"], "the embedded model has no text"),
    (["tune.data_files=/no/such.jsonl"], "no such file"),
    (["tune.max_tokens=2", "tasks.classification.pair_column=sentence"], "tune.max_tokens: 2 is too small"),
])
def test_wrong_settings_are_one_line(more, message, encoder, data, capsys):
    assert main(["tune", *of_encoder(encoder, data), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_what_a_tuning_would_not_do_is_refused(encoder, data):
    settings = compose_settings(TUNING, of_encoder(encoder, data))
    text = sh.task("text", data_files=f"{data}/train.jsonl", column="sentence").task
    settings.region.treatment = TreatmentSettings(metric="activations", calibration=text)
    with pytest.raises(InputError, match="region.metric: 'activations' is wrong; before and after a tuning"):
        TUNING.settings.check(settings)


def test_several_processes_are_refused(encoder, data):
    plan = TUNING.units.plan(compose_settings(TUNING, of_encoder(encoder, data)))
    with pytest.raises(InputError, match="it runs in one process"):
        plan.together(3, 2)
