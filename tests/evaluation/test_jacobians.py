"""The ways to a residual Jacobian agree for every causal family; the reference is autograd through the whole model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from harness.evaluation.jacobians import block_calls, one_token_maps, whole_sequence_maps
from harness.models.families import FAMILIES
from harness.models.loading import loaded_from
from harness.models.prefix import takes_cache
from tests.models.tiny import TINY, tiny_model

CAUSAL = [name for name in TINY if FAMILIES[name].kind == "causal"]


def loaded(model_type: str, dtype: torch.dtype = torch.float64, **overrides):
    model = tiny_model(model_type, dtype, **overrides).requires_grad_(False)
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # the fused one has no float64
    return loaded_from(model)


@contextmanager
def float64_alone():
    """Let models compute in float64 alone: transformers casts to float32 inside of norms, softmax and routers."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def kept(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64:
            args = tuple(torch.float64 if one == torch.float32 else one for one in args)
            kwargs = {key: torch.float64 if one == torch.float32 else one for key, one in kwargs.items()}
        return to(tensor, *args, **kwargs)

    def soft(tensor, *args, dtype=None, **kwargs):
        return softmax(tensor, *args, dtype=tensor.dtype if tensor.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", kept)
        patch.setattr(torch.Tensor, "float", lambda tensor: kept(tensor, torch.float32))
        patch.setattr(torch.nn.functional, "softmax", soft)
        yield


@pytest.fixture
def true_float64():
    with float64_alone():
        yield


def tokens(n: int = 19, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (1, n), generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_jacobians_of_every_family_are_those_of_the_model_itself(model_type, true_float64):
    """The hidden state after a block as a function of the one before it, through the model's own forward and hooks."""
    one = loaded(model_type)
    prompt = tokens()
    for block in range(len(one.blocks)):
        expected = reference(one, prompt, block)
        found = [whole_sequence_maps(one, prompt)[block].dense()]
        if takes_cache(one.model):
            found.append(one_token_maps(one, prompt)[block].dense())
        for jacobian in found:
            assert relative(jacobian, expected) < 1e-10


def reference(one, prompt, block):
    """d (output of the block - its input) / d input at the last token, one finite-free column of autograd at a time."""
    rows = []
    d = block_calls(one, prompt)[block].entering.shape[-1]
    for out in range(d):
        state = {}

        def enter(module, args, kwargs, state=state):
            hidden = args[0] if args else kwargs["hidden_states"]
            state["x"] = hidden.detach().clone().requires_grad_(True)
            return ((state["x"], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state["x"]})

        def leave(module, args, kwargs, output, state=state, out=out):
            hidden = output[0] if isinstance(output, tuple) else output
            state["row"] = torch.autograd.grad((hidden - state["x"])[0, -1, out], state["x"])[0][0, -1]

        hooks = [one.blocks[block].register_forward_pre_hook(enter, with_kwargs=True),
                 one.blocks[block].register_forward_hook(leave, with_kwargs=True)]
        one.model(input_ids=prompt)
        for hook in hooks:
            hook.remove()
        rows.append(state["row"])
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_one_token_path_products_and_whole_sequence_agree(model_type, dtype, limit, true_float64):
    one = loaded(model_type, dtype)
    prompt = tokens(23, seed=1)
    whole = whole_sequence_maps(one, prompt)
    maps = one_token_maps(one, prompt) if takes_cache(one.model) else whole
    for fast, slow in zip(maps, whole, strict=True):
        expected = slow.dense()
        assert relative(fast.row, slow.row) < limit
        assert relative(fast.added(fast.row[None]), slow.added(slow.row[None])) < limit
        assert relative(fast.dense(), expected) < limit
        x = torch.randn(5, 24, dtype=dtype, generator=torch.Generator().manual_seed(2))
        assert relative(fast.forward(x), x @ expected.T) < 2 * limit
        assert relative(fast.adjoint(x), x @ expected) < 2 * limit


def test_the_first_token_has_no_prefix():
    one = loaded("llama")
    prompt = tokens(1)
    for fast, slow in zip(one_token_maps(one, prompt), whole_sequence_maps(one, prompt)):
        assert relative(fast.dense(), slow.dense()) < 1e-10


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_jacobians_between_tokens(model_type, true_float64):
    """From an earlier token to the last one; a token outside of a sliding window has no influence."""
    one = loaded(model_type)
    prompt = tokens(20)
    for block, row in enumerate(whole_sequence_maps(one, prompt, 3)):
        found = row.dense()
        x = row.row + 1e-5 * torch.eye(24, dtype=torch.float64)
        y = row.row - 1e-5 * torch.eye(24, dtype=torch.float64)
        finite = ((row.added(x) - row.added(y)) / 2e-5).T
        sliding = model_type == "gemma2" and block == 1  # a window of 8 tokens
        assert torch.linalg.vector_norm(found) == 0 if sliding else relative(found, finite) < 1e-6


def test_the_last_block_ends_before_the_final_norm():
    """The last of transformers' hidden states carries the final norm, the output of the last block does not."""
    one = loaded("llama")
    prompt = tokens()
    calls = block_calls(one, prompt)
    states = one.model(prompt, output_hidden_states=True).hidden_states
    for block, call in enumerate(calls):
        assert torch.equal(call.entering, states[block])
    assert torch.equal(one.model.model.norm(calls[-1].leaving), states[-1])
    assert not torch.allclose(calls[-1].leaving, states[-1])


def test_nothing_is_left_behind():
    """Neither gradients nor hooks nor a longer cache: the second time gives the same bits."""
    one = loaded("mistral", torch.float32)
    prompt = tokens(30)
    maps = one_token_maps(one, prompt)
    first = [row.dense() for row in maps]
    for row in maps:
        row.forward(torch.ones(2, 24))
    assert all(torch.equal(row.dense(), before) for row, before in zip(maps, first))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in one.model.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in one.blocks)
