"""BIG-bench tasks against a plain forward pass of one sequence at a time."""

import json

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import Scores
from harness.tasks.bigbench import BigbenchTask
from tests.evaluation.reference import real, score, tiny

CLOSED = [
    {"input": "Anna gave a ball to Ben.", "targets": ["non-true"], "choices": ["true", "non-true"],
     "task_prefix": "Is it so?\n", "input_prefix": "\n", "output_prefix": "\nRelation: "},
    {"input": "Max is a dog.", "targets": ["true"], "choices": ["true", "non-true"],
     "task_prefix": "Is it so?\n", "input_prefix": "\n", "output_prefix": "\nRelation: "},
]
OPEN = [
    {"inputs": "\nThe dog was named ", "targets": ["Max"], "multiple_choice_targets": []},
    {"inputs": "\nThe friend of Anna is ", "targets": ["Ben", "Zoë"], "multiple_choice_targets": []},
    {"inputs": "\nAnna went to ", "targets": ["the park"], "multiple_choice_targets": []},
]


def _file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def _answer_logprobs(model, tokenizer, prompt, answer):
    """log p and greediness of each token of " " + answer, from the softmax of the whole sequence."""
    start, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {answer}")
    assert whole[: len(start)] == start
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(start) - 1 : -1]
    targets = whole[len(start):]
    return [rows[i, t].item() for i, t in enumerate(targets)], [rows[i].argmax() == t for i, t in enumerate(targets)]


def test_choices_and_loss_per_token(tmp_path):
    model, context = tiny()
    task = BigbenchTask(data_files=_file(tmp_path, CLOSED)).prepare("t", context)
    metrics = task.measure(score(model, task.requests))
    assert list(metrics) == ["accuracy", "logprob"]
    for i, row in enumerate(CLOSED):
        prompt = f"Is it so?\n\n{row['input']}\nRelation:"
        of = {c: _answer_logprobs(model, context.tokenizer, prompt, c)[0] for c in row["choices"]}
        right = of[row["targets"][0]]
        assert metrics["accuracy"].score[i] == (sum(right) == max(map(sum, of.values())))
        assert metrics["logprob"].score[i] == pytest.approx(sum(right) / len(right), rel=1e-4)


def test_open_answers_and_questions_with_several_are_left_out(tmp_path):
    model, context = tiny()
    task = BigbenchTask(data_files=_file(tmp_path, OPEN)).prepare("t", context)
    assert task.example_ids == ["0", "2"] and task.protocol["n_several_answers_left_out"] == 1
    metrics = task.measure(score(model, task.requests))
    for i, row in enumerate([OPEN[0], OPEN[2]]):
        logprobs, greedy = _answer_logprobs(model, context.tokenizer, row["inputs"].strip(), row["targets"][0])
        assert metrics["accuracy"].score[i] == all(greedy)
        assert metrics["accuracy_first_token"].score[i] == greedy[0]
        assert metrics["logprob"].score[i] == pytest.approx(np.mean(logprobs), rel=1e-4)
    json.dumps(dict(task.protocol))


def test_ties_and_what_is_not_a_number(tmp_path):
    _, context = tiny()
    task = BigbenchTask(data_files=_file(tmp_path, CLOSED)).prepare("t", context)
    lengths = [len(request.targets) for request in task.requests]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    logprob = np.concatenate([np.full(n, -1.0 / n) for n in lengths])
    scores = Scores(logprob, np.zeros(len(logprob), bool), None, offsets)
    assert task.measure(scores)["accuracy"].score.tolist() == [0.5, 0.5]
    logprob[0] = np.nan
    metrics = task.measure(Scores(logprob, np.zeros(len(logprob), bool), None, offsets))
    assert all(np.isnan(metrics[m].score).tolist() == [True, False] for m in metrics)


def test_bad_rows_are_refused(tmp_path):
    _, context = tiny()
    for rows, words in (
        ([{"input": "x", "choices": []}], "answers in targets"),
        ([{"input": "x", "targets": ["a", "b"]}], "exactly one right answer"),
        ([{"input": "x", "targets": ["a"], "choices": ["b", "c"]}], "none of the choices"),
        ([CLOSED[0], OPEN[0]], "not of both"),
    ):
        with pytest.raises(InputError, match=words):
            BigbenchTask(data_files=_file(tmp_path, rows)).prepare("t", context)


@pytest.mark.assets
def test_the_published_files(assets):
    _, context = real(assets / "models/stories15M")
    folder = assets / "data/bigbench"
    settings = BigbenchTask(data_files=str(folder / "epistemic_reasoning.jsonl"), part="selection", limit=20)
    closed = settings.prepare("t", context)
    assert len(closed.requests) == 40
    whole = BigbenchTask(data_files=str(folder / "qa_wikidata.jsonl"), limit=50).prepare("t", context)
    assert len(whole.requests) == 50 and whole.protocol["n_several_answers_left_out"] == 1509
