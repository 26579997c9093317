"""Tasks of encoders, classifiers and encoder-decoders against transformers' own losses on inputs made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import TaskContext
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.statistics import estimate
from harness.models.families import family_of
from harness.models.loading import loaded_from
from harness.tasks.blimp import BlimpTask
from harness.tasks.classification import ClassificationTask
from harness.tasks.masked import MaskedTask
from harness.tasks.seq2seq import Seq2SeqTask
from tests.encoders import tiny_classifier, tokenizer
from tests.models.tiny import tiny_model

SENTENCES = ["the cat sat on the mat .", "mary gave the red book to john", " \n", "it said : never"]
PAIRS = [
    {"text": "the cat sat on the mat", "other": "a cat sat", "label": 2},
    {"text": "mary gave john the book", "other": "john never went to the store , said mary", "label": 0},
    {"text": "bird", "other": "", "label": 1},
    {"text": "the dog ran under the big red house", "other": "the dog ran", "label": 1},
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(tmp_path, column: str = "text") -> str:
    return write(tmp_path / "rows.jsonl", [{column: sentence} for sentence in SENTENCES])


def context(model, model_type: str, context_length: int = 40) -> TaskContext:
    classifier = type(model).__name__.endswith("ForSequenceClassification")
    kind = "classification" if classifier else family_of(model.config).kind
    return TaskContext(tokenizer(model_type), model.config, context_length, kind)


def measured(model, task) -> dict[str, float]:
    scores = Scorer(loaded_from(model), {task.name: task}, ScoringOptions(batch_tokens=64)).score(task.name)
    return {metric: estimate(found).value for metric, found in task.measure(scores).items()}


@torch.no_grad()
def losses_of_masked(model, model_type: str, sentence: str) -> tuple[list[float], int]:
    """Cross-entropy of each token of a sentence when it is masked, by transformers' own loss; how many are first."""
    read = tokenizer(model_type)
    ids = read(sentence, return_tensors="pt")["input_ids"]
    found, first = [], 0
    for position in range(1, ids.shape[1] - 1):
        fed, labels = ids.clone(), torch.full_like(ids, -100)
        fed[0, position], labels[0, position] = read.mask_token_id, ids[0, position]
        output = model(input_ids=fed, labels=labels)
        found.append(output.loss.item())
        first += int(output.logits[0, position].argmax() == ids[0, position])
    return found, first


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_pseudo_perplexity_is_the_mean_loss_of_tokens_masked_in_turn(model_type: str, tmp_path) -> None:
    model = tiny_model(model_type)
    task = MaskedTask(data_files=texts(tmp_path)).prepare("masked", context(model, model_type))
    losses, first = zip(*(losses_of_masked(model, model_type, s) for s in SENTENCES if s.strip()))
    mean = sum(map(sum, losses)) / sum(map(len, losses))
    found = measured(model, task)
    assert found["pseudo_nll"] == pytest.approx(mean, rel=1e-6)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["accuracy"] == sum(first) / sum(map(len, losses))
    assert task.example_ids == ["0", "1", "3"] and task.protocol["n_tokens"] == 7 + 7 + 4
    assert task.example_of.tolist() == [0] * 7 + [1] * 7 + [2] * 4


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("adds", [True, False])
def test_special_tokens_are_those_that_the_tokenizer_adds(model_type: str, adds: bool, tmp_path) -> None:
    """BOS included, for a decoder with a classification head."""
    of_model = context(tiny_classifier(model_type), model_type)
    if not adds:
        of_model.tokenizer.backend_tokenizer.post_processor = None
    rows = write(tmp_path / "rows.jsonl", [{"sentence": "the cat sat", "label": 1}])
    task = ClassificationTask(data_files=rows).prepare("t", of_model)
    words = of_model.tokenizer.convert_tokens_to_ids(["the", "cat", "sat"])
    before, after = {"bert": ([1], [2]), "roberta": ([1], [2]), "llama": ([1], [])}[model_type] if adds else ([], [])
    assert task.requests[0].tokens.tolist() == [*before, *words, *after]
    if model_type != "llama":
        masked = MaskedTask(data_files=rows, column="sentence").prepare("t", of_model)
        mask = of_model.tokenizer.mask_token_id
        assert masked.requests[1].tokens.tolist() == [*before, words[0], mask, words[2], *after]
        assert len(masked.requests) == 3


def test_rows_longer_than_the_window_are_cut_into_pieces(tmp_path) -> None:
    model = tiny_model("bert")
    task = MaskedTask(data_files=texts(tmp_path), window=6).prepare("masked", context(model, "bert"))
    assert task.example_ids == ["0.0", "0.1", "1.0", "1.1", "3"]
    pieces = ["the cat sat on", "the mat .", "mary gave the red", "book to john", "it said : never"]
    mean = sum(sum(losses_of_masked(model, "bert", piece)[0]) for piece in pieces) / 18
    assert measured(model, task)["pseudo_nll"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(("settings", "message"), [
    ({"window": 41}, r"tasks\.t\.window: 41 tokens are more than the model's context of 40"),
    ({"column": "sentence"}, r"tasks\.t\.data_files: .* has no column 'sentence' in row 0"),
])  # fmt: skip
def test_masked_refuses(settings, message, tmp_path) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        MaskedTask(data_files=texts(tmp_path), **settings).prepare("t", context(tiny_model("bert"), "bert"))


def test_masked_needs_a_mask_token_room_and_text(tmp_path) -> None:
    model = tiny_model("bert")
    with pytest.raises(InputError, match=r"^tasks\.t: the model's tokenizer has no mask token"):
        MaskedTask(data_files=texts(tmp_path)).prepare("t", context(model, "llama"))
    with pytest.raises(InputError, match=r"^tasks\.t\.window: 2 tokens leave no room"):
        MaskedTask(data_files=texts(tmp_path), window=2).prepare("t", context(model, "bert"))
    blank = write(tmp_path / "blank.jsonl", [{"text": " "}, {"text": ""}])
    with pytest.raises(InputError, match=r"^tasks\.t: none of the 2 rows has text"):
        MaskedTask(data_files=blank).prepare("t", context(model, "bert"))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_minimal_pairs_of_an_encoder_are_compared_by_the_loss_of_masked_tokens(model_type: str, tmp_path) -> None:
    pairs = [("the cat sat on the mat", "the cat sat the on mat"), ("it was red", "it were red and big"),
             ("a bird", "bird a"), ("mary gave the book", "mary the gave book")]  # fmt: skip
    file = write(tmp_path / "order.jsonl", [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs])
    model = tiny_model(model_type)
    task = BlimpTask(data_files=file).prepare("t", context(model, model_type))
    summed = [[sum(losses_of_masked(model, model_type, sentence)[0]) for sentence in pair] for pair in pairs]
    right = [good < bad for good, bad in summed]
    assert measured(model, task)["accuracy"] == sum(right) / len(right)
    scores = Scorer(loaded_from(model), {"t": task}).score("t")
    assert task.measure(scores)["accuracy"].score.tolist() == right
    assert set(right) == {True, False}
    lengths = [len(sentence.split()) for pair in pairs for sentence in pair]
    assert task.example_of.tolist() == np.arange(4).repeat(2).repeat(lengths).tolist()
    with pytest.raises(InputError, match=r"^tasks\.t order row 0: a sentence is longer than the model's context of 6"):
        BlimpTask(data_files=file).prepare("t", context(model, model_type, context_length=6))


@torch.no_grad()
def class_logits(model, model_type: str, *sentences: str) -> torch.Tensor:
    encoding = tokenizer(model_type)(*sentences, return_tensors="pt")
    assert ("token_type_ids" in encoding) == (model_type == "bert")
    return model(**encoding).logits[0].double()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("pair", [False, True])
def test_accuracy_and_cross_entropy_of_a_classifier(model_type: str, pair: bool, tmp_path) -> None:
    model = tiny_classifier(model_type)
    settings = ClassificationTask(
        data_files=write(tmp_path / "rows.jsonl", PAIRS), text_column="text", pair_column="other" if pair else None
    )
    task = settings.prepare("t", context(model, model_type))
    logits = torch.stack([
        class_logits(model, model_type, row["text"], *([row["other"]] if pair else [])) for row in PAIRS
    ])
    labels = torch.tensor([row["label"] for row in PAIRS])
    found = measured(model, task)
    assert found["cross_entropy"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert task.protocol["n_truncated"] == 0


def test_the_two_sentences_of_a_pair_are_told_apart(tmp_path) -> None:
    model = tiny_classifier("bert")
    settings = ClassificationTask(
        data_files=write(tmp_path / "rows.jsonl", PAIRS), text_column="text", pair_column="other"
    )
    first = settings.prepare("t", context(model, "bert")).requests[0]
    assert first.segments.tolist() == [0] * 8 + [1] * 4
    joined = write(tmp_path / "joined.jsonl", [{**row, "text": f"{row['text']} {row['other']}"} for row in PAIRS])
    one = ClassificationTask(data_files=joined, text_column="text")
    task = settings.prepare("t", context(model, "bert"))
    assert measured(model, task) != measured(model, one.prepare("t", context(model, "bert")))


def test_texts_longer_than_the_context_are_cut_and_counted(tmp_path) -> None:
    model = tiny_classifier("bert")
    settings = ClassificationTask(
        data_files=write(tmp_path / "rows.jsonl", PAIRS), text_column="text", pair_column="other"
    )
    task = settings.prepare("t", context(model, "bert", context_length=9))
    assert [len(request.tokens) for request in task.requests] == [9, 9, 3, 9]
    assert task.protocol["n_truncated"] == 3
    cut = tokenizer("bert")("the cat sat on the mat", "a cat sat", truncation=True, max_length=9)
    assert task.requests[0].tokens.tolist() == cut["input_ids"]
    assert task.requests[0].segments.tolist() == cut["token_type_ids"]


def _labelled(tmp_path, labels, **settings):
    model = tiny_classifier("bert")
    model.config.label2id = {"good": 0, "bad": 1, "neither": 2}
    rows = write(tmp_path / "rows.jsonl", [{"sentence": "the film", "label": label} for label in labels])
    task = ClassificationTask(data_files=rows, **settings).prepare("t", context(model, "bert"))
    return [int(request.targets[0]) for request in task.requests]


def test_labels_by_number_by_name_and_by_map(tmp_path) -> None:
    assert _labelled(tmp_path, [0, "2", 1.0]) == [0, 2, 1]
    assert _labelled(tmp_path, ["bad", "good"]) == [1, 0]
    assert _labelled(tmp_path, ["yes", "no"], label_map={"yes": 2, "no": 0}) == [2, 0]
    assert _labelled(tmp_path, [0, 1], label_map={"0": 1, "1": 0}) == [1, 0]


@pytest.mark.parametrize("label", [-1, 3, "ugly", 0.5, None])
def test_labels_that_are_no_class_are_refused(label, tmp_path) -> None:
    with pytest.raises(InputError, match=r"^tasks\.t row 1: label .* is none of the model's 3 classes \(good, bad, "):
        _labelled(tmp_path, [0, label])


def test_a_label_that_the_map_lacks_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"^tasks\.t row 1: label 'bad' is not in tasks\.t\.label_map, which has yes"):
        _labelled(tmp_path, ["yes", "bad"], label_map={"yes": 0})


def test_a_map_to_a_class_that_the_model_lacks_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"^tasks\.t\.label_map\.yes: the model has no class 3, only 0 to 2$"):
        _labelled(tmp_path, ["no"], label_map={"no": 0, "yes": 3})


def test_a_regression_head_and_a_missing_label_are_refused(tmp_path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"sentence": "the film"}])
    with pytest.raises(InputError, match=r"^tasks\.t row 0: no column 'label'; its columns are sentence$"):
        ClassificationTask(data_files=rows).prepare("t", context(tiny_classifier("bert"), "bert"))
    regression = tiny_classifier("bert", n_classes=1)
    with pytest.raises(InputError, match=r"^tasks\.t: the model has 1 output, a regression"):
        ClassificationTask(data_files=rows).prepare("t", context(regression, "bert"))


@torch.no_grad()
def test_likelihood_of_targets_is_the_loss_that_transformers_computes_from_labels(tmp_path) -> None:
    model, read = tiny_model("t5"), tokenizer("t5")
    rows = write(tmp_path / "rows.jsonl", [{"source": row["text"], "target": row["other"]} for row in PAIRS])
    settings = Seq2SeqTask(data_files=rows, source_prefix="good : ")
    task = settings.prepare("t", context(model, "t5"))
    total, tokens, right, exact = 0.0, 0, 0, 0
    for row in PAIRS:
        labels = read(row["other"], return_tensors="pt")["input_ids"]
        output = model(input_ids=read("good : " + row["text"], return_tensors="pt")["input_ids"], labels=labels)
        total += output.loss.item() * labels.shape[1]
        tokens += labels.shape[1]
        hits = output.logits[0].argmax(-1) == labels[0]
        right, exact = right + int(hits.sum()), exact + int(hits.all())
    found = measured(model, task)
    assert found["nll"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["token_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["token_accuracy"] == right / tokens and found["exact_match"] == exact / len(PAIRS)
    assert task.protocol["n_tokens"] == tokens == sum(len(row["other"].split()) + 1 for row in PAIRS)


def test_long_sources_and_targets_keep_their_end(tmp_path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"source": row["text"], "target": row["other"]} for row in PAIRS])
    task = Seq2SeqTask(data_files=rows).prepare("t", context(tiny_model("t5"), "t5", context_length=6))
    assert task.protocol["n_truncated"] == 3
    assert [len(r.source) for r in task.requests] == [6, 6, 2, 6]
    assert all(r.source[-1] == 2 and r.targets[-1] == 2 and len(r.targets) <= 6 for r in task.requests)


@pytest.mark.parametrize(("config", "model_type"), [
    (MaskedTask, "bert"), (ClassificationTask, "bert"), (Seq2SeqTask, "t5"),
])  # fmt: skip
def test_parts_and_limits(config, model_type: str, tmp_path) -> None:
    rows = [{"text": f"the cat {a} {b}", "label": 1} for a in ("sat", "ran", "said") for b in ("red", "blue", "big")]
    rows = [{**row, "sentence": row["text"], "source": row["text"], "target": row["text"]} for row in rows]
    file = write(tmp_path / "rows.jsonl", rows)
    model = tiny_classifier("bert") if config is ClassificationTask else tiny_model(model_type)

    def ids(**settings) -> set[str]:
        return set(config(data_files=file, **settings).prepare("t", context(model, model_type)).example_ids)

    selection, report = ids(part="selection", selection_share=0.5), ids(part="report", selection_share=0.5)
    assert selection and report and not selection & report
    assert selection | report == ids() == {str(i) for i in range(9)}
    assert ids(limit=2) == {"0", "1"}


@pytest.mark.assets
def test_real_labelled_data_are_read_whole(assets) -> None:
    """GLUE's files as they are; the tiny tokenizer knows few of their words, but every row has a label."""
    model = tiny_classifier("bert", n_classes=2)
    sst2 = ClassificationTask(data_files=str(assets / "data" / "sst2" / "validation.jsonl"))
    rte = ClassificationTask(
        data_files=str(assets / "data" / "rte" / "validation.jsonl"), text_column="sentence1", pair_column="sentence2"
    )
    for settings, n, positive in ((sst2, 872, 444), (rte, 277, 131)):
        task = settings.prepare("t", context(model, "bert", 128))
        assert len(task.requests) == n
        assert np.concatenate([request.targets for request in task.requests]).sum() == positive
