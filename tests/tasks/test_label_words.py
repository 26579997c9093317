"""The task label_words, against the logits of transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import harness as sh
from tests.checkpoints import save_checkpoint

ROWS = [{"sentence": "the cat sat on the mat", "label": 1}, {"sentence": "a dog ran", "label": 0},
        {"sentence": "it was big", "label": 1.0}]
WORDS = {"0": " red", "1": " blue"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sh.load(str(save_checkpoint(tmp_path_factory.mktemp("model"), "llama")), dtype="float32")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "rows.jsonl")


def task(file, **settings):
    return sh.task("label_words", **{"data_files": file, "template": "{sentence} it was", "words": WORDS, **settings})


def test_metrics_are_those_of_the_logits(model, file):
    found = model.score(task(file)).examples
    tokenizer = model.tokenizer
    words = [tokenizer(f"it was{word}", add_special_tokens=False)["input_ids"][-1] for word in WORDS.values()]
    for i, row in enumerate(ROWS):
        tokens = torch.tensor([tokenizer(f"{row['sentence']} it was")["input_ids"]])
        with torch.no_grad():
            logits = model.module(tokens).logits[0, -1].double()
        of_words, label = torch.log_softmax(logits, 0)[words], int(row["label"])
        expected = {
            "accuracy": float(of_words.argmax() == label), "logprob": float(of_words[label]),
            "cross_entropy": float(-torch.log_softmax(logits[words], 0)[label]), "p_words": float(of_words.exp().sum()),
        }  # fmt: skip
        mine = found[found.example_id == str(i)].set_index("metric").score
        np.testing.assert_allclose([mine[key] for key in expected], list(expected.values()), atol=1e-5)


@pytest.mark.parametrize("settings, message", [
    ({"template": "This was"}, "must name at least one column"),
    ({"template": "{sentence.__class__}"}, "only names of columns"),
    ({"template": "{sentence!r}"}, "only names of columns"),
    ({"template": "{"}, "template"),
    ({"words": {"0": " red"}}, "at least two labels"),
    ({"words": {"0": " red", "1": " red"}}, "a word of its own"),
])
def test_wrong_settings(file, settings, message):
    with pytest.raises(sh.InputError, match=message):
        task(file, **settings)


@pytest.mark.parametrize("settings, message", [
    ({"template": "{text} it was"}, "text"),
    ({"words": {"0": " red", "2": " blue"}}, "row 0: label 1 has no word"),
    ({"words": {"0": " red", "1": " big tree"}}, "use words of one token each"),
    ({"label_column": "class"}, "no column 'class'"),
])
def test_data_that_do_not_fit(model, file, settings, message):
    with pytest.raises(sh.InputError, match=message):
        model.prepare(task(file, **settings))
