"""The centred covariance of the activations that enter each matrix (arXiv 2410.17770, eq. 6), in float64.

It is computed block by block. The residual stream of the whole text is kept at the boundary before one block, and each
call runs this block with a hook before every module that holds a matrix. All calls together cost one forward pass over
the text. They need memory for the stream, which is tokens x width in the model's dtype, and for one float64 matrix
[in, in] per distinct input of a single block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.evaluation.requests import Request
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.spectral.activations import InputCovariance

_PIECE_ELEMENTS = 1 << 20  # activations that are converted to float64 at once: 8 MiB


class _Sums:
    """Running sums of the input of one module, from which the mean of the first batch is subtracted.

    Without that shift, the variance of a feature whose mean is far from zero would be lost by rounding.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None  # None until the first rows come, which also create the two sums
        self.first: Tensor
        self.second: Tensor

    def add(self, rows: Tensor) -> None:
        if not len(rows):
            return
        if self.shift is None:
            self.shift = rows.mean(0, dtype=torch.float64)
            self.first = torch.zeros_like(self.shift)
            self.second = self.shift.new_zeros(len(self.shift), len(self.shift))
        self.n += len(rows)
        for piece in rows.split(max(1, _PIECE_ELEMENTS // rows.shape[1])):
            shifted = piece - self.shift  # float64, as the shift is
            self.first += shifted.sum(0)
            self.second.addmm_(shifted.T, shifted)

    def result(self) -> InputCovariance:
        """Return the covariance. It takes the memory of the sums, which are then no longer valid."""
        assert self.shift is not None
        offset = self.first / self.n
        return InputCovariance(self.shift + offset, self.second.div_(self.n).addr_(offset, offset, alpha=-1), self.n)


class _RoutedInputs:
    """The inputs of the experts of a mixture, which are stacked in 3-D parameters of one module.

    Such a module of transformers gets the hidden states [n, width] and for each of them the numbers of its experts
    [n, k]. It has the parameters gate_up_proj [experts, 2 m, width] and down_proj [experts, width, m]: the input of
    down_proj is act_fn(gate) * up, which is computed here again.
    """

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._by_owner: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            self._by_owner.setdefault(matrix.parameter.rpartition(".")[0], []).append(matrix)
        self._sums: dict[tuple[str, int, bool], _Sums] = {}

    def hooks(self, state: dict[str, Any]) -> Iterator[tuple[str, Callable]]:
        """Yield the name of each module of experts with its hook. state["counted"]: the tokens that count."""
        for owner in self._by_owner:
            yield owner, self._hook(owner, state)

    def results(self) -> dict[str, InputCovariance]:
        """Return the covariance of each expert's matrices by name."""
        done = {key: sums.result() for key, sums in self._sums.items() if sums.n}
        keys = {m.name: (owner, m.expert or 0, _is_down(m)) for owner, all_of in self._by_owner.items() for m in all_of}
        return {name: done[key] for name, key in keys.items() if key in done}

    def _hook(self, owner: str, state: dict[str, Any]) -> Callable:
        wanted = {(matrix.expert or 0, _is_down(matrix)) for matrix in self._by_owner[owner]}

        def before(module: Any, args: tuple, kwargs: dict) -> None:
            named = dict(zip(("hidden_states", "top_k_index"), args)) | kwargs
            hidden, chosen = named["hidden_states"], named["top_k_index"]
            counted = state["counted"].reshape(-1).to(hidden.device)
            hidden, chosen = hidden.reshape(len(counted), -1), chosen.reshape(len(counted), -1)
            for expert, down in sorted(wanted):
                rows = hidden[counted & (chosen == expert).any(1)]
                if down and len(rows):
                    gate, up = torch.nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
                    rows = module.act_fn(gate) * up
                self._sums.setdefault((owner, expert, down), _Sums()).add(rows)

        return before


def _is_down(matrix: Matrix) -> bool:
    return matrix.layer_type == "down_proj"


class _StopForward(Exception):
    """Ends a forward pass after the wanted block. It is always caught in this module."""


@dataclass(frozen=True)
class _Batch:
    """Right-padded sequences.

    input_ids: int64 [B, T]. attends: bool [B, T], False for padding. counted: bool [B, T], the tokens that enter the
    covariance.
    """

    input_ids: Tensor
    attends: Tensor
    counted: Tensor


class CovarianceStream:
    """Computes the covariances at the inputs of one block after the other, for a causal or masked model.

    requests: the text, which is what the requests feed to the model. scored_only: count only the positions that a
    request scores, so that overlapping windows count each token once; otherwise every token is counted. batch_tokens:
    padded tokens per forward pass.
    """

    def __init__(
        self, loaded: LoadedModel, requests: Sequence[Request], scored_only: bool = True, batch_tokens: int = 8192
    ) -> None:
        self._loaded = loaded
        self._batches = _batches(requests, scored_only, batch_tokens)
        self._stream: list[Any] = [None] * len(self._batches)
        self.block = 0  # the block that the next call runs

    @torch.inference_mode()
    def next_block(self, matrices: Sequence[Matrix], experts: bool = False) -> dict[str, InputCovariance]:
        """Run block `self.block`, and return the covariances at the inputs of some of its matrices by their names.

        Matrices with the same input share one object. Tables that are looked up are left out. experts: whether the
        experts of a mixture are included, of which each gets the covariance of the tokens that are routed to it. An
        expert to which no token is routed is left out.
        """
        # The matrices of a fused parameter have one module and therefore one hook.
        owners: dict[str, list[str]] = {}
        for matrix in matrices:
            if matrix.expert is None:
                owners.setdefault(matrix.parameter.rpartition(".")[0], []).append(matrix.name)
        of_experts = _RoutedInputs([matrix for matrix in matrices if matrix.expert is not None] if experts else [])
        sums: dict[str, _Sums] = {}
        shared: dict[str, str] = {}  # module -> an earlier module that has the same input
        state: dict[str, Any] = {}

        def hook(owner: str) -> Callable:
            def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
                entering = args[0] if args else next(iter(kwargs.values()))
                first = next((name for name, tensor in state["seen"] if tensor is entering), None)
                state["seen"].append((owner, entering))
                if first is not None:
                    shared[owner] = first
                elif entering.is_floating_point():
                    counted = state["counted"].reshape(-1).to(entering.device)
                    sums.setdefault(owner, _Sums()).add(entering.reshape(len(counted), -1)[counted])

            return before

        with ExitStack() as hooks:
            for owner in owners:
                module = self._loaded.model.get_submodule(owner)
                hooks.callback(module.register_forward_pre_hook(hook(owner), with_kwargs=True).remove)
            for owner, gather in of_experts.hooks(state):
                module = self._loaded.model.get_submodule(owner)
                hooks.callback(module.register_forward_pre_hook(gather, with_kwargs=True).remove)
            for i, batch in enumerate(self._batches):
                state.update(seen=[], counted=batch.counted)
                self._stream[i] = self._run_block(batch, self._stream[i])
        self.block += 1
        results = {owner: total.result() for owner, total in sums.items() if total.n}
        return of_experts.results() | {
            name: results[shared.get(owner, owner)]
            for owner, names in owners.items() for name in names if shared.get(owner, owner) in results
        }

    def _run_block(self, batch: _Batch, entering: Any) -> Any:
        """Return the output of block `self.block`; the earlier blocks are stubs that return `entering`, its input."""
        blocks, captured = self._loaded.blocks, []

        def stop(module: torch.nn.Module, args: tuple, output: Any) -> None:
            captured.append(output)
            raise _StopForward

        inputs: dict[str, Any] = {"input_ids": batch.input_ids.to(self._loaded.device)}
        if self._loaded.description.family.kind == "causal":
            inputs["use_cache"] = False  # no mask is needed: in a causal model no token attends to padding on its right
        else:
            inputs["attention_mask"] = batch.attends.to(self._loaded.device)
        handle = blocks[self.block].register_forward_hook(stop)
        try:
            with _replaced(blocks[: self.block], lambda *args, **kwargs: entering):
                self._loaded.model(**inputs)
        except _StopForward:
            pass
        finally:
            handle.remove()
        return captured[0]


@contextmanager
def _replaced(blocks: Sequence[torch.nn.Module], forward: Callable) -> Iterator[None]:
    originals = [block.__dict__.get("forward") for block in blocks]  # with device_map, accelerate sets one
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, original in zip(blocks, originals):
            if original is None:
                del block.forward
            else:
                block.forward = original


def _batches(requests: Sequence[Request], scored_only: bool, batch_tokens: int) -> list[_Batch]:
    """Cut requests into batches of at most `batch_tokens` padded tokens, or one sequence, the longest first."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    batches, start = [], 0
    while start < len(order):
        width = len(requests[order[start]].tokens)
        members = [requests[i] for i in order[start : start + max(1, batch_tokens // width)]]
        input_ids = np.zeros((len(members), width), dtype=np.int64)
        attends, counted = np.zeros((2, len(members), width), dtype=bool)
        for row, request in enumerate(members):
            n = len(request.tokens)
            input_ids[row, :n], attends[row, :n] = request.tokens, True
            counted[row, request.positions if scored_only else slice(n)] = True
        batches.append(_Batch(*(torch.from_numpy(array.copy()) for array in (input_ids, attends, counted))))
        start += len(members)
    return batches
