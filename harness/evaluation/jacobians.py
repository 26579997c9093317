"""The residual Jacobian of one block at one token, dense or by products, from the block's own forward.

A block adds f to the residual stream. Its Jacobian from input token t_in to output token t_out is J = d f_out / d x_in,
[d, d], with outputs as rows. Every block is called as the model calls it, with the arguments that the model itself
computes (masks, position embeddings), between true block boundaries: the final norm is no part of the last block.

For t_in = t_out = t the block is a map of one row, because the keys and values of earlier tokens are constants: it is
run on that row alone with a read-only cache of the tokens before. For other pairs, and for models that take no cache,
it is run on the whole sequence up to t_out.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.experts import plain_experts
from harness.models.loading import LoadedModel
from harness.models.prefix import cache_of, takes_cache

CHUNK = 64  # rows or cotangents at once; more would materialise more copies of the cached keys


@dataclass(frozen=True)
class BlockCall:
    """One call of a block by its model. args, kwargs: without the hidden states. entering, leaving: [1, T, d]."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    entering: Tensor
    leaving: Tensor
    keyword: str | None = None  # under which the model passes the hidden states, if it names them

    def run(self, hidden: Tensor) -> Tensor:
        """Return the output [B, T, d] of the block for hidden states [B, T, d], with the arguments of this call."""
        with plain_experts(self.block):
            if self.keyword is None:
                output = self.block(hidden, *self.args, **self.kwargs)
            else:
                output = self.block(*self.args, **{self.keyword: hidden}, **self.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return output.to(hidden.device)


@torch.no_grad()
def block_calls(loaded: LoadedModel, tokens: Tensor, cache: Any = None) -> list[BlockCall]:
    """Return the calls of all blocks in one forward pass over tokens, int64 [1, T], after those of a cache."""
    calls: list[BlockCall] = []
    entered: list[tuple[Any, ...]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if args:
            entered.append((args[0], args[1:], dict(kwargs), None))
        else:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            entered.append((kwargs["hidden_states"], (), rest, "hidden_states"))

    def after(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, rest, named, keyword = entered.pop()
        leaving = output[0] if isinstance(output, tuple) else output
        calls.append(BlockCall(module, rest, named, hidden.detach(), leaving.detach().to(hidden.device), keyword))

    inputs: dict[str, Any] = {"input_ids": tokens.to(loaded.device)}
    if cache is not None:
        inputs |= {"past_key_values": cache, "use_cache": True}
    elif takes_cache(loaded.model):
        inputs["use_cache"] = False
    with ExitStack() as hooks:
        for block in loaded.blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        loaded.model.base_model(**inputs)
    return calls


@dataclass(frozen=True)
class RowMap:
    """The map from one row that enters a block to one row of what the block adds.

    call: the call of the block, whose last row is the output. row_in: the input row. Both are the only row of a call
    of the one-token path.
    """

    call: BlockCall
    row_in: int = -1

    @property
    def row(self) -> Tensor:
        """The row at which the derivative is taken, [d]."""
        return self.call.entering[0, self.row_in]

    def added(self, rows: Tensor) -> Tensor:
        """Return what the block adds to its last row, [n, d], for n alternatives [n, d] of its input row."""
        others = self.call.entering.expand(len(rows), -1, -1)
        place = self.row_in % others.shape[1]
        hidden = torch.cat([others[:, :place], rows[:, None], others[:, place + 1 :]], dim=1)
        return (self.call.run(hidden) - hidden)[:, -1]

    def adjoint(self, cotangents: Tensor) -> Tensor:
        """Return J^T w for n cotangents w [n, d] as rows [n, d], in the model's dtype."""
        return torch.cat([self._pulled(part) for part in cotangents.to(self.row).split(CHUNK)])

    def _pulled(self, cotangents: Tensor) -> Tensor:
        with torch.enable_grad():
            row = self.row[None].clone().requires_grad_(True)
            added = self.added(row)
            try:
                (found,) = torch.autograd.grad(
                    added, row, cotangents[:, None], retain_graph=True, is_grads_batched=True
                )
                return found[:, 0]
            except (RuntimeError, NotImplementedError):  # an operation of the backward pass that cannot be batched
                rows = self.row.expand(len(cotangents), -1).clone().requires_grad_(True)
                return torch.autograd.grad(self.added(rows), rows, cotangents)[0]

    def forward(self, tangents: Tensor) -> Tensor:
        """Return J x for n tangents x [n, d] as rows [n, d], in the model's dtype, by forward-mode differentiation."""
        from torch.autograd import forward_ad
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found = []
        for part in tangents.to(self.row).split(CHUNK):
            with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                rows = forward_ad.make_dual(self.row.expand(len(part), -1).clone(), part)
                found.append(forward_ad.unpack_dual(self.added(rows)).tangent)
        return torch.cat(found)

    def dense(self) -> Tensor:
        """Return J [d, d] in the model's dtype."""
        return self.adjoint(torch.eye(len(self.row), device=self.row.device))


def one_token_maps(loaded: LoadedModel, tokens: Tensor) -> list[RowMap]:
    """Return the map of the last token to itself for every block, by the one-token path. tokens: int64 [1, T].

    Only for a model that `takes_cache`.
    """
    tokens = tokens.to(loaded.device)
    cache = cache_of(loaded.model, tokens[:, :-1])
    return [RowMap(call) for call in block_calls(loaded, tokens[:, -1:], cache)]


def whole_sequence_maps(loaded: LoadedModel, tokens: Tensor, token_in: int = -1) -> list[RowMap]:
    """Return the map of one token to the last token for every block, on the whole sequence. tokens: int64 [1, T].

    token_in: the position of the input token.
    """
    return [RowMap(call, token_in) for call in block_calls(loaded, tokens)]
