"""Factual recall against the softmax of a plain forward pass."""

import json

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import Scores
from harness.tasks.factual import FactualTask
from tests.evaluation.reference import real, score, tiny

FACTS = [
    ("The dog was named", "Max"), ("Anna gave a ball to ", " Ben"), ("“Café” said", "Zoë"), ("They went to", "the"),
]


def _file(tmp_path, rows):
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def _check(model, context, facts, words, metrics):
    """Every metric, example by example, from the distribution over the whole vocabulary."""
    tokenizer = context.tokenizer
    for i, (prompt, target) in enumerate(facts):
        start = tokenizer.encode(prompt)
        first = [tokenizer.encode(f"{prompt} {word}")[len(start)] for word in (target, *words)]
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([start])).logits[0, -1].double(), -1)
        ranks = [(p > p[first[0]] * factor).sum().item() + 1 for factor in (1 + 1e-5, 1 - 1e-5)]
        ranks[1] -= 1  # the target itself
        generic = p[sorted(set(first[1:]))]
        assert metrics["accuracy"].score[i] == (p.argmax().item() == first[0])
        assert metrics["p_target"].score[i] == pytest.approx(p[first[0]].item(), rel=1e-4)
        assert metrics["logprob"].score[i] == pytest.approx(np.log(p[first[0]].item()), rel=1e-4)
        assert metrics["p_generic"].score[i] == pytest.approx(generic.sum().item(), rel=1e-4)
        assert metrics["accuracy_vs_generic"].score[i] == (p[first[0]] > generic.max()).item()
        rank = 1 / metrics["mean_reciprocal_rank"].score[i]
        # far down the list neighbours are equal to float32's rounding
        assert ranks[0] - 0.01 <= rank <= ranks[1] + 0.01
        assert metrics["mean_log_rank"].score[i] == pytest.approx(np.log(rank), abs=1e-12)


@pytest.mark.assets
@pytest.mark.parametrize(("name", "column"), [("counterfact_easyedit", "ground_truth"), ("known_1000", "attribute")])
def test_a_trained_model_on_published_facts(assets, name, column):
    model, context = real(assets / "models/stories15M")
    path = assets / f"data/counterfact/{name}.jsonl"
    config = FactualTask(data_files=str(path), limit=8)
    task = config.prepare("facts", context)
    assert task.needs_rank and task.protocol["bos"]
    rows = [json.loads(line) for line in path.read_text().splitlines()[:8]]
    facts = [(row["prompt"], row[column]) for row in rows]
    _check(model, context, facts, config.generic_words, task.measure(score(model, task.requests)))


@pytest.mark.parametrize("bos", [False, True])
def test_each_metric_on_a_random_model(tmp_path, bos):
    """Words of several tokens count by their first; two words with one first token count once."""
    model, context = tiny(bos)
    words = ["the", "to", "torrid", "a", "and"]
    path = _file(tmp_path, [{"prompt": prompt, "target_true": target} for prompt, target in FACTS])
    task = FactualTask(data_files=path, generic_words=words).prepare("facts", context)
    assert len(task.protocol["generic_tokens"]) < len(words)
    facts = [(prompt.strip(), target.strip()) for prompt, target in FACTS]
    metrics = task.measure(score(model, task.requests))
    _check(model, context, facts, words, metrics)
    assert metrics["accuracy_vs_generic"].score[3] == 0, "a target that is a generic word cannot beat itself"


def test_the_original_counterfact_rows(tmp_path):
    rewrite = {"prompt": "The dog of {} is", "subject": "Anna", "target_true": {"str": "Max"}}
    _, context = tiny()
    original = FactualTask(data_files=_file(tmp_path, [{"requested_rewrite": rewrite}])).prepare("f", context)
    plain = [{"prompt": "The dog of Anna is", "ground_truth": "Max"}]
    same = FactualTask(data_files=_file(tmp_path, plain)).prepare("f", context)
    assert original.protocol == same.protocol
    assert original.requests[0].tokens.tolist() == same.requests[0].tokens.tolist()


def test_a_broken_model_is_not_merely_wrong(tmp_path):
    _, context = tiny()
    rows = [{"prompt": prompt, "attribute": target} for prompt, target in FACTS[:2]]
    task = FactualTask(data_files=_file(tmp_path, rows)).prepare("f", context)
    n = len(task.requests[0].targets)
    logprob = np.full(2 * n, -1.0)
    logprob[0] = np.nan
    zeros = np.zeros(2 * n, dtype=int)
    metrics = task.measure(Scores(logprob, zeros.astype(bool), zeros, np.array([0, n, 2 * n])))
    assert all(np.isnan(scores.score).tolist() == [True, False] for scores in metrics.values())


def test_protocol_and_bad_data(tmp_path):
    _, context = tiny()
    rows = [{"prompt": prompt, "attribute": target} for prompt, target in FACTS]
    path = _file(tmp_path, rows)
    task = FactualTask(data_files=path, limit=2).prepare("f", context)
    assert json.loads(json.dumps(task.protocol)) == task.protocol
    assert task.example_ids == ["0", "1"]
    with pytest.raises(InputError, match=r"^tasks\.f\.generic_words: name at least one word$"):
        FactualTask(data_files=path, generic_words=[]).prepare("f", context)
    with pytest.raises(InputError, match=r"^tasks\.f row 1: needs text in the columns prompt .* are prompt, object$"):
        bad = _file(tmp_path, [rows[0], {"prompt": "x", "object": "y"}])
        FactualTask(data_files=bad).prepare("f", context)
