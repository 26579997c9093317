"""Packed trees: what is fed and what each token sees, against requests fed one by one through every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.evaluation import scoring
from harness.evaluation.packing import Sharing, pack, sharing_of, tree_mask
from harness.evaluation.requests import Request, ScoredTask
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.families import FAMILIES, skeleton
from harness.models.loading import loaded_from
from tests.models.tiny import TINY, tiny_config, tiny_model

FREE = Sharing(0.0, 10**9)  # attention costs nothing: whatever begins alike shares a row
CAUSAL = [name for name in TINY if FAMILIES[name].kind == "causal"]
UNLIMITED = {"mistral": {"sliding_window": None}, "phi3": {"sliding_window": None}}
UNLIMITED |= {name: {"sliding_window": 64} for name in ("gemma2", "gemma3_text")}
UNLIMITED["gemma3"] = {"text_config": {**TINY["gemma3"]["text_config"], "sliding_window": 64}}


def choices(rng: np.random.Generator, context: np.ndarray, lengths: tuple[int, ...]) -> list[Request]:
    """Continuations of these lengths, each scored whole."""
    found = []
    for length in lengths:
        continuation = rng.integers(3, 60, length)
        tokens = np.concatenate([context, continuation[:-1]])
        found.append(Request(tokens, np.arange(len(context) - 1, len(tokens)), continuation))
    return found


def multiple_choice(seed: int = 0) -> list[Request]:
    """Three questions behind one few-shot prefix, one without, a repeat, and a choice that is a prefix of another."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, 60, 14)
    found = []
    for length in (5, 2, 7):
        found += choices(rng, np.concatenate([prefix, rng.integers(3, 60, length)]), (1, 4, 3, 6))
    found += choices(rng, rng.integers(3, 60, 9), (2, 2))
    found.append(found[1])
    longest = found[3]
    found.append(Request(longest.tokens[:-2], longest.positions[:-2], longest.targets[:-2]))
    return found


def task(requests: list[Request], needs_rank: bool = False) -> ScoredTask:
    return ScoredTask("task", {}, requests, [str(i) for i in range(len(requests))], None, needs_rank)


def _scores(model, requests, monkeypatch, sharing, **options):
    monkeypatch.setattr(scoring, "sharing_of", lambda model, family: sharing)
    scorer = Scorer(model, {"task": task(requests)}, ScoringOptions(**options))
    return scorer, scorer.score("task")


def test_every_token_sees_its_own_sequence_and_nothing_else() -> None:
    requests = multiple_choice()
    packed = pack(requests, 4096, FREE)
    (trees,) = packed.batches
    visible = tree_mask(trees.last, torch.float32)[:, 0] == 0
    assert visible.shape == (*trees.input_ids.shape, trees.input_ids.shape[1])
    width = trees.input_ids.shape[1]
    asked = {int(entry): i for i, stop in enumerate(packed.offsets[1:]) for entry in range(packed.offsets[i], stop)}
    for entry, row, target in zip(trees.entries, trees.entry_row.tolist(), trees.targets.tolist()):
        request = requests[asked[int(entry)]]
        place = int(entry) - packed.offsets[asked[int(entry)]]
        b, t = divmod(int(trees.rows[row]), width)
        seen = visible[b, t].nonzero().flatten()
        length = request.positions[place] + 1
        assert trees.input_ids[b, seen].tolist() == request.tokens[:length].tolist()
        assert trees.position_ids[b, seen].tolist() == list(range(length))
        assert target == request.targets[place]
    assert sorted(trees.entries) == list(range(packed.n_entries))


def test_shared_tokens_are_fed_once() -> None:
    requests = multiple_choice()
    packed = pack(requests, 4096, FREE)
    prefixes = {tuple(request.tokens[: n + 1]) for request in requests for n in range(len(request.tokens))}
    assert packed.n_tokens == len(prefixes)
    assert packed.n_rows == len({tuple(r.tokens[: p + 1]) for r in requests for p in r.positions})
    one_by_one = sum(len(request.tokens) for request in requests)
    assert packed.n_tokens < pack(requests, 4096).n_tokens < one_by_one


@pytest.mark.parametrize("batch_tokens", [30, 60, 200])
def test_no_batch_exceeds_its_budget_of_tokens(batch_tokens: int) -> None:
    for sharing in (None, FREE, Sharing(0.05, 10**9)):
        for batch in pack(multiple_choice(), batch_tokens, sharing).batches:
            assert batch.input_ids.numel() <= batch_tokens or len(batch.lengths) == 1
            assert (batch.last is None) or sharing is not None


def test_long_rows_do_not_pad_short_ones() -> None:
    """Every cut of the sorted lengths into batches, tried one by one, is at least as dear as the one found."""
    rng = np.random.default_rng(5)
    requests = [Request(rng.integers(3, 60, n), np.array([n - 1]), np.array([4])) for n in
                (400, 390, 60, 58, 57, 30, 9, 8, 7, 7, 3)]
    widths = [len(request.tokens) for request in requests]
    for budget in (100, 500, 10_000):
        found = [tuple(batch.lengths.tolist()) for batch in pack(requests, budget).batches]
        assert sorted(n for batch in found for n in batch) == sorted(widths)
        cheapest = np.inf
        for cuts in range(2 ** (len(widths) - 1)):
            edges = [0, *(i + 1 for i in range(len(widths) - 1) if cuts >> i & 1), len(widths)]
            batches = [widths[a:b] for a, b in zip(edges, edges[1:])]
            if all(len(batch) == 1 or len(batch) * batch[0] <= budget for batch in batches):
                cheapest = min(cheapest, sum(len(batch) * batch[0] + 128 for batch in batches))
        assert sum(len(batch) * batch[0] + 128 for batch in found) == cheapest


def test_the_cut_is_the_cheapest_of_all() -> None:
    requests = multiple_choice(3)
    lengths = sorted({r.tokens.tobytes(): r.tokens for r in requests}.values(), key=lambda t: t.astype("<i8").tobytes())
    leaves = [t for i, t in enumerate(lengths) if i + 1 == len(lengths) or not
              lengths[i + 1].tobytes().startswith(t.tobytes())]
    n = len(leaves)
    prefixes = {
        (a, b): len({tuple(leaf[: k + 1]) for leaf in leaves[a:b] for k in range(len(leaf))})
        for a in range(n) for b in range(a + 1, n + 1)
    }
    for pair in (0.0, 0.004, 0.02, 0.1, 1.0):
        packed = pack(requests, 4096, Sharing(pair, 10**9))
        found = 0.0
        for batch in packed.batches:
            for length in batch.lengths.tolist():
                found += length + pair * length**2 / (2 if batch.last is None else 1)
        cheapest = min(_cost(prefixes, cuts, n, pair) for cuts in range(2 ** (n - 1)))
        assert found == pytest.approx(cheapest, rel=1e-12)


def _cost(prefixes: dict[tuple[int, int], int], cuts: int, n: int, pair: float) -> float:
    """Of n leaves in their order, cut after leaf i where bit i is set; prefixes: distinct ones of leaves a..b-1."""
    edges = [0, *(i + 1 for i in range(n - 1) if cuts >> i & 1), n]
    counts = [(prefixes[a, b], b - a) for a, b in zip(edges, edges[1:])]
    return sum(tokens + pair * tokens**2 / (2 if leaves == 1 else 1) for tokens, leaves in counts)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_flag_of_every_family_is_right(model_type: str, monkeypatch) -> None:
    """Where it is set, trees give the numbers of sequences fed one by one; where it is not, they do not."""
    model = loaded_from(tiny_model(model_type, **UNLIMITED.get(model_type, {})))
    requests = multiple_choice()
    _, alone = _scores(model, requests, monkeypatch, None, batch_tokens=1)
    assert (sharing_of(model.model, model.description.family) is not None) == FAMILIES[model_type].trees
    scorer, shared = _scores(model, requests, monkeypatch, FREE)
    assert any(batch.last is not None for batch in scorer.packed["task"].batches)
    if FAMILIES[model_type].trees:
        np.testing.assert_allclose(shared.logprob, alone.logprob, rtol=1e-5, atol=1e-6)
        assert shared.greedy.tolist() == alone.greedy.tolist()
    else:
        assert not np.allclose(shared.logprob, alone.logprob, rtol=1e-3)


@pytest.mark.parametrize("model_type", [name for name in TINY if name not in CAUSAL])
def test_models_that_read_both_ways_share_nothing(model_type: str) -> None:
    assert sharing_of(skeleton(tiny_config(model_type)), FAMILIES[model_type]) is None


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "gemma3"])
def test_longer_than_a_sliding_window_is_fed_alone(model_type: str) -> None:
    model = loaded_from(tiny_model(model_type))  # windows of 8 tokens
    assert sharing_of(model.model, model.description.family).deepest == 8
    requests = multiple_choice()
    short = choices(np.random.default_rng(1), np.arange(3, 8), (2, 3, 1))
    scorers = [Scorer(model, {"task": task(requests + short)}, ScoringOptions(share_context=s)) for s in (True, False)]
    assert any(batch.last is not None for batch in scorers[0].packed["task"].batches)
    np.testing.assert_allclose(*(scorer.score("task").logprob for scorer in scorers), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_trees_in_either_attention(implementation: str, monkeypatch) -> None:
    model = loaded_from(tiny_model("llama", attn_implementation=implementation))
    _, alone = _scores(model, multiple_choice(), monkeypatch, None)
    _, shared = _scores(model, multiple_choice(), monkeypatch, FREE)
    np.testing.assert_allclose(shared.logprob, alone.logprob, rtol=1e-5, atol=1e-6)


def test_trees_in_low_precision_err_no_more_than_sequences_do(monkeypatch) -> None:
    exact = Scorer(loaded_from(tiny_model("llama")), {"task": task(multiple_choice())}).score("task").logprob
    model = loaded_from(tiny_model("llama", torch.bfloat16))
    errors = [np.abs(_scores(model, multiple_choice(), monkeypatch, sharing)[1].logprob - exact).mean()
              for sharing in (None, FREE)]
    assert 1e-4 < errors[1] < 1.5 * errors[0]


def test_another_attention_gets_no_trees() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert sharing_of(model, FAMILIES["llama"]) is None


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_trees_resumed_are_trees_run_whole_bit_for_bit(model_type: str, monkeypatch) -> None:
    model = loaded_from(tiny_model(model_type))
    scorer, whole = _scores(model, multiple_choice(), monkeypatch, FREE, batch_tokens=50)
    assert len(scorer.packed["task"].batches) > 1
    for block in range(1, len(model.blocks)):
        scorer.advance(block)
        assert scorer.score("task", block).logprob.tolist() == whole.logprob.tolist()


def test_scores_do_not_depend_on_the_other_tasks_of_a_study() -> None:
    model = loaded_from(tiny_model("llama"))
    requests = multiple_choice()
    alone = Scorer(model, {"task": task(requests)}).score("task")
    other = replace(task(multiple_choice(9) + requests[:3]), name="other")
    beside = Scorer(model, {"other": other, "task": task(requests)}).score("task")
    assert alone.logprob.tolist() == beside.logprob.tolist()


@pytest.mark.assets
def test_questions_of_a_real_model(assets) -> None:
    """Real weights, contexts that begin alike by chance or not at all, and what a task costs with trees and without."""
    from harness.models.loading import load
    from harness.models.settings import ModelSettings

    model = load(ModelSettings(name=str(assets / "models" / "stories260K"), device="cpu"))
    rng = np.random.default_rng(0)
    requests = []
    for question in ("Once upon a time there was a little girl", "One day, Tom went to the park with his mom and"):
        context = np.array(model.tokenizer.encode(question))
        requests += choices(rng, context, (1, 2, 3, 4))
    scorer = Scorer(model, {"task": task(requests)})
    plain = Scorer(model, {"task": task(requests)}, ScoringOptions(share_context=False))
    assert scorer.packed["task"].n_tokens < plain.packed["task"].n_tokens
    shared, alone = scorer.score("task"), plain.score("task")
    np.testing.assert_allclose(shared.logprob, alone.logprob, rtol=1e-5)
    assert shared.greedy.tolist() == alone.greedy.tolist()
