"""Log-probabilities read off hidden states, in parts of the vocabulary and whole, against float64."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from harness.evaluation import reading
from harness.evaluation.reading import head_of, read, reading_of


def _case(vocabulary: int, n_rows: int = 23, n_entries: int = 61, dim: int = 12, bias: bool = False):
    torch.manual_seed(vocabulary)
    head = nn.Linear(dim, vocabulary, bias=bias)
    rows = torch.arange(n_rows)
    entry_row = torch.randint(0, n_rows, (n_entries,))
    hidden = 3 * torch.randn(n_rows, dim)
    targets = torch.randint(0, vocabulary, (n_entries,))
    # many targets are the argmax, as in a model that has learnt something
    targets[::2] = head(hidden).argmax(dim=1)[entry_row[::2]]
    return head, hidden.detach(), rows, entry_row, targets


def _expected(head, hidden, entry_row, targets, softcap):
    logits = nn.functional.linear(hidden.double(), head.weight.double(), None if head.bias is None else
                                  head.bias.double())
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    logprob = torch.log_softmax(logits, dim=1)[entry_row, targets]
    return logprob, logits.argmax(dim=1)[entry_row] == targets


@pytest.mark.parametrize("vocabulary", [40, 512, 1300])
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, None), (False, 2.0)])
@pytest.mark.parametrize("logit_rows", [5, 100])
@pytest.mark.parametrize("tiled", [True, False])
@torch.inference_mode()
def test_against_float64(vocabulary, bias, softcap, logit_rows, tiled, monkeypatch) -> None:
    monkeypatch.setattr(reading, "TILE_ELEMENTS", 600)  # several parts of 512 tokens, the last one shorter
    module, hidden, rows, entry_row, targets = _case(vocabulary, bias=bias)
    head = head_of(module, softcap)
    assert head.weight is module.weight
    head = head if tiled else reading.Head(head.outputs, softcap)
    plan = reading_of(rows, entry_row, targets, np.arange(100, 161), logit_rows)
    logprob, greedy, rank = read(head, hidden, plan, needs_rank=False)
    expected, expected_greedy = _expected(module, hidden, entry_row, targets, softcap)
    back = torch.from_numpy(plan.entries - 100)
    torch.testing.assert_close(logprob.double(), expected[back], rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy, expected_greedy[back]) and rank is None
    assert 20 < int(greedy.sum()) < 61


@torch.inference_mode()
def test_of_equal_logits_the_first_is_the_greedy_one(monkeypatch) -> None:
    monkeypatch.setattr(reading, "TILE_ELEMENTS", 1)
    head = nn.Linear(2, 1536, bias=False)
    head.weight.data.zero_()
    head.weight.data[[3, 7, 600, 1535], 0] = 1.0  # tied within a part and across parts
    head.weight.data[1200, 1] = 2.0
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([3, 7, 600, 1535, 1200, 1199])
    entry_row = torch.tensor([0, 0, 0, 0, 1, 1])
    plan = reading_of(torch.arange(2), entry_row, targets, np.arange(6), 10)
    _, greedy, _ = read(head_of(head), hidden, plan, needs_rank=False)
    assert greedy.tolist() == [True, False, False, False, True, False]


@torch.inference_mode()
def test_a_head_that_is_not_finite_gives_scores_that_are_not(monkeypatch) -> None:
    monkeypatch.setattr(reading, "TILE_ELEMENTS", 1)
    module, hidden, rows, entry_row, targets = _case(1300)
    plan = reading_of(rows, entry_row, targets, np.arange(61), 10)
    hidden[entry_row[4]] = torch.nan
    logprob, greedy, _ = read(head_of(module), hidden, plan, needs_rank=False)
    bad = torch.from_numpy((entry_row == entry_row[4]).numpy()[plan.entries])
    assert torch.equal(logprob.isnan(), bad) and not greedy[bad].any()


def test_a_head_with_a_hook_or_another_forward_is_applied_whole() -> None:
    hooked = nn.Linear(4, 9)
    hooked.register_forward_hook(lambda module, args, output: output)
    other = nn.Linear(4, 9)
    other.forward = other.forward
    assert head_of(hooked).weight is None and head_of(other).weight is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@torch.inference_mode()
def test_compiled_reading_is_the_plain_one() -> None:
    """Up to rounding in float32; which token is the first of the largest, and every rank, exactly, ties included."""
    module, hidden, rows, entry_row, targets = _case(1300)
    module.weight[700:] = module.weight[:600]  # every large logit is there twice
    plan = reading_of(rows, entry_row, targets, np.arange(61), logit_rows=10)
    found = {}
    for compiled in (False, True):
        head = head_of(module, 30.0, compiled)
        whole = reading.Head(lambda states: module(states).bfloat16(), 30.0, answers=head.answers)
        found[compiled] = read(whole, hidden, plan, needs_rank=True)
    plain, fused = found[False], found[True]
    torch.testing.assert_close(fused[0], plain[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(fused[1], plain[1]) and torch.equal(fused[2], plain[2])
    assert plain[1].any() and not plain[1].all()
