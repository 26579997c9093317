"""What the last block leaves out at positions that are not scored, against the full forward, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.evaluation.inner import forward_replaced
from harness.evaluation.last_block import FEWEST_ROWS, LastBlock, computed_positions
from harness.evaluation.requests import Request
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel, loaded_from
from harness.models.targets import TargetSettings, expand_targets
from harness.spectral.regions import large
from tests.evaluation.test_scoring import loaded, task
from tests.models.tiny import TINY, tiny_model

WHOLE = ScoringOptions(reuse=False)
MODULES = {
    "recall": {"self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "gptj": {"attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
    "opt": {"self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"},
    "phi3": {"self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe"), set()),
}
LLAMA = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
CAUSAL = [name for name in TINY if name not in ("bert", "roberta", "t5")]


def requests(n: int = 12, length: int = 17, scored: int = 4) -> list[Request]:
    """Sequences of one length, each scored at its last positions; two of them begin with the same tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, (n, length))
    tokens[1, :9] = tokens[0, :9]
    positions = np.arange(length - scored, length)
    return [Request(row, positions, rng.integers(0, 60, scored)) for row in tokens]


def positions_seen(model: LoadedModel, scorer: Scorer, *block_and_edited) -> dict[str, list[int]]:
    """The number of positions at which each module of the last block is applied in a pass, by its path in the block."""
    seen: dict[str, list[int]] = {}

    def noted(path, forward):
        def run(hidden, *args, **kwargs):
            seen.setdefault(path, []).append(hidden[..., 0].numel())
            return forward(hidden, *args, **kwargs)
        return run

    with ExitStack() as stack:
        for path, module in model.blocks[-1].named_modules():
            if isinstance(module, torch.nn.Linear) or path.endswith(("c_proj", "c_fc", "c_attn", "mlp.act_fn")):
                stack.enter_context(forward_replaced(module, noted(path, module.forward)))
        scorer.score("task", *block_and_edited)
    return seen


@pytest.mark.parametrize("model_type", CAUSAL)
def test_modules_of_every_family_see_the_scored_positions_and_give_the_bits_of_all(model_type: str) -> None:
    model, tasks = loaded(model_type), {"task": task(requests())}
    expected = MODULES.get(model_type, LLAMA)
    linear = LastBlock(model)._linear
    assert {path for path, module in model.blocks[-1].named_modules() if module in linear} == expected
    options = ScoringOptions(share_context=False)
    whole, spared = (Scorer(model, tasks, one) for one in (replace(options, reuse=False), options))
    numbers = whole.score("task")
    for _ in range(3):
        scores = spared.score("task")
        assert scores.logprob.tolist() == numbers.logprob.tolist() and scores.rank.tolist() == numbers.rank.tolist()
    scored, fed = 12 * 4, 12 * 17
    for path, counts in positions_seen(model, spared).items():
        assert counts == [scored if path in expected else fed], path
    assert all(counts == [fed] for counts in positions_seen(model, whole).values())
    spared.advance(len(model.blocks) - 1)
    assert spared.score("task", len(model.blocks) - 1).logprob.tolist() == numbers.logprob.tolist()


def test_edited_weights_and_branches_in_turn_give_the_numbers_of_the_whole_pass() -> None:
    """With resuming inside the block: what one kind of pass keeps must not reach the other."""
    model, tasks = loaded_from(tiny_model("llama")), {"task": task(requests())}
    options = ScoringOptions(share_context=False)
    whole, spared = (Scorer(model, tasks, one) for one in (replace(options, reuse=False), options))
    whole.score("task"), spared.score("task")
    last, cache = len(model.blocks) - 1, DecompositionCache(model, 2**30)
    spared.advance(last)
    for target in expand_targets(TargetSettings("matrix", blocks=[last]), model.matrices):
        for edit in ("weight", "branch", "weight", "branch"):
            with ablated(model, Ablation(target, large(0.5)), cache, edit):
                edited = [one for one in model.matrices if one.name in target.matrices]
                found = spared.score("task", last, edited).logprob.tolist()
                assert found == whole.score("task").logprob.tolist(), (target.matrices, edit)
                if edit == "branch":
                    assert all(counts == [12 * 17] for counts in positions_seen(model, spared, last).values())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_last_elements_of_an_array_have_the_bits_of_the_whole_pass(model_type: str) -> None:
    """SiLU and GELU by tanh compute them in another way, which shows in some values only, and so in some edits."""
    wide = {"intermediate_size": 43} if model_type == "llama" else {"n_inner": 43}
    model, tasks = loaded_from(tiny_model(model_type, **wide)), {"task": task(requests(n=13, scored=3))}
    options = ScoringOptions(share_context=False)
    whole, spared = (Scorer(model, tasks, one) for one in (replace(options, reuse=False), options))
    up, down = (next(one for one in model.matrices if (one.block, one.layer_type) == (2, name))
                for name in ("gate_proj" if model_type == "llama" else "up_proj", "down_proj"))
    down.write(model.model, 100 * down.read(model.model))  # so that the stream does not hide the last bits
    original = up.read(model.model)
    for i in range(60):
        up.write(model.model, (0.5 + 0.01 * i) * original)
        assert spared.score("task").logprob.tolist() == whole.score("task").logprob.tolist()
    assert spared._last_block._positions["task", 0] is not None


def test_all_positions_are_computed_where_most_are_scored() -> None:
    model = loaded("llama")
    scorer = Scorer(model, {"task": task(requests(scored=14))}, ScoringOptions(share_context=False))
    scorer.score("task")
    assert all(counts == [12 * 17] for counts in positions_seen(model, scorer).values())


def test_few_scored_positions_are_computed_with_some_others() -> None:
    """Products of a few rows have kernels of their own, which add in another order."""
    model, tasks = loaded("llama"), {"task": task(requests(n=6, scored=1))}
    whole, spared = (Scorer(model, tasks, ScoringOptions(share_context=False, reuse=one)) for one in (False, True))
    for _ in range(2):
        assert spared.score("task").logprob.tolist() == whole.score("task").logprob.tolist()
    seen = positions_seen(model, spared)
    assert seen["mlp.up_proj"] == seen["self_attn.q_proj"] == [FEWEST_ROWS] and seen["self_attn.k_proj"] == [6 * 17]
    assert computed_positions(6, 102) == FEWEST_ROWS and computed_positions(6, 40) == 40
    assert computed_positions(75, 100) == 75 and computed_positions(76, 100) == 100


def test_nothing_is_left_out_if_the_bits_differ_or_show_nothing() -> None:
    """A feed-forward layer that mixes positions, a norm that does, a sum of other bits in few rows, all of it removed.
    """
    tasks = {"task": task(requests())}

    def mixing(forward):
        return lambda hidden: forward(hidden + hidden.flatten(0, -2).mean(dim=0))

    def another_sum(forward):
        return lambda hidden: forward(hidden) * (1 + 2e-7 * (hidden[..., 0].numel() < 100))

    def removed(forward):
        return lambda hidden: forward(hidden) * 0

    norm, down = "post_attention_layernorm", "mlp.down_proj"
    for name, changed in (("mlp", mixing), (norm, mixing), (down, mixing), (down, another_sum), (down, removed)):
        model = loaded_from(tiny_model("llama"))
        module = model.blocks[-1].get_submodule(name)
        with forward_replaced(module, changed(module.forward)):
            whole, spared = Scorer(model, tasks, WHOLE), Scorer(model, tasks)
            for _ in range(3):
                assert spared.score("task").logprob.tolist() == whole.score("task").logprob.tolist()
            assert set(spared._last_block._positions.values()) == {None}, (name, changed)


def test_trees_and_several_batches_and_forgotten_tasks() -> None:
    model, tasks = loaded("llama"), {name: replace(task(requests()), name=name) for name in ("task", "other")}
    for options in (ScoringOptions(), ScoringOptions(batch_tokens=100)):
        whole, spared = Scorer(model, tasks, replace(options, reuse=False)), Scorer(model, tasks, options)
        for _ in range(2):
            assert spared.score("task").logprob.tolist() == whole.score("task").logprob.tolist()
        spared.score("other")
        assert {key[0] for key in spared._last_block._positions} == {"task", "other"}
        spared.forget("other")
        assert {key[0] for key in spared._last_block._positions} == {"task"}
