"""Apply one ablation to a loaded model, and undo it bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.models.branches import Bias, Branch, biased, branch, branched, check_biasable
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix, experts_together, read_all, write_all
from harness.models.targets import Target
from harness.models.treatment import REMOVE, Decompose, Sources, Treatment, label_of, operation_of, spectrum_of
from harness.spectral.ablation import Removal, bias_of, others, removal
from harness.spectral.batched import Part, edit_each
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region, by_loss, factors_of, fraction_interval, per_matrix, select

EXPERT_BYTES = 2**30  # the most bytes of float64 matrices that are edited together


@dataclass(frozen=True)
class Ablation:
    """The removal of one region from every matrix of one target, or another treatment of it."""

    target: Target
    region: Region
    treatment: Treatment = REMOVE

    @property
    def label(self) -> str:
        """The label of the region with its treatment, such as "decile 10 (0.9-1.0), activations"."""
        return label_of(self.region, self.treatment)

    def positions(self, decomposition: Decomposition, region: Region | None = None) -> Tensor:
        """Return the positions of the values that are removed or scaled: int64 [n] on the CPU, in ascending order.

        region: the region of this matrix, if it depends on all matrices of the target (`resolved_regions`).
        """
        picked = select(region or self.region, decomposition.sigma, decomposition.shape)
        # of an operand the operation itself takes the rest, because directions need not span all of its outputs
        by_others = self.treatment.keep and self.treatment.of == "weight"
        return others(picked, len(decomposition.sigma)) if by_others else picked


@dataclass(frozen=True)
class RealisedAblation:
    """What an ablation removed, over all its matrices. These are columns of the metrics table.

    n_removed, n_values: sums over the matrices.
    component: the matrix and the position of the value, such as "28.up_proj:573", if one value alone is removed or
        scaled; else None.
    fraction_start, fraction_stop: the interval of the rank, from the smallest start to the largest stop; None if the
        positions in some matrix are not one non-empty interval.
    energy_removed: the removed share of the squared Frobenius norm of all matrices together. norm_removed: the
        Frobenius norm of the change of all matrices together.
    output_energy_removed, output_norm_removed: the removed share of the mean squared outputs of all matrices together
        over the calibration text, and the root of the mean squared change of them; None without such a text.
    output_constant_share: which share of the mean squared outputs of the removed parts is that of their mean, from 0 to
        1 (a bias); None without such a text, and if the parts have no outputs.
    sigma_max_removed, sigma_min_removed: the largest and the smallest over all matrices; None if nothing was removed.
    realised_removal: as in `Removal`, for the removed parts of all matrices together.
    svd_method: the methods that were used, joined by "+". svd_reconstruction_error, svd_orthogonality_error: the
        largest over the matrices, see `Decomposition`.
    """

    n_removed: int
    n_values: int
    component: str | None
    fraction_start: float | None
    fraction_stop: float | None
    energy_removed: float
    norm_removed: float
    output_energy_removed: float | None
    output_norm_removed: float | None
    output_constant_share: float | None
    sigma_max_removed: float | None
    sigma_min_removed: float | None
    realised_removal: float | None
    svd_method: str | None
    svd_reconstruction_error: float | None
    svd_orthogonality_error: float | None


@dataclass(frozen=True)
class _Edited:
    """One matrix of an ablation: what was removed, its decomposition, the removed interval of the rank, and the one
    position in its spectrum if it is one."""

    name: str
    position: int | None
    removal: Removal
    decomposition: Decomposition
    interval: tuple[float, float] | tuple[None, None]


def _edited(matrix: Matrix, part: Part, removed: Removal) -> _Edited:
    position = int(part.indices[0]) if len(part.indices) == 1 and not part.operation.rest else None
    interval = fraction_interval(part.indices, min(matrix.shape))
    return _Edited(matrix.name, position, removed, part.decomposition, interval)


def _combine(edited: Sequence[_Edited]) -> RealisedAblation:
    removals = [one.removal for one in edited]
    total_energy = sum(one.energy for one in removals)
    removed_energy = sum(one.energy_removed * one.energy for one in removals)
    touched = [one for one in removals if one.n_removed]
    left = sum(
        one.energy_removed * one.energy * (1 - one.realised_removal) ** 2
        for one in touched if one.realised_removal is not None
    )
    of_outputs = [(one.output_energy_removed, one.output_energy, one.output_norm_removed) for one in removals
                  if one.output_energy is not None]
    output_energy = sum(energy or 0.0 for _, energy, _ in of_outputs)
    output_removed = sum((share or 0.0) * (energy or 0.0) for share, energy, _ in of_outputs)
    part_energy = sum(one.output_part_energy or 0.0 for one in removals)
    known = len(of_outputs) == len(removals) > 0
    starts = [start for start, _ in (one.interval for one in edited) if start is not None]
    stops = [stop for _, stop in (one.interval for one in edited) if stop is not None]
    whole = len(starts) == len(edited)
    return RealisedAblation(
        n_removed=sum(one.removal.n_removed for one in edited),
        n_values=sum(one.removal.n_values for one in edited),
        component=_component(edited),
        fraction_start=min(starts) if whole else None,
        fraction_stop=max(stops) if whole else None,
        energy_removed=removed_energy / total_energy if total_energy else 0.0,
        norm_removed=math.hypot(*(one.norm_removed for one in removals)),
        output_energy_removed=(output_removed / output_energy if output_energy else 0.0) if known else None,
        output_constant_share=(
            sum(one.output_constant_energy or 0.0 for one in removals) / part_energy if known and part_energy else None
        ),
        output_norm_removed=math.hypot(*(norm or 0.0 for _, _, norm in of_outputs)) if known else None,
        sigma_max_removed=_extreme(max, [removal.sigma_max_removed for removal in touched]),
        sigma_min_removed=_extreme(min, [removal.sigma_min_removed for removal in touched]),
        realised_removal=1 - math.sqrt(left / removed_energy) if removed_energy else None,
        svd_method="+".join(sorted({one.decomposition.method for one in edited})),
        svd_reconstruction_error=max(one.decomposition.reconstruction_error for one in edited),
        svd_orthogonality_error=max(one.decomposition.orthogonality_error for one in edited),
    )


def _component(edited: Sequence[_Edited]) -> str | None:
    touched = [one for one in edited if one.removal.n_removed]
    if len(touched) != 1 or touched[0].removal.n_removed != 1 or touched[0].position is None:
        return None
    return f"{touched[0].name}:{touched[0].position}"


def _extreme(which: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return which(known) if known else None


def loss_changes_of(
    ablation: Ablation, matrices: Sequence[Matrix], sources: Sources
) -> Mapping[str, Tensor]:
    """Return the first-order change of the calibration's loss if each value of each matrix is removed.

    The values are those of the spectra of which the ablation removes some: matrix -> float64 [r]. The model must hold
    its unedited weights. Raises ValueError without a calibration.
    """
    region, treatment = getattr(ablation.region, "reference", None) or ablation.region, ablation.treatment

    def spectrum(matrix: Matrix) -> Decomposition:
        return spectrum_of(matrix, region, treatment, sources)

    if treatment.of == "weight":
        return sources.require_calibrated().losses(matrices, spectrum, treatment.metric)
    return sources.require_derived().losses(matrices, spectrum, treatment.of, sources.require_reference().change)


def resolved_regions(ablation: Ablation, matrices: Sequence[Matrix], sources: Sources) -> dict[str, Region]:
    """Return the region of each matrix of a target if it depends on the matrix; empty if it does not.

    The model must hold its unedited weights. Raises ValueError if a loss is needed and there is no calibration text.
    """
    reference = per_matrix(ablation.region)
    if reference is None:
        return {}
    losses = loss_changes_of(ablation, matrices, sources) if reference.by_loss else {}
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    found = reference.resolved({name: losses[name] for name in shapes if name in losses}, shapes)
    if reference is ablation.region:
        return dict(found)
    control: Any = ablation.region
    return {name: dataclasses.replace(control, reference=one) for name, one in found.items()}


def edited_matrices(ablation: Ablation, loaded: LoadedModel, sources: Sources) -> list[Matrix]:
    """Return the matrices that an ablation may edit, in the order of the model.

    They are those of the target, without those in which the region is known to be empty, as a component is in all
    matrices but one. The model must hold its unedited weights. Raises ValueError as `resolved_regions` does.
    """
    matrices = [matrix for matrix in loaded.matrices if matrix.name in ablation.target.matrices]
    if ablation.treatment.keep or not by_loss(ablation.region):
        return matrices
    own = resolved_regions(ablation, matrices, sources)
    return [matrix for matrix in matrices
            if not own[matrix.name].rank_only or len(select(own[matrix.name], None, matrix.shape))]


def biases_of(loaded: LoadedModel, ablation: Ablation, sources: Sources) -> list[Bias]:
    """Return the biases that replace the parts of an ablation by their means. The model must hold unedited weights."""
    matrices = [matrix for matrix in loaded.matrices if matrix.name in ablation.target.matrices]
    sources.prepare(matrices)
    own, found = resolved_regions(ablation, matrices, sources), []
    for matrix in matrices:
        part = _part(ablation, matrix, own.get(matrix.name), sources)
        values = bias_of(matrix.read(loaded.model), part.decomposition, part.indices, part.operation)
        found.append(Bias(matrix, values.float()))
    return found


def _part(ablation: Ablation, matrix: Matrix, region: Region | None, sources: Sources) -> Part:
    """Return what an ablation takes from one matrix. region: its own, if it has one (`resolved_regions`)."""
    decomposition = spectrum_of(matrix, ablation.region, ablation.treatment, sources)
    operation = operation_of(matrix, ablation.region, ablation.treatment, sources)
    factors = factors_of(region or ablation.region, decomposition.sigma)
    if factors is not None:
        operation = dataclasses.replace(operation, factors=factors)
    return Part(decomposition, ablation.positions(decomposition, region), operation)


@contextmanager
def ablated(
    loaded: LoadedModel, ablation: Ablation, sources: Sources | Decompose, edit_mode: str = "weight"
) -> Iterator[RealisedAblation]:
    """Apply one ablation to the model for the time of the context; afterwards every byte of it is as before.

    Yields what was really removed. sources: where spectra come from, which the caller caches. A function from a matrix
        to the decomposition of its weights is enough for a treatment that needs no calibration text.
    edit_mode: "weight" writes the edited matrices, rounded to the model's dtype; "branch" leaves the weights as they
        are and subtracts the removed part from the outputs in float32 (see branches.py).
    """
    sources = sources if isinstance(sources, Sources) else Sources(sources)
    by_name = {matrix.name: matrix for matrix in loaded.matrices}
    matrices = [by_name[name] for name in ablation.target.matrices]
    sources.prepare(matrices)
    own = resolved_regions(ablation, matrices, sources)
    edited: list[_Edited] = []
    branches: list[Branch] = []
    biases: list[Bias] = []
    if ablation.treatment.replace == "mean":
        check_biasable(loaded.model, matrices)
    with ExitStack() as undo:
        # a region that differs from matrix to matrix may pick nothing of most of them
        groups = [[matrix] for matrix in matrices] if own else experts_together(matrices, loaded.model, EXPERT_BYTES)
        for group in groups:
            parts = [_part(ablation, matrix, own.get(matrix.name), sources) for matrix in group]
            originals = read_all(group, loaded.model)
            if own and not len(parts[0].indices) and not parts[0].operation.rest:
                what = parts[0].decomposition, parts[0].indices, parts[0].operation
                removals = [removal(originals[0], originals[0], *what)]
            elif edit_mode == "weight":
                weights, removals = edit_each(originals, parts)
                undo.callback(write_all, group, loaded.model, originals)
                write_all(group, loaded.model, weights)
                biases += [
                    Bias(matrix, bias_of(original, part.decomposition, part.indices, part.operation).float())
                    for matrix, original, part in zip(group, originals, parts) if part.operation.to_mean
                ]
            else:
                removals = []
                for matrix, original, part in zip(group, originals, parts):
                    what, after = (part.decomposition, part.indices, part.operation), original
                    if len(part.indices):
                        branches.append(branch(matrix, original, *what))
                        after = branches[-1].effective(original)
                    removals.append(removal(after, original, *what))
            edited += [_edited(matrix, part, removed) for matrix, part, removed in zip(group, parts, removals)]
        if biases:
            undo.enter_context(biased(loaded.model, biases))
        if branches:
            undo.enter_context(branched(loaded.model, branches))
        yield _combine(edited)
