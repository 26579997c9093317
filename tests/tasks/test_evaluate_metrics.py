"""Metrics of Hugging Face evaluate against scikit-learn's and sacrebleu's own values, in tasks and in a study."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu import corpus_bleu
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import GenerationConfig

import harness as sh
from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import AdaptiveSettings, RuntimeSettings
from harness.evaluation.statistics import estimate
from harness.models.loading import loaded_from
from tests.encoders import WORDS, tiny_classifier, tokenizer
from tests.models.tiny import tiny_model
from tests.tasks.asking import asked
from tests.tasks.test_encoder_tasks import class_logits, context, write

SCRIPTS = Path(__file__).parent / "metrics"
F1, MATTHEWS, BLEU = (str(SCRIPTS / f"{name}.py") for name in ("f1", "matthews_correlation", "sacrebleu"))


def labelled(tmp_path, n: int = 40) -> str:
    rng = np.random.default_rng(0)
    rows = [{"sentence": " ".join(rng.choice(WORDS, 6)), "label": int(rng.integers(3))} for _ in range(n)]
    return write(tmp_path / "rows.jsonl", rows)


def undecided_classifier(file: str):
    """A classifier that predicts each class of some row: its biases take away what it says of all rows."""
    model = tiny_classifier("bert")
    rows = asked("t", kind="classification", data_files=file).rows("t", ["sentence"])
    logits = torch.stack([class_logits(model, "bert", row["sentence"]) for row in rows])
    with torch.no_grad():
        model.classifier.bias -= logits.mean(dim=0).float()
    return model


def test_metrics_of_a_classifier_are_scikit_learns(tmp_path) -> None:
    file = labelled(tmp_path)
    model = undecided_classifier(file)
    macro = {"name": F1, "label": "macro_f1", "arguments": {"average": "macro"}}
    task = asked("t", kind="classification", data_files=file, metrics=[macro, MATTHEWS])
    prepared = task.prepare("t", context(model, "bert"))
    plain = asked("t", kind="classification", data_files=file).prepare("t", context(model, "bert"))
    found = prepared.measure(Scorer(loaded_from(model), {"t": prepared}).score("t"))
    built_in = plain.measure(Scorer(loaded_from(model), {"t": plain}).score("t"))
    rows = task.rows("t", ["sentence"])
    predictions = [int(class_logits(model, "bert", row["sentence"]).argmax()) for row in rows]
    labels = [row["label"] for row in rows]
    assert len(set(predictions)) > 1
    assert list(found) == ["accuracy", "cross_entropy", "macro_f1", "matthews_correlation"]
    values = {name: estimate(scores).value for name, scores in found.items()}
    assert values["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert values["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)
    for name in ("accuracy", "cross_entropy"):
        assert np.array_equal(found[name].score, built_in[name].score)
    without = [
        f1_score(np.delete(labels, i), np.delete(predictions, i), average="macro") for i in range(len(labels))
    ]
    jackknife = np.sqrt(39 / 40 * np.square(without - np.mean(without)).sum())
    assert estimate(found["macro_f1"]).stderr == pytest.approx(jackknife, rel=1e-9)
    assert prepared.whole and not plain.whole


def test_the_protocol_says_what_a_metric_depends_on(tmp_path) -> None:
    """Its arguments, the bytes of its script, and the versions of the packages that the script imports."""
    model, file = tiny_classifier("bert"), labelled(tmp_path)

    def protocol(script: str, **settings) -> dict:
        metric = {"name": script, "arguments": {"average": "macro"}, **settings}
        task = asked("t", kind="classification", data_files=file, metrics=[metric])
        return dict(task.prepare("t", context(model, "bert")).protocol)

    first = protocol(F1)
    copy = tmp_path / "f1.py"
    shutil.copy(F1, copy)
    (same,) = protocol(str(copy))["metrics"]
    (known,) = first["metrics"]
    assert same == known and known["name"] == "f1.py"  # wherever the script is
    assert {"scikit-learn", "evaluate", "datasets", "numpy"} == set(known["packages"])
    copy.write_text(copy.read_text().replace("value = f1", "value = 0.5 * f1"))
    (other,) = protocol(str(copy))["metrics"]
    assert other["script"] != known["script"]
    assert protocol(F1, arguments={"average": "micro"}) != first != protocol(F1, higher_is_better=False)
    without = asked("t", kind="classification", data_files=file).prepare("t", context(model, "bert"))
    assert "metrics" not in without.protocol


BAD = [
    ("f1", r"it must be a list, for example \[f1\]"),
    ([{"name": F1, "average": "macro"}], r"average: unknown key; known here: name, label, value, arguments"),
    ([F1, F1], r"two metrics are called 'f1'; set label"),
    ([{"arguments": {}}], r"name: must be set"),
]


@pytest.mark.parametrize(("metrics", "message"), BAD)
def test_settings_that_cannot_be_are_refused(metrics, message, tmp_path) -> None:
    with pytest.raises(InputError, match=rf"^tasks\.t\.metrics.*{message}"):
        asked("t", kind="classification", data_files=labelled(tmp_path), metrics=metrics)


REFUSED = [
    ([F1], r"f1: Target is multiclass but average='binary'"),
    ([{"name": F1, "arguments": {"average": None}}], r"f1 returns no single number called 'f1', but f1; set value"),
    ([{"name": F1, "label": "accuracy", "arguments": {"average": "macro"}}], r"has a metric 'accuracy' of its own"),
    (["no_such_metric_anywhere"], r"'no_such_metric_anywhere' cannot be loaded"),
]


@pytest.mark.parametrize(("metrics", "message"), REFUSED)
def test_metrics_that_cannot_be_computed_are_refused_before_a_model_loads(metrics, message, tmp_path) -> None:
    task = asked("t", kind="classification", data_files=labelled(tmp_path), metrics=metrics)
    with pytest.raises(InputError, match=rf"^tasks\.t\.metrics: .*{message}"):
        task.prepare("t", context(tiny_classifier("bert"), "bert"))


@pytest.fixture
def pairs(tmp_path) -> str:
    rng = np.random.default_rng(1)
    sentences = [[" ".join(rng.choice(WORDS, size)) for size in (6, 4)] for _ in range(5)]
    return write(tmp_path / "pairs.jsonl", [{"source": source, "target": target} for source, target in sentences])


def written_one_by_one(model, rows, new_tokens: int) -> list[str]:
    """By transformers' own generate, a row at a time and unpadded."""
    read, texts = tokenizer("t5"), []
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0,
                                eos_token_id=read.eos_token_id, decoder_start_token_id=0)
    for row in rows:
        ids = torch.tensor([read(row["source"])["input_ids"]])
        texts.append(read.decode(model.generate(ids, generation_config=settings)[0], skip_special_tokens=True).strip())
    return texts


def test_metrics_of_written_text_are_sacrebleus(pairs) -> None:
    model = tiny_model("t5", num_decoder_layers=2)
    bleu = {"name": BLEU, "value": "score"}
    task = asked("t", kind="seq2seq", data_files=pairs, metrics=[bleu], max_new_tokens=7)
    rows = task.rows("t", ["source", "target"])
    said = written_one_by_one(model, rows, 7)
    # the right answers are what the model writes, but for two, so that the score is neither 0 nor 100
    rows = [{**row, "target": text if i > 1 else row["target"]} for i, (row, text) in enumerate(zip(rows, said))]
    assert len(set(said)) > 1
    write(Path(pairs), rows)
    prepared = task.prepare("t", context(model, "t5"))
    assert isinstance(prepared, DirectTask) and prepared.protocol["max_new_tokens"] == 7
    loaded, targets = loaded_from(model, tokenizer("t5")), [row["target"] for row in rows]
    expected = corpus_bleu(said, [targets]).score
    for share in (1.0, 1e-3):  # all in one batch with padding, and one at a time
        found = prepared.measure(loaded, Division(), share)
        assert list(found) == ["sacrebleu"]
        assert estimate(found["sacrebleu"]).value == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 100
    without = [corpus_bleu(np.delete(said, i).tolist(), [np.delete(targets, i).tolist()]).score for i in range(5)]
    jackknife = np.sqrt(4 / 5 * np.square(without - np.mean(without)).sum())
    assert estimate(found["sacrebleu"]).stderr == pytest.approx(jackknife, rel=1e-9)


def test_what_a_checkpoint_says_of_generating_changes_nothing(pairs) -> None:
    """Beams, a penalty or forced tokens of generation_config.json are not in the protocol, so they are not used."""
    model = tiny_model("t5", num_decoder_layers=2)
    task = asked("t", kind="seq2seq", data_files=pairs, metrics=[{"name": BLEU, "value": "sys_len"}])
    prepared, loaded = task.prepare("t", context(model, "t5")), loaded_from(model, tokenizer("t5"))
    assert prepared.protocol["max_new_tokens"] == 5  # four words and the end of the sequence
    before = prepared.measure(loaded, Division(), 1.0)["sacrebleu"].score
    own = model.generation_config
    model.generation_config = GenerationConfig(num_beams=4, suppress_tokens=list(range(4, 60)), max_new_tokens=2)
    changed = model.generation_config
    try:
        after = prepared.measure(loaded, Division(), 1.0)["sacrebleu"].score
        assert model.generation_config is changed
    finally:
        model.generation_config = own
    assert np.array_equal(before, after) and before.sum() > 0


def test_a_length_without_metrics_is_refused(pairs) -> None:
    with pytest.raises(InputError, match=r"^tasks\.t\.max_new_tokens: nothing is generated without metrics"):
        asked("t", kind="seq2seq", data_files=pairs, max_new_tokens=5)


def test_a_study_measures_a_task_with_metrics_on_every_example(tmp_path) -> None:
    """Under adaptive precision, too: a part of the examples says nothing exact of F1; resuming finds the same cells."""
    file = labelled(tmp_path, 60)
    model = sh.wrap(undecided_classifier(file), tokenizer("bert"))
    metric = {"name": F1, "arguments": {"average": "macro"}}
    tasks = {
        name: sh.task(name, kind="classification", data_files=file, **settings)
        for name, settings in (("whole", {"metrics": [metric]}), ("drawn", {}))
    }
    adaptive = AdaptiveSettings(absolute=10.0, min_examples=10)
    runtime = RuntimeSettings(precision="adaptive", adaptive=adaptive, batch_tokens=64)
    study = sh.run(
        model, targets="type", regions=[sh.regions.large(0.3)], tasks=list(tasks.values()), runtime=runtime,
        output=tmp_path / "study", progress=False,
    )
    cells = study.metrics[study.metrics.region != "none"]
    assert set(cells[cells.task == "whole"].metric) == {"accuracy", "cross_entropy", "f1"}
    assert (cells[cells.task == "whole"].precision == "exact").all()
    assert (cells[cells.task == "drawn"].precision == "adaptive").all()
    f1 = cells[cells.metric == "f1"]
    assert f1.delta_stderr.notna().all() and (f1.delta != 0).any() and (f1.n == 60).all()
