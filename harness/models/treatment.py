"""What an ablation does with the part of a matrix that its region picks, and where the part comes from.

Every edit is W' = W + (s - 1) U_r (U_r^T D), see harness/spectral/ablation.py. Three choices make it:

- the spectrum, whose positions the region picks and whose left vectors are U (`spectrum_of`);
- the operand D, of which the part is taken (`operation_of`);
- what becomes of the part: the scale s, and whether the region or its complement is meant (`Treatment`).

To add a source of the spectrum or an operand: give `Treatment` a field whose default is the present behaviour, name it
in `words`, let `spectrum_of` return the other decomposition and `operation_of` the other operand, and give `Sources`
what the two need. Nothing else of an edit has to know. The spectrum of another matrix than the operand must have left
vectors (`side` "left", `Operation.values` "other").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from harness.models.matrices import Matrix
from harness.models.rotation import ROTATIONS, output_sizes, rotated_operand, rotated_spectrum
from harness.spectral.ablation import Operation
from harness.spectral.activations import InputCovariance
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region

Decompose = Callable[[Matrix], Decomposition]


@dataclass(frozen=True)
class Treatment:
    """What is done with the region of every matrix of an ablation. By default its singular values are removed.

    metric: "weight": the spectrum of W; "activations": that of W C^(1/2), where C is the second moment of the inputs
        over the calibration text, or their covariance if `centred`.
    keep: whether the region is kept, and all other values of the spectrum are meant instead.
    scale: the factor of the part; 0 removes it.
    replace: "zero", or "mean": the part is replaced by its mean over the calibration text, which is a bias.
    calibration: the digest of the calibration text (see `harness.evaluation.calibration`), or that of the task by
        whose loss parts of a change are chosen; or None.
    of: "weight": a part of W; "change": a part of the spectrum of the change D = W - W_reference; "reference": the part
        of D in directions of W_reference.
    reference: the digest of the identity of the reference model, or None.
    """

    metric: str = "weight"
    keep: bool = False
    scale: float = 0.0
    replace: str = "zero"
    centred: bool = False
    calibration: str | None = None
    of: str = "weight"
    reference: str | None = None

    def key(self) -> dict[str, Any]:
        """Return what a number depends on, for the ids of cells: every field that is not the default."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default}

    @property
    def words(self) -> str:
        """What labels say behind the name of a region, such as ", activations, kept"; nothing by default."""
        said = [
            *([f"of the {self.of}"] if self.of != "weight" else []),
            *(["activations"] if self.metric == "activations" else []), *(["centred"] if self.centred else []),
            *(["kept"] if self.keep else []), *([f"scaled by {self.scale:g}"] if self.scale else []),
            *(["mean"] if self.replace == "mean" else []),
        ]
        return "".join(f", {word}" for word in said)

    def removing_nothing(self) -> Treatment:
        """Return the treatment for a control that removes nothing: the same spectrum, of which no value is touched."""
        return dataclasses.replace(self, keep=False, scale=0.0, replace="zero")


REMOVE = Treatment()


def label_of(region: Region, treatment: Treatment) -> str:
    """Return the label of a region under a treatment. In the label of a control it stands behind the region's name."""
    reference = getattr(region, "reference", None)
    if reference is None:
        return region.label if region.by == "control" else region.label + treatment.words
    return region.label.replace(f"({reference.label})", f"({reference.label}{treatment.words})")


class Calibrated(Protocol):
    """The inputs of a model's matrices over a calibration text."""

    def prepare(self, matrices: Sequence[Matrix]) -> None:
        """Measure the inputs of these matrices if that is not yet done. The model must hold its unedited weights."""
        ...

    def inputs(self, matrix: Matrix) -> InputCovariance:
        """Return the statistics of the inputs of one matrix."""
        ...

    def key(self, matrix: Matrix) -> str:
        """Return a hash of everything on which the metric of one matrix depends."""
        ...

    def factor(self, matrix: Matrix, centred: bool | None = None) -> Tensor:
        """Return F with F F^T = C for the inputs of one matrix, as `InputCovariance.factor` does.

        centred: whether C is the covariance; None: as the calibration says.
        """
        ...

    def output_energy(self, matrix: Matrix, centred: bool | None = None) -> Tensor:
        """Return |W F|^2 for one matrix, a float64 scalar. The model must hold its unedited weight."""
        ...

    def mean(self, matrix: Matrix) -> Tensor:
        """Return the mean of the inputs of one matrix, float64 [in]."""
        ...

    def weight(self, matrix: Matrix) -> Tensor:
        """Return the weight [out, in] of one matrix as it is in the model now."""
        ...

    def losses(self, matrices: Sequence[Matrix], decompose: Decompose, metric: str) -> Mapping[str, Tensor]:
        """Return the first-order change of the text's loss if each value of a spectrum is removed, by matrix.

        The results are float64 [r]. metric: the metric of the spectra that `decompose` returns. The model must hold its
        unedited weights.
        """
        ...


class Derived(Protocol):
    """The first-order changes of the loss of a task."""

    def losses(
        self, matrices: Sequence[Matrix], decompose: Decompose, of: str, operand: Callable[[Matrix], Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the first-order change of the loss if each value of a spectrum is removed: matrix -> float64 [r].

        of: the name of the spectra that `decompose` returns. operand: returns the D [out, in] of which values are
        removed. The model must hold its unedited weights.
        """
        ...


class Compared(Protocol):
    """The matrices of the reference model beside those of the model, which must be unedited while it is asked."""

    def change(self, matrix: Matrix) -> Tensor:
        """Return D = W - B, float64 [out, in]."""
        ...

    def spectrum(self, matrix: Matrix, region: Region, treatment: Treatment) -> Decomposition:
        """Return the spectrum of the change or of the reference, or that of a control."""
        ...

    def operation(self, matrix: Matrix, region: Region, treatment: Treatment) -> Operation:
        """Return what is done with a part of the change."""
        ...

    def whole_model(self) -> AbstractContextManager[None]:
        """Put every parameter of the reference into the model for the time of the context."""
        ...


@runtime_checkable
class Shrinking(Protocol):
    """Something that keeps results in memory."""

    def shrink(self) -> None:
        """Give up everything that is kept, and keep less from now on."""
        ...


@runtime_checkable
class Cache(Shrinking, Protocol):
    """A function from a matrix to its decomposition that keeps decompositions in memory."""

    def expect(self, matrices: Iterable[str]) -> None:
        """Say which matrices, by name, will be asked for one after the other and then again."""
        ...


@dataclass(frozen=True)
class Sources:
    """Where edits take spectra and operands from.

    weights: a function from a matrix to the decomposition of its weights. activations: the same in the metric of the
    activations. calibrated: the inputs of the matrices. Both are None without a calibration text. reference: the
    matrices of the reference model, or None. derived: the loss of the calibration where parts of a change are chosen by
    it, or None.
    """

    weights: Decompose
    activations: Decompose | None = None
    calibrated: Calibrated | None = None
    reference: Compared | None = None
    derived: Derived | None = None

    def prepare(self, matrices: Sequence[Matrix]) -> None:
        """Prepare what can only be measured while all weights are unedited."""
        if self.calibrated is not None:
            self.calibrated.prepare(matrices)

    def expect(self, matrices: Iterable[str]) -> None:
        """Tell the caches which matrices will be asked for one after the other and then again."""
        names = frozenset(matrices)
        for cache in (self.weights, self.activations, self.reference):
            if isinstance(cache, Cache):
                cache.expect(names)

    def shrink(self) -> None:
        """Let the caches give up everything that they keep, and keep less from now on, because memory ran out."""
        for cache in (self.weights, self.activations, self.calibrated, self.reference):
            if isinstance(cache, Shrinking):
                cache.shrink()

    def require_calibrated(self) -> Calibrated:
        """Return the inputs of the matrices. Raises ValueError without a calibration text."""
        if self.calibrated is None:
            raise ValueError("this treatment needs a calibration text")
        return self.calibrated

    def require_derived(self) -> Derived:
        """Return the loss of the calibration. Raises ValueError without one."""
        if self.derived is None:
            raise ValueError("this region needs a calibration")
        return self.derived

    def require_reference(self) -> Compared:
        """Return the matrices of the reference model. Raises ValueError without one."""
        if self.reference is None:
            raise ValueError("this treatment needs a reference")
        return self.reference


def spectrum_of(matrix: Matrix, region: Region, treatment: Treatment, sources: Sources) -> Decomposition:
    """Return the spectrum of whose positions the region picks some. Raises ValueError without its source.

    While it is asked for, the model must hold the unedited weight of the matrix.
    """
    if treatment.of != "weight":
        return sources.require_reference().spectrum(matrix, region, treatment)
    found = _own_spectrum(matrix, treatment, sources)
    return rotated_spectrum(found, _seed(region), matrix) if region.kind in ROTATIONS else found


def _own_spectrum(matrix: Matrix, treatment: Treatment, sources: Sources) -> Decomposition:
    if treatment.metric == "weight":
        return sources.weights(matrix)
    sources.require_calibrated()
    assert sources.activations is not None  # it is there where the inputs are
    return sources.activations(matrix)


def operation_of(matrix: Matrix, region: Region, treatment: Treatment, sources: Sources) -> Operation:
    """Return what is done with the part that the region picks from one matrix.

    The operand is the weight itself. With a calibration text the operation tells what the part contributes to the
    outputs. Raises ValueError without its source. While it is asked for, the model must hold the unedited weight.
    """
    if treatment.of != "weight":
        return sources.require_reference().operation(matrix, region, treatment)
    if treatment.calibration is None:
        usual = Operation(treatment.scale)
        return _rotated(usual, matrix, region, treatment, sources) if region.kind in ROTATIONS else usual
    calibrated, to_mean = sources.require_calibrated(), treatment.replace == "mean"
    in_metric = treatment.metric == "activations"
    if region.kind in ROTATIONS:
        usual = Operation(treatment.scale, inputs=calibrated.factor(matrix, True if to_mean else None),
                          centred=treatment.centred, mean=calibrated.mean(matrix), to_mean=to_mean)
        return _rotated(usual, matrix, region, treatment, sources)
    # In their own metric the squares of the values are the energies already, but not after a replacement by means.
    known = in_metric and not to_mean
    covariance = True if to_mean else None
    return Operation(
        treatment.scale, "output" if in_metric else "own",
        inputs=None if known else calibrated.factor(matrix, covariance),
        output_energy=None if known else calibrated.output_energy(matrix, covariance),
        centred=treatment.centred, mean=calibrated.mean(matrix), to_mean=to_mean,
    )


def _rotated(
    usual: Operation, matrix: Matrix, region: Region, treatment: Treatment, sources: Sources
) -> Operation:
    """Return the operation of a control in random directions, of which `usual` is that without an operand."""
    found, sizes = _own_spectrum(matrix, treatment, sources), None
    if region.kind == "rotated_output":
        assert usual.inputs is not None  # the settings have required a calibration text
        weight = sources.require_calibrated().weight(matrix)
        sizes = output_sizes(found, weight, usual.inputs)
    operand = rotated_operand(found, _seed(region), matrix, sizes, usual.inputs)
    return dataclasses.replace(usual, values="other", operand=operand)


def _seed(region: Region) -> int:
    return int(region.seed)  # type: ignore[attr-defined]  # of the controls in ROTATIONS
