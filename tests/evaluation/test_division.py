"""One pass over several processes (threads here; tests/engine/test_ranks.py has real ones): the numbers of one
alone, every batch run once, and all of them at the same step or none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from harness.evaluation.division import Division, LostStep
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.loading import loaded_from
from harness.tasks.generation import Decoding, continuations
from tests.evaluation.test_scoring import requests_for, task
from tests.models.tiny import tiny_model


def together(n: int, work: Callable[[Division], Any]) -> list[Any]:
    """What `work` returns, or raises, in each of n divisions that meet at every gather."""
    barrier, mailbox = threading.Barrier(n), [None] * n

    def gather_as(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            mailbox[rank] = value
            barrier.wait(60)
            everyone = list(mailbox)
            barrier.wait(60)
            return everyone
        return gather

    def run(rank: int) -> Any:
        try:
            return work(Division(rank, n, gather_as(rank)))
        except Exception as error:
            barrier.abort()
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


@pytest.mark.parametrize("n", [2, 3, 20])  # more processes than batches, too
@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_divided_scores_are_those_of_one_process(model_type, n):
    requests, options = requests_for(model_type), ScoringOptions(batch_tokens=40)
    alone = Scorer(loaded_from(tiny_model(model_type)), {"task": task(requests)}, options)
    n_batches = len(alone.packed["task"].batches)
    assert n_batches > 3
    expected = []
    for block in (0, 1):
        alone.advance(block)
        expected.append(alone.score("task", block))
    models, ran = [loaded_from(tiny_model(model_type)) for _ in range(n)], [[] for _ in range(n)]

    def work(division):
        scorer = Scorer(models[division.rank], {"task": task(requests)}, options, division)
        score_batch, found = scorer._score_batch, []
        scorer._score_batch = lambda key, *more: ran[division.rank].append(key[1]) or score_batch(key, *more)
        for block in (0, 1):
            scorer.advance(block)
            found.append(scorer.score("task", block))
        return found

    for found in together(n, work):
        for scores, of_one in zip(found, expected, strict=True):
            for name in ("logprob", "greedy", "rank", "offsets"):
                np.testing.assert_array_equal(getattr(scores, name), getattr(of_one, name))
    # each batch in one process, once in each of two passes, and no process more than its share
    assert sorted(sum(ran, [])) == sorted([*range(n_batches)] * 2)
    assert max(map(len, ran)) == 2 * -(-n_batches // n)


def test_divided_texts_are_those_of_one_process(monkeypatch):
    class Letters:
        """A tokenizer of single characters."""
        pad_token_id, unk_token_id, eos_token_id = 0, 1, 2

        def __call__(self, text, **kwargs):
            return SimpleNamespace(input_ids=[3 + ord(c) % 60 for c in text])

        def encode(self, text, **kwargs):
            return [3 + ord(c) % 60 for c in text]

        def decode(self, tokens, **kwargs):
            return "".join(chr(97 + int(t)) for t in tokens)

        def batch_decode(self, rows):
            return [self.decode(row) for row in rows]

    monkeypatch.setattr("harness.tasks.tokenization.encode", lambda tokenizer, text: tokenizer.encode(text))
    contexts = ["a" * k + "xyz" for k in (1, 5, 2, 9, 4, 7, 3)]

    models = [tiny_model("llama") for _ in range(3)]  # here, because their seed is global

    def generate(division=None):
        model = models[division.rank if division else 0]
        loaded = SimpleNamespace(model=model, tokenizer=Letters(), context_length=40, device=torch.device("cpu"))
        return continuations(loaded, contexts, Decoding(["q"], 6), division, batch_tokens=40)

    alone = generate()
    assert len(set(alone)) > 3
    assert together(3, generate) == [alone] * 3


def test_an_exception_of_one_is_raised_in_all():
    def work(division):
        def compute():
            if division.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if division.rank == 2:
                raise ValueError("later in the order")
            return division.rank

        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
            division.together("scoring", compute)
        return getattr(caught.value, "__notes__", [""])[0], division.together("after it", lambda: division.rank)

    notes, after = zip(*together(3, work))
    assert after == ([0, 1, 2],) * 3
    assert notes[1] == "" and all("in process 1" in notes[r] and "line" in notes[r] for r in (0, 2))


def test_an_exception_that_does_not_pickle_travels_as_its_text():
    class Local(Exception):
        pass

    def work(division):
        with pytest.raises(Exception, match="of this function") as caught:
            division.together("scoring", lambda: (_ for _ in ()).throw(Local("of this function")))
        return type(caught.value).__name__

    assert together(2, work) == ["Local", "RuntimeError"]


def test_processes_at_different_steps_do_not_exchange_numbers():
    def work(division):
        division.together("a", lambda: 0)
        if division.rank == 1:
            division.together("only here", lambda: 0)
        division.together("b", lambda: 0)

    assert all(isinstance(error, LostStep) for error in together(2, work))


def test_a_process_that_is_gone_is_noticed():
    def gather(value):
        raise ConnectionError("closed by peer")

    with pytest.raises(LostStep, match="at scoring: another process of this launch has ended"):
        Division(0, 2, gather).together("scoring", lambda: 1)


def test_alone_nothing_is_exchanged():
    division = Division()
    assert division.own(3) == range(3)
    assert division.together("scoring", lambda: 7) == [7]
    with pytest.raises(KeyError):
        division.together("scoring", lambda: {}["absent"])
