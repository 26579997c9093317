"""Apply one ablation to a loaded model, and undo it bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

from harness.models.branches import Branch, branch, branched
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.targets import Target
from harness.spectral.ablation import Removal, edit, removal
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region, fraction_interval, select

Decompose = Callable[[Matrix], Decomposition]


@dataclass(frozen=True)
class Ablation:
    """The removal of one region from every matrix of one target."""

    target: Target
    region: Region


@dataclass(frozen=True)
class RealisedAblation:
    """What an ablation removed, over all its matrices. These are columns of the metrics table.

    n_removed, n_values: sums over the matrices. fraction_start, fraction_stop: the interval of the rank, from the
        smallest start to the largest stop; None if the positions in some matrix are not one non-empty interval.
    energy_removed: the removed share of the squared Frobenius norm of all matrices together.
    sigma_max_removed, sigma_min_removed: the largest and the smallest over all matrices; None if nothing was removed.
    realised_removal: as in `Removal`, for the removed parts of all matrices together.
    svd_method: the methods that were used, joined by "+". svd_reconstruction_error, svd_orthogonality_error: the
        largest over the matrices, see `Decomposition`.
    """

    n_removed: int
    n_values: int
    fraction_start: float | None
    fraction_stop: float | None
    energy_removed: float
    sigma_max_removed: float | None
    sigma_min_removed: float | None
    realised_removal: float | None
    svd_method: str | None
    svd_reconstruction_error: float | None
    svd_orthogonality_error: float | None


@dataclass(frozen=True)
class _Edited:
    """One matrix of an ablation: what was removed, its decomposition, and the removed interval of the rank."""

    removal: Removal
    decomposition: Decomposition
    interval: tuple[float, float] | tuple[None, None]

    @cached_property
    def energy(self) -> float:
        return float(self.decomposition.sigma.square().sum())


def _combine(edited: Sequence[_Edited]) -> RealisedAblation:
    total_energy = sum(one.energy for one in edited)
    removed_energy = sum(one.removal.energy_removed * one.energy for one in edited)
    touched = [one.removal for one in edited if one.removal.n_removed]
    left = sum(
        one.removal.energy_removed * one.energy * (1 - one.removal.realised_removal) ** 2
        for one in edited if one.removal.n_removed and one.removal.realised_removal is not None
    )
    starts = [start for start, _ in (one.interval for one in edited) if start is not None]
    stops = [stop for _, stop in (one.interval for one in edited) if stop is not None]
    whole = len(starts) == len(edited)
    return RealisedAblation(
        n_removed=sum(one.removal.n_removed for one in edited),
        n_values=sum(one.removal.n_values for one in edited),
        fraction_start=min(starts) if whole else None,
        fraction_stop=max(stops) if whole else None,
        energy_removed=removed_energy / total_energy if total_energy else 0.0,
        sigma_max_removed=_extreme(max, [removal.sigma_max_removed for removal in touched]),
        sigma_min_removed=_extreme(min, [removal.sigma_min_removed for removal in touched]),
        realised_removal=1 - math.sqrt(left / removed_energy) if removed_energy else None,
        svd_method="+".join(sorted({one.decomposition.method for one in edited})),
        svd_reconstruction_error=max(one.decomposition.reconstruction_error for one in edited),
        svd_orthogonality_error=max(one.decomposition.orthogonality_error for one in edited),
    )


def _extreme(which: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return which(known) if known else None


@contextmanager
def ablated(
    loaded: LoadedModel, ablation: Ablation, decompose: Decompose, edit_mode: str = "weight"
) -> Iterator[RealisedAblation]:
    """Apply one ablation to the model for the time of the context; afterwards every byte of it is as before.

    Yields what was really removed. decompose: a function from a matrix to its decomposition, which the caller caches.
    edit_mode: "weight" writes the edited matrices, rounded to the model's dtype; "branch" leaves the weights as they
        are and subtracts the removed part from the outputs in float32 (see branches.py).
    """
    by_name = {matrix.name: matrix for matrix in loaded.matrices}
    edited: list[_Edited] = []
    branches: list[Branch] = []
    with ExitStack() as undo:
        for name in ablation.target.matrices:
            matrix = by_name[name]
            decomposition = decompose(matrix)
            indices = select(ablation.region, decomposition.sigma, matrix.shape)
            original = matrix.read(loaded.model)
            if edit_mode == "weight":
                weight, removed = edit(original, decomposition, indices)
                undo.callback(matrix.write, loaded.model, original)
                matrix.write(loaded.model, weight)
            elif len(indices):
                branches.append(branch(matrix, original, decomposition, indices))
                removed = removal(branches[-1].effective(original), decomposition, indices)
            else:
                removed = removal(original, decomposition, indices)
            edited.append(_Edited(removed, decomposition, fraction_interval(indices, min(matrix.shape))))
        if branches:
            undo.enter_context(branched(loaded.model, branches))
        yield _combine(edited)
