"""Resumed inside the edited block against the full forward, bit for bit, and what of the block is not run again."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch

from harness.evaluation.inner import forward_replaced
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.branches import owner_of
from tests.evaluation.test_scoring import loaded, requests_for, task
from tests.models.tiny import TINY


def runs_of(modules, work) -> dict[str, int]:
    """How often the forward of each module really runs during `work`."""
    counts = dict.fromkeys(modules, 0)

    def counted(name, forward):
        def run(*args, **kwargs):
            counts[name] += 1
            return forward(*args, **kwargs)
        return run

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(forward_replaced(module, counted(name, module.forward)))
        work()
    return counts


@pytest.mark.parametrize("model_type", TINY)
def test_every_matrix_of_a_block_gives_the_numbers_of_the_full_forward(model_type: str) -> None:
    model, tasks = loaded(model_type), {"task": task(requests_for(model_type))}
    options = ScoringOptions(batch_tokens=60)
    full, inner = Scorer(model, tasks, replace(options, reuse=False)), Scorer(model, tasks, options)
    block = len(model.blocks) - 1
    inner.advance(block)
    for matrix in [one for one in model.matrices if one.block == block]:
        original, seen = matrix.read(model.model), []
        for factor in (0.0, 0.5, 0.5):  # the first fills what is kept, the others use it
            matrix.write(model.model, factor * original)
            resumed, expected = (scorer.score("task", *more) for scorer, more in
                                 ((inner, (block, [matrix])), (full, ())))
            matrix.write(model.model, original)
            assert resumed.logprob.tolist() == expected.logprob.tolist()
            seen.append(resumed.logprob.tolist())
        assert seen[0] != seen[1] or matrix.expert is not None, "the edit must matter"


def test_what_ran_before_the_edited_matrix_is_not_run_again() -> None:
    model, tasks = loaded("llama"), {"task": task(requests_for("llama"))}
    scorer = Scorer(model, tasks)
    n_batches = len(scorer.packed["task"].batches)
    of_block = {one.layer_type: one for one in model.matrices if one.block == 1}
    modules = {name: owner_of(model.model, one) for name, one in of_block.items()}
    modules["attention"] = model.model.get_submodule("model.layers.1.self_attn")
    scorer.advance(1)
    before = {"down_proj": {"attention", "gate_proj", "up_proj"}, "up_proj": {"attention", "gate_proj"},
              "gate_proj": {"attention"}, "o_proj": {"q_proj", "k_proj", "v_proj"}, "q_proj": set()}
    for edited, spared in before.items():
        for _ in range(3):
            scorer.score("task", 1, [of_block[edited]])
        inside = {"q_proj", "k_proj", "v_proj", "o_proj"} if "attention" in spared else set()
        counts = runs_of(modules, partial(scorer.score, "task", 1, [of_block[edited]]))
        assert counts == {name: 0 if name in spared | inside else n_batches for name in modules}
    # several matrices: what runs before the first of them; another block; and an unknown edit: everything runs
    for more in ([of_block["down_proj"], of_block["q_proj"]], [model.matrices[-1]], []):
        counts = runs_of(modules, partial(scorer.score, "task", 1, more))
        assert set(counts.values()) == {n_batches}


def test_nothing_is_kept_where_it_does_not_fit_or_nothing_is_reused() -> None:
    model, tasks = loaded("llama"), {"task": task(requests_for("llama"))}
    down = next(one for one in model.matrices if (one.block, one.layer_type) == (1, "down_proj"))
    expected = Scorer(model, tasks).score("task").logprob.tolist()
    for options, budget in ((ScoringOptions(), 100), (ScoringOptions(reuse=False), None)):
        scorer = Scorer(model, tasks, options)
        if budget is not None:
            scorer._inner._budget = budget
        scorer.advance(1)
        for _ in range(3):
            assert scorer.score("task", 1, [down]).logprob.tolist() == expected
        assert not scorer._inner._kept
    scorer = Scorer(model, tasks)
    scorer.advance(1)
    for _ in range(3):
        scorer.score("task", 1, [down])
    assert scorer._inner._kept
    scorer.leave_device()  # memory ran out
    assert scorer.score("task", 1, [down]).logprob.tolist() == expected and not scorer._inner._kept


def test_a_pass_without_memory_beside_what_is_kept_is_done_without_it(monkeypatch) -> None:
    model, tasks = loaded("llama"), {"task": task(requests_for("llama"))}
    down = next(one for one in model.matrices if (one.block, one.layer_type) == (1, "down_proj"))
    scorer = Scorer(model, tasks)
    scorer.advance(1)
    expected = [scorer.score("task", 1, [down]).logprob.tolist() for _ in range(3)][-1]
    tried, real = [], scorer._pass

    def short(key, needs_rank):
        tried.append(scorer._inner.keeps)
        if scorer._inner.keeps:
            raise torch.OutOfMemoryError("out of memory")
        return real(key, needs_rank)

    monkeypatch.setattr(scorer, "_pass", short)
    assert scorer.score("task", 1, [down]).logprob.tolist() == expected
    assert tried.count(True) == 1 and not scorer._inner._kept
