"""The scoring pass against transformers' own forward, one sequence at a time, and resumed against full, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from harness.evaluation.requests import Request, ScoredTask
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.loading import LoadedModel, loaded_from
from tests.models.tiny import TINY, tiny_config, tiny_model

SEQ2SEQ = {"t5"}
CLASSIFIERS = ("bert", "roberta", "llama", "gpt2")


def _tokens(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, 60, length)


def requests_for(model_type: str, seed: int = 0) -> list[Request]:
    """Of lengths 1 to 23: scored at some positions, one of them twice; a common prefix, a repeat, a lone token."""
    rng = np.random.default_rng(seed)
    shared = _tokens(rng, 11)
    sequences = [_tokens(rng, n) for n in (19, 7, 23, 1, 12)]
    sequences += [np.concatenate([shared, _tokens(rng, n)]) for n in (2, 5, 1)] + [shared, shared.copy()]
    found = []
    for i, tokens in enumerate(sequences):
        positions = np.sort(rng.choice(len(tokens), size=min(len(tokens), 6), replace=False))
        positions = np.sort(np.append(positions, positions[0]))
        source = _tokens(rng, (9, 14, 4)[i % 3]) if model_type in SEQ2SEQ else None
        found.append(Request(tokens, positions, rng.integers(0, 67, len(positions)), source))
    return found


def task(requests: list[Request], needs_rank: bool = True) -> ScoredTask:
    return ScoredTask("task", {}, requests, [str(i) for i in range(len(requests))], None, needs_rank)


@cache
def loaded(model_type: str) -> LoadedModel:
    return loaded_from(tiny_model(model_type))


@cache
def classifier(model_type: str) -> LoadedModel:
    torch.manual_seed(0)
    config = tiny_config(model_type, num_labels=3, initializer_range=0.2)
    model = loaded_from(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval())
    model.description = replace(
        model.description, family=replace(model.description.family, kind="classification")
    )
    return model


def class_requests(model_type: str, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    sequences = [_tokens(rng, n) for n in (19, 7, 23, 2, 12)]
    sequences.append(sequences[1])
    pairs = [(np.arange(len(t)) > len(t) // 2).astype(np.int64) if model_type == "bert" else None for t in sequences]
    return [
        Request(tokens, np.zeros(3, dtype=np.int64), np.array([2, 0, 1]), segments=segments)
        for tokens, segments in zip(sequences, pairs)
    ]


@torch.no_grad()
def reference(model: torch.nn.Module, request: Request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logprob, greedy, rank of one request: a forward of its own without padding, and float64 arithmetic on logits."""
    tokens = torch.from_numpy(request.tokens)[None]
    if request.source is not None:
        logits = model(input_ids=torch.from_numpy(request.source)[None], decoder_input_ids=tokens).logits[0]
    elif request.segments is not None:
        logits = model(input_ids=tokens, token_type_ids=torch.from_numpy(request.segments)[None]).logits
    else:
        logits = model(input_ids=tokens).logits
        logits = logits[0] if logits.ndim == 3 else logits
    rows = logits.double()[request.positions]
    chosen = rows.gather(1, torch.from_numpy(request.targets)[:, None])
    logprob = chosen[:, 0] - torch.logsumexp(rows, dim=1)
    greedy = rows.argmax(dim=1) == torch.from_numpy(request.targets)
    return logprob.numpy(), greedy.numpy(), (rows > chosen).sum(dim=1).numpy()


def assert_equal_to_transformers(model: LoadedModel, requests: list[Request], **options) -> None:
    scores = Scorer(model, {"task": task(requests)}, ScoringOptions(**options)).score("task")
    assert scores.offsets.tolist() == np.cumsum([0, *(len(r.targets) for r in requests)]).tolist()
    for i, request in enumerate(requests):
        logprob, greedy, rank = reference(model.model, request)
        own = slice(scores.offsets[i], scores.offsets[i + 1])
        np.testing.assert_allclose(scores.logprob[own], logprob, rtol=1e-5, atol=1e-6)
        assert scores.greedy[own].tolist() == greedy.tolist()
        assert scores.rank[own].tolist() == rank.tolist()


@pytest.mark.parametrize("model_type", TINY)
def test_scores_are_those_of_transformers_own_forward(model_type: str) -> None:
    model, requests = loaded(model_type), requests_for(model_type)
    assert_equal_to_transformers(model, requests)  # everything in one padded batch
    assert_equal_to_transformers(model, requests, batch_tokens=40, logit_rows=3)  # several, logits in chunks


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_class_scores_are_those_of_transformers_own_forward(model_type: str) -> None:
    model = classifier(model_type)
    assert_equal_to_transformers(model, class_requests(model_type))
    assert_equal_to_transformers(model, class_requests(model_type), batch_tokens=30, logit_rows=2)


def _zero_one_matrix(model: LoadedModel, block: int):
    """Zero the first attention matrix of a block; returns what to call to put it back."""
    matrix = next(m for m in model.matrices if m.block == block)
    original = matrix.read(model.model)
    matrix.write(model.model, torch.zeros(matrix.shape))
    return lambda: matrix.write(model.model, original)


def assert_resumed_is_full(model: LoadedModel, requests: list[Request], one_at_a_time: bool) -> None:
    """Advance block by block, or from the start to every boundary; with an edit of the block there and without."""
    tasks, options = {"task": task(requests)}, ScoringOptions(batch_tokens=60)
    full, resumed = Scorer(model, tasks, replace(options, reuse=False)), Scorer(model, tasks, options)
    whole = torch.from_numpy(full.score("task").logprob)
    seen = [whole]
    for block in range(len(model.blocks)):
        if not one_at_a_time:
            resumed = Scorer(model, tasks, options)
        resumed.advance(block)
        assert torch.equal(torch.from_numpy(resumed.score("task", block).logprob), whole)
        restore = _zero_one_matrix(model, block)
        edited = [torch.from_numpy(scorer.score("task", block).logprob) for scorer in (full, resumed)]
        restore()
        assert torch.equal(*edited)
        assert not any(torch.equal(edited[0], other) for other in seen), "the edit must matter, or nothing was tested"
        seen.append(edited[0])
    resumed.advance(0)  # back to the start
    assert torch.equal(torch.from_numpy(resumed.score("task", 0).logprob), whole)


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_resumed_at_every_block_is_the_full_forward_bit_for_bit(model_type: str, one_at_a_time: bool) -> None:
    assert_resumed_is_full(loaded(model_type), requests_for(model_type), one_at_a_time)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_a_classifier_resumed_is_the_full_forward_bit_for_bit(model_type: str) -> None:
    assert_resumed_is_full(classifier(model_type), class_requests(model_type), one_at_a_time=True)


@pytest.mark.parametrize("model_type", TINY)
def test_no_score_depends_on_what_else_is_in_its_batch(model_type: str) -> None:
    model, requests = loaded(model_type), requests_for(model_type)
    together = Scorer(model, {"task": task(requests)}).score("task")
    alone = [Scorer(model, {"task": task([request])}).score("task").logprob for request in requests]
    # float32 products of another size round otherwise, but padding and neighbours are no part of the answer
    np.testing.assert_allclose(together.logprob, np.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_a_frontier_beyond_the_edit_is_refused() -> None:
    scorer = Scorer(loaded("gpt2"), {"task": task(requests_for("gpt2"))})
    scorer.advance(2)
    with pytest.raises(ValueError, match="frontier at block 2 is beyond the edited block 1"):
        scorer.score("task", 1)


def test_tied_embeddings_are_scored_with_the_one_weight() -> None:
    model = loaded_from(tiny_model("llama", tie_word_embeddings=True))
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert_equal_to_transformers(model, requests_for("llama"))


@pytest.mark.parametrize("cap", [None, 2.0])
def test_softcap_of_gemma2(cap: float | None) -> None:
    model = loaded_from(tiny_model("gemma2", final_logit_softcapping=cap))
    assert_equal_to_transformers(model, requests_for("gemma2"))
    if cap is not None:
        open_ended = loaded_from(tiny_model("gemma2", final_logit_softcapping=None))
        capped, uncapped = (
            Scorer(m, {"task": task(requests_for("gemma2"))}).score("task").logprob for m in (model, open_ended)
        )
        assert not np.allclose(capped, uncapped, rtol=1e-2)


def test_without_rank_none_is_computed() -> None:
    scores = Scorer(loaded("gpt2"), {"task": task(requests_for("gpt2"), needs_rank=False)}).score("task")
    assert scores.rank is None
