"""Leave out what the last block would compute for positions that no request reads.

Behind the last attention no position reads another one. So the query and output projections and the matrices of the
feed-forward layer of the last block are needed at scored positions only, as the output head is. Keys and values are
needed at all of them.

A product of fewer rows may add in another order. So the last block runs twice in the first pass of a batch, and nothing
is left out of later passes unless its output at the scored positions has the same bits both times. Which order a
product adds in depends on shapes, which no edit of a weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from harness.evaluation.inner import forward_replaced
from harness.models.branches import is_linear, owner_of
from harness.models.families import MLP_TYPES
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix

# The layer types whose outputs at one position no other position reads.
OWN_POSITION_TYPES = ("q_proj", "o_proj", *MLP_TYPES)
# Nothing is left out of a batch of which more than this share of the positions is scored.
MOST_SCORED = 0.75
# Products of fewer rows have kernels of their own (of 1 to 13 rows in MKL), which add in another order.
FEWEST_ROWS = 32


def computed_positions(scored: int, positions: int) -> int:
    """Return at how many positions of a batch these matrices are applied. scored: how many of them are scored."""
    computed = max(scored, min(FEWEST_ROWS, positions))
    return computed if computed <= MOST_SCORED * positions else positions


def own_position_matrices(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Return the matrices of the last block that are applied at scored positions only.

    matrices: all of a decoder. A parameter that also holds keys or values is applied at all positions. There are none
    in a mixture of experts: which tokens go to an expert decides the shapes of its products, and so their last bits.
    """
    last = max(matrix.block for matrix in matrices)
    of_last = [matrix for matrix in matrices if matrix.block == last]
    if any(matrix.expert is not None for matrix in of_last):
        return []
    others = {matrix.parameter for matrix in of_last if matrix.layer_type not in OWN_POSITION_TYPES}
    return [matrix for matrix in of_last if matrix.parameter not in others]


class LastBlock:
    """The last block of a decoder, of which parts are computed at the scored positions of a batch only.

    These are single linear layers and not whole feed-forward layers: an activation function computes the last elements
    of an array in another way than the others, which can change their last bit, and so must see an array as large as
    that of all positions. wanted: whether this is done at all.
    """

    def __init__(self, loaded: LoadedModel, wanted: bool = True) -> None:
        self._block = loaded.blocks[-1]
        self._inside = list(self._block.modules())
        self._linear: list[nn.Module] = []
        if wanted and loaded.description.family.kind == "causal":
            owners = [owner_of(loaded.model, matrix) for matrix in own_position_matrices(loaded.matrices)]
            self._linear = [module for module in dict.fromkeys(owners) if is_linear(module)]
        # For each batch that was compared: the positions that are computed; None if these are all.
        self._positions: dict[Any, Tensor | None] = {}

    def compares(self, key: Any) -> bool:
        """Return whether the next pass of a batch runs the block twice and compares."""
        return bool(self._linear) and key not in self._positions and not self._hooked()

    def drop(self, key: Any) -> None:
        """Forget a batch."""
        self._positions.pop(key, None)

    def at(self, key: Any, rows: Tensor, shape: torch.Size) -> AbstractContextManager[None]:
        """Leave out what is not read of a batch in the one pass of the context, or compare what would be left out.

        rows: int64 [K], the flat indices of the scored positions among those of the batch, which has this shape [B, T].
        """
        if self.compares(key):
            return self._compared(key, rows, shape)
        positions = self._positions.get(key)
        if positions is None or self._hooked():
            return nullcontext()
        return _at_positions(self._linear, positions, shape)

    @contextmanager
    def _compared(self, key: Any, rows: Tensor, shape: torch.Size) -> Iterator[None]:
        """Decide by the pass of the context which positions of a batch are computed from then on."""
        computed, equal = computed_positions(len(rows), shape.numel()), [False]
        positions = _at_least(rows, computed)
        with ExitStack() as stack:
            if computed < shape.numel():
                stack.enter_context(forward_replaced(self._block, self._both(positions, shape, equal)))
            yield
        self._positions[key] = positions if equal == [True] else None

    def _both(self, positions: Tensor, shape: torch.Size, equal: list[bool]) -> Callable[..., Any]:
        """Return a forward of the block that notes whether it gives the same bits where positions are left out."""
        forward = self._block.forward

        def both(*args: Any, **kwargs: Any) -> Any:
            with _outputs_at(self._linear, positions) as of_whole:
                whole = forward(*args, **kwargs)
            with _at_positions(self._linear, positions, shape), _outputs_at(self._linear, positions) as of_part:
                part = forward(*args, **kwargs)
            for one, outputs in ((whole, of_whole), (part, of_part)):
                outputs.append(_rows(one[0] if isinstance(one, tuple) else one, positions))
            equal[:] = [all(map(_show_same_bits, of_whole, of_part))]
            return whole

        return both

    def _hooked(self) -> bool:
        # Branches and replacements by the mean are hooks, whose products have shapes that were not compared.
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._inside)


@contextmanager
def _at_positions(linear: Sequence[nn.Module], positions: Tensor, shape: torch.Size) -> Iterator[None]:
    """Apply these layers at some positions of a batch of this shape [B, T]; their outputs at all others are 0."""

    def at_positions(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def replaced(hidden: Tensor) -> Tensor:
            leading = hidden.shape[:-1]
            if leading not in (shape, (shape.numel(),)):  # some models lay the positions out in one dimension
                return forward(hidden)
            few = forward(_rows(hidden, positions))
            return few.new_zeros(shape.numel(), few.shape[-1]).index_copy_(0, positions, few).view(*leading, -1)

        return replaced

    with ExitStack() as stack:
        for module in linear:
            stack.enter_context(forward_replaced(module, at_positions(module.forward)))
        yield


@contextmanager
def _outputs_at(linear: Sequence[nn.Module], positions: Tensor) -> Iterator[list[Tensor]]:
    """Yield the outputs of these layers at some positions, in the order of their calls."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for module in linear:
            handle = module.register_forward_hook(lambda module, args, output: found.append(_rows(output, positions)))
            stack.callback(handle.remove)
        yield found


def _show_same_bits(one: Tensor, other: Tensor) -> bool:
    # Zeros show nothing: a matrix of which all is removed gives them in every order of the sum.
    return torch.equal(one, other) and 2 * int(one.count_nonzero()) > one.numel()


def _at_least(rows: Tensor, fewest: int) -> Tensor:
    """Return the positions and as many others before and between them as it takes to have the fewest."""
    if len(rows) >= fewest:
        return rows
    others = torch.arange(len(rows) + fewest, device=rows.device)
    others = others[~torch.isin(others, rows)][: fewest - len(rows)]
    return torch.cat([rows, others]).sort().values


def _rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return hidden states [B, T, d] or [B x T, d] at some positions, as [K, d]."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
