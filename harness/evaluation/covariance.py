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

_PIECE_ELEMENTS = 1 << 20  # activations that are converted to float64 at once: 8 MiB


@dataclass(frozen=True)
class InputCovariance:
    """The statistics of the activations that enter one matrix [out, in].

    mean: float64 [in]. covariance: float64 [in, in], the sum over the tokens divided by their number n_tokens.
    """

    mean: Tensor
    covariance: Tensor
    n_tokens: int

    def directions(self) -> Tensor:
        """Return the eigenvectors of the covariance as columns, by descending eigenvalue: float64 [in, m].

        Eigenvectors are left out if their eigenvalue is rounding noise, which is at most in eps times the largest
        eigenvalue. With fewer tokens than inputs there are such directions, and they are arbitrary.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        noise_level = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
        return vectors[:, int((values <= noise_level).sum()) :].flip(1)


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
    def next_block(self, matrices: Sequence[Matrix]) -> dict[str, InputCovariance]:
        """Run block `self.block`, and return the covariances at the inputs of some of its matrices by their names.

        Matrices with the same input share one object. Matrices whose input no hook can see are left out. These are
        experts, whose module itself picks the tokens that it routes to each, and tables that are looked up.
        """
        # The matrices of a fused parameter have one module and therefore one hook.
        owners: dict[str, list[str]] = {}
        for matrix in matrices:
            if matrix.expert is None:
                owners.setdefault(matrix.parameter.rpartition(".")[0], []).append(matrix.name)
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
            for i, batch in enumerate(self._batches):
                state.update(seen=[], counted=batch.counted)
                self._stream[i] = self._run_block(batch, self._stream[i])
        self.block += 1
        results = {owner: total.result() for owner, total in sums.items() if total.n}
        return {
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
