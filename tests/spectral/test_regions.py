"""Regions partition the rank, whatever the rank, and mean what Python, the energy or the count says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spectral.regions import (
    Region,
    decile_region,
    energy_matched_region,
    fraction_interval,
    index_region,
    interval_region,
    none_region,
    parse_interval,
    random_region,
    rank_only,
    select,
    sized_region,
)


def picked(region, rank, sigma=None):
    return select(region, sigma, (rank, rank + 3)).tolist()


def spectrum(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 5000))
def test_deciles_partition_the_rank(rank):
    assert sum((picked(decile_region(d), rank) for d in range(1, 11)), []) == list(range(rank))


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 3000), cuts=st.lists(st.integers(1, 999), max_size=6, unique=True),
       by=st.sampled_from(["fraction", "energy"]))
def test_adjacent_intervals_partition(rank, cuts, by):
    bounds = [0, *(cut / 1000 for cut in sorted(cuts)), 1]
    sigma = spectrum(rank)
    regions = [interval_region(a, b, by) for a, b in zip(bounds, bounds[1:])]
    assert sum((picked(region, rank, sigma) for region in regions), []) == list(range(rank))


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 3000), size=st.floats(0.001, 0.999), by=st.sampled_from(["fraction", "energy"]))
def test_large_and_the_complementary_small_partition(rank, size, by):
    sigma = spectrum(rank)
    large, small = sized_region("large", size, by), sized_region("small", 1 - size, by)
    assert picked(large, rank, sigma) + picked(small, rank, sigma) == list(range(rank))


def test_fraction_floors_as_one_would_by_hand():
    # The naive int(0.29 * 100) is 28; LASER's int(1600 * (10 - 9.9) * 0.1) is 15.
    assert len(picked(sized_region("large", 0.29), 100)) == 29
    assert len(picked(sized_region("large", 0.01), 1600)) == 16
    assert picked(sized_region("small", 0.1), 10) == [9]
    assert picked(sized_region("bulk", 0.2), 10) == [4, 5]
    assert picked(sized_region("large", 1.0), 7) == picked(sized_region("bulk", 1.0), 7) == list(range(7))
    assert picked(sized_region("large", 0.01), 20) == []


def test_decile_one_is_the_largest():
    assert picked(decile_region(1), 20) == [0, 1] and picked(decile_region(10), 20) == [18, 19]
    assert decile_region(3).label == "decile 3 (0.2-0.3)"
    for bad in (0, 11, 1.5):
        with pytest.raises(ValueError, match="1 .largest. to 10"):
            decile_region(bad)


@settings(max_examples=100, deadline=None)
@given(start=st.none() | st.integers(-40, 40), stop=st.none() | st.integers(-40, 40), rank=st.integers(1, 30))
def test_index_regions_are_python_slices_or_refused(start, stop, rank):
    try:
        region = index_region(start, stop)
    except ValueError:
        assert all(not list(range(n))[start:stop] for n in range(1, 90))
        return
    assert picked(region, rank) == list(range(rank))[start:stop]


def test_minus_zero_is_the_end_and_not_nothing():
    assert picked(parse_interval("-8:-0", "index"), 20) == list(range(12, 20))
    assert picked(parse_interval("-8:", "index"), 20) == list(range(12, 20))
    with pytest.raises(ValueError, match="leave the end open"):
        index_region(-8, -0)


def test_parse_interval():
    assert parse_interval("0:16", "index").label == "index 0:16"
    assert parse_interval("1:", "index").label == "index 1:"
    assert parse_interval(" 0.2 : 0.5", "fraction").label == "interval 0.2:0.5"
    assert parse_interval("0.9:", "energy").label == "interval energy 0.9:1"
    for text, by in (("0.5:1", "index"), ("5", "index"), ("a:b", "fraction")):
        with pytest.raises(ValueError, match=f"'{text}'"):
            parse_interval(text, by)
    for text in ("0.5:0.2", "-0.1:0.5", "0.5:1.5", "nan:1"):
        with pytest.raises(ValueError, match="0 <= start < stop <= 1"):
            parse_interval(text, "fraction")


def test_energy_boundary_is_the_smallest_k_that_holds_the_share():
    sigma = torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64)  # squared: 4 1 1 1 1 of 8
    assert picked(sized_region("large", 0.5, "energy"), 5, sigma) == [0]
    assert picked(sized_region("large", 0.500001, "energy"), 5, sigma) == [0, 1]
    assert picked(sized_region("small", 0.5, "energy"), 5, sigma) == [1, 2, 3, 4]
    assert picked(sized_region("large", 1.0, "energy"), 5, sigma) == [0, 1, 2, 3, 4]
    # A tail of zeros belongs to the small end: only the share 1 claims it for the large one.
    assert picked(sized_region("large", 1.0, "energy"), 3, torch.tensor([1.0, 0, 0])) == [0, 1, 2]
    assert picked(sized_region("large", 0.999, "energy"), 3, torch.tensor([1.0, 0, 0])) == [0]
    assert picked(sized_region("large", 0.5, "energy"), 3, torch.zeros(3)) == [0]


def test_random_has_the_count_of_its_reference_and_depends_on_the_seed_only():
    reference = sized_region("small", 0.1)
    first = select(random_region(reference, 0), None, (200, 300))
    assert len(first) == len(select(reference, None, (200, 300))) == 20
    assert torch.equal(first, first.unique())
    torch.manual_seed(5)
    assert torch.equal(first, select(random_region(reference, 0), None, (200, 300)))
    assert not torch.equal(first, select(random_region(reference, 1), None, (200, 300)))
    assert fraction_interval(first, 200) == (None, None)


@pytest.mark.parametrize("reference", [sized_region("small", 0.2), sized_region("bulk", 0.3), decile_region(1)])
def test_energy_matched_control(reference):
    sigma = spectrum(400)
    chosen = select(energy_matched_region(reference, 3), sigma, (400, 400))
    target = float((sigma[select(reference, None, (400, 400))] ** 2).sum())
    assert abs(float((sigma[chosen] ** 2).sum()) - target) < 1e-3 * target
    assert torch.equal(chosen, chosen.unique())
    assert not torch.equal(chosen, select(reference, None, (400, 400)))


def test_what_depends_on_the_rank_alone():
    fraction = sized_region("large", 0.1)
    energy = sized_region("large", 0.1, "energy")
    for region in (fraction, decile_region(2), index_region(0, 4), none_region(), random_region(fraction, 0)):
        assert rank_only(region)
        select(region, None, (30, 40))
    for region in (energy, random_region(energy, 0), energy_matched_region(fraction, 0)):
        assert not rank_only(region)
        with pytest.raises(ValueError, match="depends on the singular values"):
            select(region, None, (30, 40))


def test_fraction_interval():
    assert fraction_interval(torch.arange(3, 9), 12) == (0.25, 0.75)
    assert fraction_interval(torch.arange(0), 12) == (None, None)
    assert fraction_interval(torch.tensor([1, 2, 4]), 12) == (None, None)


def test_labels_differ():
    sizes = [sized_region(kind, f, by) for kind in ("large", "bulk", "small") for f in (0.1, 0.3, 1)
             for by in ("fraction", "energy")]
    others = [decile_region(d) for d in range(1, 11)] + [none_region(), index_region(0, 4), index_region(None, 4),
                                                         index_region(-4, None), interval_region(0.1, 0.3)]
    controls = [make(region, seed) for region in sizes for seed in (0, 1)
                for make in (random_region, energy_matched_region)]
    labels = [region.label for region in sizes + others + controls]
    assert len(set(labels)) == len(labels)
    assert sized_region("small", 0.1).label == "small 0.1" and sized_region("bulk", 0.3).label == "bulk 0.3"
    assert sized_region("large", 0.9, "energy").label == "large energy 0.9"


def test_bad_parameters():
    for size in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError):
            sized_region("large", size)
    with pytest.raises(ValueError, match="large, bulk, small"):
        sized_region("middle", 0.1)
    with pytest.raises(ValueError, match="unknown region rule"):
        Region("large", "rate", 0.0, 0.1)
    with pytest.raises(ValueError, match="needs a seed and a reference"):
        Region("random", "control", seed=0)
    with pytest.raises(ValueError, match="8x9 matrix has 8 singular values"):
        select(sized_region("large", 0.5), torch.ones(9), (8, 9))
