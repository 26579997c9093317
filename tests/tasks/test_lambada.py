"""LAMBADA against lm-eval's own lambada_openai on the same model and passages."""

import json
from dataclasses import replace

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.requests import Scores
from harness.evaluation.statistics import estimate
from harness.tasks.lambada import LambadaTask
from tests.evaluation.reference import lm_eval_run, real, score, tiny


@pytest.mark.assets
@pytest.mark.parametrize("max_length", [None, 60])
def test_scores_are_those_of_lm_eval(assets, max_length):
    """With a context of 60 tokens every passage loses its beginning."""
    model, context = real(assets / "models/stories260K")
    path = str(assets / "data/lambada/test.jsonl")
    context = replace(context, context_length=max_length or context.context_length)
    task = LambadaTask(data_files=path, limit=12).prepare("lambada", context)
    scores = score(model, task.requests)
    results, samples = lm_eval_run(
        model, context.tokenizer, "lambada/lambada_openai.yaml", {"test": path}, 12, max_length
    )
    theirs = [sample["resps"][0][0] for sample in samples]
    np.testing.assert_allclose(scores.request_logprob(), [logprob for logprob, _ in theirs], rtol=1e-5, atol=1e-4)
    assert scores.request_greedy().tolist() == [greedy for _, greedy in theirs]
    metrics = task.measure(scores)
    assert estimate(metrics["accuracy"]).value == results["acc,none"]
    assert estimate(metrics["perplexity"]).value == pytest.approx(results["perplexity,none"], rel=1e-4)
    assert max(len(request.tokens) for request in task.requests) <= context.context_length


def _file(tmp_path, *texts):
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_a_word_is_right_only_with_all_its_tokens(tmp_path):
    _, context = tiny()
    path = _file(tmp_path, "Anna gave a ball to Zebedee", "Anna gave a ball to Quentin")
    task = LambadaTask(data_files=path).prepare("lambada", context)
    sizes = [len(request.targets) for request in task.requests]
    assert min(sizes) > 1
    assert context.tokenizer.decode(task.requests[0].targets) == " Zebedee"
    logprob = np.full(sum(sizes), -0.5)
    greedy = np.ones(sum(sizes), dtype=bool)
    greedy[sizes[0]] = False
    metrics = task.measure(Scores(logprob, greedy, None, np.array([0, sizes[0], sum(sizes)])))
    assert metrics["accuracy"].score.tolist() == [1, 0]
    assert estimate(metrics["perplexity"]).value == pytest.approx(np.exp(0.25 * sum(sizes)))
    assert not metrics["perplexity"].higher_is_better


def test_a_broken_model_is_not_merely_wrong(tmp_path):
    _, context = tiny()
    task = LambadaTask(data_files=_file(tmp_path, "to Ben")).prepare("lambada", context)
    n = len(task.requests[0].targets)
    metrics = task.measure(Scores(np.full(n, np.nan), np.zeros(n, dtype=bool), None, np.array([0, n])))
    assert all(np.isnan(scores.score).all() for scores in metrics.values())


def test_one_word_alone_follows_the_prefix_token(tmp_path):
    _, context = tiny()
    task = LambadaTask(data_files=_file(tmp_path, "Anna")).prepare("lambada", context)
    assert task.requests[0].tokens[0] == context.tokenizer.bos_token_id
    assert context.tokenizer.decode(task.requests[0].targets) == " Anna"


def test_protocol_and_bad_data(tmp_path):
    _, context = tiny()
    task = LambadaTask(data_files=_file(tmp_path, "to Ben", "to Max"), limit=1).prepare("lambada", context)
    assert json.loads(json.dumps(task.protocol)) == task.protocol
    assert (task.protocol["n_examples"], task.protocol["bos"], task.example_ids) == (1, False, ["0"])
    assert LambadaTask(data_files=_file(tmp_path, "to Ben")).prepare("l", tiny(bos=True)[1]).protocol["bos"]
    with pytest.raises(InputError, match=r"^tasks\.l: set data_files"):
        LambadaTask().prepare("l", context)
    with pytest.raises(InputError, match=r"^tasks\.l row 0: a continuation .* longer than the model's context of 2$"):
        long = _file(tmp_path, "to Bartholomew-Featherstonehaugh")
        LambadaTask(data_files=long).prepare("l", replace(context, context_length=2))
