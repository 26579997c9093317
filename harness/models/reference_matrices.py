"""The matrices of a reference model beside those of a loaded model: spectra and operands of edits of the change.

W is the unedited matrix of the model, B that of the reference, and D = W - B. B is read in the dtype of the model and D
is computed in float64. For weights whose exponents differ by less than 29 binary digits, D is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from harness.models.decompositions import DecompositionCache, DiskCache
from harness.models.loading import LoadedModel, load, require_head
from harness.models.matrices import Matrix
from harness.models.reference import Reference
from harness.models.sources import open_source
from harness.models.treatment import Treatment
from harness.spectral.ablation import Operation
from harness.spectral.changes import Frame, frame, haar, rotated
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region


class ComparedMatrices:
    """The matrices of a reference model beside those of a model: a `harness.models.treatment.Compared`.

    Every matrix of the reference that was asked for stays in the memory of the host. budget_bytes: the memory of the
    decompositions of changes and of reference matrices together. disk: where they are stored, too.
    """

    def __init__(self, loaded: LoadedModel, reference: Reference, budget_bytes: int, disk: DiskCache | None) -> None:
        self._loaded, self._reference = loaded, reference
        self._source = open_source(reference.settings, reference.description)
        self._matrices: dict[str, Tensor] = {}
        self._changes = DecompositionCache(loaded, budget_bytes // 2, disk, read=self.change)
        self._references = DecompositionCache(loaded, budget_bytes // 2, disk, read=self.read)

    def read(self, matrix: Matrix) -> Tensor:
        """Return B [out, in], in the dtype and on the device of the model."""
        if matrix.name not in self._matrices:
            self._matrices[matrix.name] = self._source.read(matrix).cpu()
        weight = matrix.view(self._loaded.model)
        return self._matrices[matrix.name].to(weight.device, weight.dtype)

    def change(self, matrix: Matrix) -> Tensor:
        """Return D = W - B, float64 [out, in]. The model must hold its unedited weight."""
        return self._weight(matrix).to(torch.float64) - self.read(matrix).to(torch.float64)

    def expect(self, matrices: Iterable[str]) -> None:
        """Say which matrices, by name, will be asked for one after the other and then again."""
        names = frozenset(matrices)
        for cache in (self._changes, self._references):
            cache.expect(names)

    def shrink(self) -> None:
        """Give up all decompositions, and keep half as many from now on."""
        for cache in (self._changes, self._references):
            cache.shrink()

    def spectrum(self, matrix: Matrix, region: Region, treatment: Treatment) -> Decomposition:
        """Return the spectrum of D or of B, or that of a control, of whose positions a region picks some.

        That of B has left vectors [out, r], also if the input is the smaller side.
        """
        if treatment.of == "reference" and region.kind in _WHOLE:
            return self._changes(matrix)
        if treatment.of == "reference":
            found = self._references(matrix)
            if region.kind == "rotated":
                return self._left(found, haar(self._unfilled(matrix), _seed(region), f"output {matrix.name}"))
            return found if found.side == "left" else self._left(found, frame(self.read(matrix).double(), found).output)
        found = self._changes(matrix)
        return self._left(found, self._turned(matrix, region, found).output) if region.kind == "rotated" else found

    def operation(self, matrix: Matrix, region: Region, treatment: Treatment) -> Operation:
        """Return what is done with the part of D that a region picks, or with that of a control."""
        change = self.change(matrix)
        if region.kind in ("swap_values", "swap_vectors"):
            own, other = (frame(one.double()) for one in (self._weight(matrix), self.read(matrix)))
            sigma, of = (other.sigma, own) if region.kind == "swap_values" else (own.sigma, other)
            swapped = (of.output * sigma) @ of.input.T
            return Operation(0.0, "other", self._weight(matrix).double() - swapped, without=swapped)
        without = self.read(matrix)
        if region.kind == "reference_matrices":
            return Operation(0.0, "own", change, without=without)
        usual = Operation(
            treatment.scale, "own" if treatment.of == "change" else "other", change, without=without,
            rest=treatment.keep,
        )
        if region.kind == "rotated" and treatment.of == "change":
            turned = self._turned(matrix, region, self._changes(matrix))
            return dataclasses.replace(usual, operand=(turned.output * turned.sigma) @ turned.input.T, whole=change)
        return usual

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Put every parameter of the reference into the model for the time of the context.

        The two must have the same parameters (`Reference.same_parameters`). Raises InputError if the reference lacks
        weights of its head.
        """
        other = load(self._reference.settings, self._reference.description, progress=False)
        require_head(other)
        theirs, own = dict(other.model.named_parameters()), dict(self._loaded.model.named_parameters())
        before = {name: parameter.detach().clone() for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.detach().copy_(theirs[name])
            del theirs, other
            yield
        finally:
            for name, parameter in own.items():
                parameter.detach().copy_(before[name])

    def _weight(self, matrix: Matrix) -> Tensor:
        return matrix.read(self._loaded.model)

    def _turned(self, matrix: Matrix, region: Region, change: Decomposition) -> Frame:
        """Return the frame of the change with random directions, the same as in the tables of changes."""
        out, width = matrix.shape
        output, entering = (change.sigma.new_empty(n, len(change.sigma)) for n in (out, width))
        return rotated(Frame(change.sigma, output, entering), _seed(region), matrix.name)

    def _unfilled(self, matrix: Matrix) -> Tensor:
        weight = matrix.view(self._loaded.model)
        return torch.empty(matrix.shape[0], min(matrix.shape), dtype=torch.float64, device=weight.device)

    def _left(self, found: Decomposition, vectors: Tensor) -> Decomposition:
        return dataclasses.replace(found, vectors=vectors, side="left")


_WHOLE = ("swap_values", "swap_vectors", "reference_matrices")


def _seed(region: Region) -> int:
    return int(region.seed)  # type: ignore[attr-defined]  # of the control "rotated"
