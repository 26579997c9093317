"""Indirect objects against the logits of a plain forward pass over the prompt."""

import json
import re

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import Scores
from harness.evaluation.statistics import estimate
from harness.tasks import ioi
from harness.tasks.ioi import IoiTask
from tests.evaluation.reference import real, score, tiny

PROMPTS = [
    ("When Anna and Ben went to the park, Ben gave a ball to", "Anna"),
    ("Then, Max and Anna were thinking. Anna gave a bone to", "Max"),
    ("Friends Ben and Bentley ran. Bentley gave it to", "Ben"),
    ("After Zadok and Zara sat down, Zadok's dog ran; Zadok gave it to ", "Zara"),
]


def _file(tmp_path, *pairs):
    path = tmp_path / "ioi.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs))
    return str(path)


@torch.no_grad()
def _plain(model, tokenizer, prompt, names):
    """Log-probability of " " + name after the prompt, by the chain rule over tokens fed one longer each time; and the
    logits at the prompt's last token."""
    start = tokenizer.encode(prompt)
    logits = model(torch.tensor([start])).logits[0, -1]
    totals, tokens_of = [], []
    for name in names:
        tokens, fed, total = tokenizer.encode(prompt + " " + name)[len(start):], list(start), 0.0
        for token in tokens:
            total += torch.log_softmax(model(torch.tensor([fed])).logits[0, -1].double(), -1)[token].item()
            fed.append(token)
        totals.append(total)
        tokens_of.append(tokens)
    return totals, tokens_of, logits


@pytest.mark.assets
def test_a_trained_model_on_the_published_prompts(assets):
    model, context = real(assets / "models/stories15M")
    path = assets / "data/ioi/ioi.jsonl"
    task = IoiTask(data_files=str(path), limit=6).prepare("ioi", context)
    metrics = task.measure(score(model, task.requests))
    shared = 0
    for i, line in enumerate(path.read_text().splitlines()[:6]):
        row = json.loads(line)
        # in these prompts the giver is the last name before the last verb, and every other capital begins a sentence
        other = [word for word in re.findall(r"[A-Z]\w+", row["prompt"]) if row["prompt"].count(word) == 2][0]
        (answer, wrong), tokens, logits = _plain(model, context.tokenizer, row["prompt"], (row["answer"], other))
        assert metrics["accuracy"].score[i] == (answer > wrong)
        assert metrics["p_answer"].score[i] == pytest.approx(np.exp(answer), rel=1e-4)
        assert metrics["logprob"].score[i] == pytest.approx(answer, rel=1e-4)
        if tokens[0][0] == tokens[1][0]:
            shared += 1
        else:
            difference = (logits[tokens[0][0]] - logits[tokens[1][0]]).item()
            assert metrics["logit_difference"].score[i] == pytest.approx(difference, abs=1e-4)
    assert task.protocol["n_shared_first_token"] == shared
    assert 0.5 <= estimate(metrics["accuracy"]).value


@pytest.mark.assets
def test_all_published_prompts_have_one_other_name(assets):
    rows = [json.loads(line) for line in (assets / "data/ioi/ioi.jsonl").open()]
    assert len(rows) == 841
    for row in rows:
        other = ioi.other_name("k", row["prompt"], row["answer"])
        assert other != row["answer"] and row["prompt"].count(other) == 2


def test_names_that_share_their_first_tokens(tmp_path):
    """Ben is the beginning of Bentley; Zadok and Zara part after their common tokens."""
    model, context = tiny()
    tokenizer = context.tokenizer
    task = IoiTask(data_files=_file(tmp_path, *PROMPTS)).prepare("ioi", context)
    metrics = task.measure(score(model, task.requests))
    ben, zara = ([task.requests[2 * i + j].targets.tolist() for j in (0, 1)] for i in (2, 3))
    assert ben[1][: len(ben[0])] == ben[0] and len(ben[1]) > len(ben[0])
    assert zara[0][0] == zara[1][0]
    assert (task.protocol["n_shared_first_token"], task.protocol["n_prefix_names"]) == (2, 1)

    totals, _, _ = _plain(model, tokenizer, PROMPTS[2][0], ("Ben", "Bentley"))
    assert metrics["logit_difference"].score[2] == pytest.approx(totals[0] - totals[1], rel=1e-4)

    shared = next(k for k, (a, b) in enumerate(zip(*zara, strict=False)) if a != b)
    prompt = tokenizer.encode(PROMPTS[3][0].rstrip())
    with torch.no_grad():
        logits = model(torch.tensor([prompt + zara[0][:shared]])).logits[0, -1]
    difference = (logits[zara[0][shared]] - logits[zara[1][shared]]).item()
    assert metrics["logit_difference"].score[3] == pytest.approx(difference, rel=1e-4)
    totals, _, _ = _plain(model, tokenizer, PROMPTS[3][0].rstrip(), ("Zara", "Zadok"))
    assert metrics["accuracy"].score[3] == (totals[0] > totals[1])
    assert metrics["p_answer"].score[3] == pytest.approx(np.exp(totals[0]), rel=1e-4)


def test_ties_are_chance_and_broken_models_are_broken(tmp_path):
    _, context = tiny()
    task = IoiTask(data_files=_file(tmp_path, *PROMPTS[:2])).prepare("ioi", context)
    offsets = np.cumsum([0, *(len(request.targets) for request in task.requests)])
    logprob = np.zeros(offsets[-1])
    logprob[offsets[2]] = np.nan
    metrics = task.measure(Scores(logprob, np.zeros(len(logprob), dtype=bool), None, offsets))
    np.testing.assert_array_equal(metrics["accuracy"].score, [0.5, np.nan])
    assert np.isnan(metrics["logit_difference"].score[1]) and np.isnan(metrics["p_answer"].score[1])


def test_the_protocol_is_json(tmp_path):
    _, context = tiny()
    task = IoiTask(data_files=_file(tmp_path, *PROMPTS), limit=2).prepare("ioi", context)
    assert json.loads(json.dumps(task.protocol)) == task.protocol
    assert task.example_ids == ["0", "1"] and len(task.requests) == 4


@pytest.mark.parametrize(("prompt", "answer", "message"), [
    ("When Anna and Ben ran, Ben gave it to", "Max", r"^tasks\.i row 0: the answer 'Max' must occur exactly once"),
    ("When Anna and Ben ran, Ben and Anna gave it to", "Anna", r"the answer 'Anna' must occur exactly once"),
    ("When Anna and Ben ran, Max gave it to", "Anna", r"one name besides 'Anna' must occur twice .*, not \[\]"),
    ("Ben and Max saw Anna; Ben and Max gave it to", "Anna", r"not \['Ben', 'Max'\]"),
])
def test_prompts_without_one_pair_of_names(tmp_path, prompt, answer, message):
    with pytest.raises(InputError, match=message):
        IoiTask(data_files=_file(tmp_path, (prompt, answer))).prepare("i", tiny()[1])


def test_missing_column_lists_those_there(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"ioi_sentences": "Then, Anna"}')
    with pytest.raises(InputError, match=r"no column 'prompt' in row 0; its columns are ioi_sentences$"):
        IoiTask(data_files=str(path)).prepare("i", tiny()[1])
