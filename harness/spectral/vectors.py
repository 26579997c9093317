"""Statistics of the singular vectors of one matrix: Gaussian entries, localisation, and overlap with other vectors.

The null model of a singular vector is a unit vector of uniformly random direction. Its n entries are nearly independent
N(0, 1/n), but the normalisation correlates them. Tabulated Kolmogorov-Smirnov p-values are therefore biased, and the
null distribution is drawn instead (Staats, Thamm and Rosenow, arXiv 2410.17770 v1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from harness.spectral.decomposition import Decomposition

NULL_DRAWS = 1000
NULL_SEED = 20241023
NEIGHBOURS = 15  # neighbouring singular values over which the paper averages its p-values
_CHUNK_ELEMENTS = 1 << 20  # entries of vectors that are held at once: 8 MiB of float64, and a few copies of it


def vector_chunks(weight: Tensor, decomposition: Decomposition) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the singular vectors of weight [out, in], a few at a time.

    Yields (positions, output vectors, input vectors): the slice of positions in the spectrum, the c left singular
    vectors as rows of float64 [c, out], and the right ones as rows of float64 [c, in]. Vectors of the smaller side are
    those of the decomposition. Vectors of the longer side are W^T u (or W v) in float64, divided by their own norm and
    not by sigma: their error is about eps sigma_max / sigma, and `decomposition.reconstruction_error`, the largest
    cosine between two of them, has measured it. Where sigma is rounding noise (at most r eps sigma_max) the matrix
    does not determine the vector of the longer side, and its row is NaN. For a zero matrix all rows of both sides are
    NaN.
    """
    small, left = decomposition.vectors, decomposition.side == "left"
    wide = weight.detach().to(torch.float64)
    wide = wide if left else wide.T
    rank = len(decomposition.sigma)
    noise_level = rank * torch.finfo(torch.float64).eps * float(decomposition.sigma[0])
    size = max(1, _CHUNK_ELEMENTS // max(weight.shape))
    for start in range(0, rank, size):
        positions = slice(start, min(start + size, rank))
        short = small[:, positions].T
        long = short @ wide
        long = long / torch.linalg.vector_norm(long, dim=1, keepdim=True)
        lost = decomposition.sigma[positions] <= noise_level
        long[lost] = math.nan
        if noise_level == 0:
            short = torch.full_like(short, math.nan)
        yield positions, *((short, long) if left else (long, short))


def normality_distance(vectors: Tensor) -> Tensor:
    """Return the Kolmogorov-Smirnov distance between N(0, 1) and sqrt(n) times the entries of each unit vector.

    vectors: [c, n]. Returns float64 [c], on their device; NaN for a row of NaN. That the entries of eigenvectors of
    random matrices are Gaussian is the Porter-Thomas law.
    """
    n = vectors.shape[1]
    share = torch.special.ndtr((vectors.to(torch.float64) * math.sqrt(n)).sort(dim=1).values)
    steps = torch.arange(n + 1, dtype=torch.float64, device=vectors.device) / n
    return torch.maximum((steps[1:] - share).amax(1), (share - steps[:-1]).amax(1))


def porter_thomas_p(vectors: Tensor) -> Tensor:
    """Return the p-value of each unit vector of [c, n] against NULL_DRAWS random ones: float64 [c], on the CPU.

    It is (1 + number of draws that are at least as far from N(0, 1)) / (1 + NULL_DRAWS), and therefore never below
    1 / (1 + NULL_DRAWS). The draws depend on n alone and are the same in every process. NaN for a row of NaN.
    """
    distance = normality_distance(vectors).cpu()
    null = _null_distances(vectors.shape[1])
    below = torch.searchsorted(null, distance)  # the number of draws that are strictly smaller
    return torch.where(distance.isnan(), distance, (1 + len(null) - below).to(torch.float64) / (1 + len(null)))


def smoothed(values: Tensor, width: int = NEIGHBOURS) -> Tensor:
    """Return the mean of `values` [r] over a window of `width` positions around each: float64 [r].

    width must be odd. At the ends the window is shorter. NaN values are left out; a window of NaN alone gives NaN.
    """
    known = ~values.isnan()
    padding = torch.zeros(width // 2, dtype=torch.float64)

    def window_sum(terms: Tensor) -> Tensor:
        padded = torch.cat([padding, terms.to(torch.float64), padding])
        return padded.unfold(0, width, 1).sum(1)

    return window_sum(values.nan_to_num(0.0)) / window_sum(known)


def inverse_participation(vectors: Tensor) -> Tensor:
    """Return the sum of the fourth powers of the entries of each unit vector of [c, n]: float64 [c].

    It is 1 if only one entry is not zero, 1 / n if all are equally large, and 3 / (n + 2) on average for a random unit
    vector.
    """
    return (vectors.to(torch.float64) ** 4).sum(1)


def largest_component(vectors: Tensor) -> Tensor:
    """Return the largest |entry| of each vector of [c, n]: float64 [c].

    This is the localisation control M_k of arXiv 2410.17770, appendix C.
    """
    return vectors.to(torch.float64).abs().amax(1)


def overlaps(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the overlap O_k = max_j |v_k . f_j| of each vector with a basis, and the j that gives it.

    vectors: [c, n], the unit vectors v_k. basis: [n, m], whose orthonormal columns are the f_j. Returns the overlaps
    [c], in the dtype of the vectors, and int64 [c]. This is eq. 7 of arXiv 2410.17770, with an absolute value because
    the sign of a singular vector is arbitrary.
    """
    values, where = (vectors @ basis).abs().max(dim=1)
    return values, where


@lru_cache(maxsize=64)
def random_overlap(n: int, m: int) -> tuple[float, float]:
    """Return mean and standard deviation of max_j |v . f_j| for a random unit vector v and orthonormal f_1 ... f_m.

    v has n dimensions; the numbers come from NULL_DRAWS draws. The paper's band is the mean plus and minus three
    standard deviations. With m = n this is also the null distribution of `largest_component`.
    """
    largest = torch.cat([chunk[:, :m].abs().amax(1) for chunk in _random_unit_vectors(n)])
    return float(largest.mean()), float(largest.std())


@lru_cache(maxsize=64)
def _null_distances(n: int) -> Tensor:
    return torch.cat([normality_distance(chunk) for chunk in _random_unit_vectors(n)]).sort().values


def _random_unit_vectors(n: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(NULL_SEED)
    left = NULL_DRAWS
    while left:
        count = min(left, max(1, _CHUNK_ELEMENTS // n))
        draws = torch.randn(count, n, generator=generator, dtype=torch.float64)
        yield draws / torch.linalg.vector_norm(draws, dim=1, keepdim=True)
        left -= count
