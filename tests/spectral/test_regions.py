"""Regions partition the rank, whatever the rank, and mean what Python, the energy or the count says."""

import json
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError, SettingError
from harness.spectral.regions import (
    CONTROLS,
    RULES,
    Decile,
    Energy,
    EnergyMatched,
    Fraction,
    GavishDonoho,
    Index,
    LowerBulk,
    MarchenkoPastur,
    Nothing,
    Random,
    bulk,
    fraction_interval,
    from_plain,
    interval,
    large,
    select,
    small,
    to_plain,
)
from harness.spectral.regions.decile import DecileRule
from harness.spectral.regions.energy import EnergyRule
from harness.spectral.regions.fraction import FractionRule
from harness.spectral.regions.gavish_donoho import GavishDonohoRule
from harness.spectral.regions.index import IndexRule, parse_slice
from harness.spectral.regions.marchenko_pastur import MarchenkoPasturRule
from harness.spectral.regions.sizes import parse_interval


def picked(region, rank, sigma=None):
    return select(region, sigma, (rank, rank + 3)).tolist()


def spectrum(rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 5000))
def test_deciles_partition_the_rank(rank):
    assert sum((picked(Decile(d), rank) for d in range(1, 11)), []) == list(range(rank))


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 3000), cuts=st.lists(st.integers(1, 999), max_size=6, unique=True),
       by=st.sampled_from(["fraction", "energy"]))
def test_adjacent_intervals_partition(rank, cuts, by):
    bounds = [0, *(cut / 1000 for cut in sorted(cuts)), 1]
    sigma = spectrum(rank)
    regions = [interval(a, b, by) for a, b in zip(bounds, bounds[1:])]
    assert sum((picked(region, rank, sigma) for region in regions), []) == list(range(rank))


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 3000), size=st.floats(0.001, 0.999), by=st.sampled_from(["fraction", "energy"]))
def test_large_and_the_complementary_small_partition(rank, size, by):
    sigma = spectrum(rank)
    first, rest = large(size, by), small(1 - size, by)
    assert picked(first, rank, sigma) + picked(rest, rank, sigma) == list(range(rank))


def test_fraction_floors_as_one_would_by_hand():
    # The naive int(0.29 * 100) is 28; LASER's int(1600 * (10 - 9.9) * 0.1) is 15.
    assert len(picked(large(0.29), 100)) == 29
    assert len(picked(large(0.01), 1600)) == 16
    assert picked(small(0.1), 10) == [9]
    assert picked(bulk(0.2), 10) == [4, 5]
    assert picked(large(1.0), 7) == picked(bulk(1.0), 7) == list(range(7))
    assert picked(large(0.01), 20) == []


def test_decile_one_is_the_largest():
    assert picked(Decile(1), 20) == [0, 1] and picked(Decile(10), 20) == [18, 19]
    assert Decile(3).label == "decile 3 (0.2-0.3)"
    for bad in (0, 11, 1.5):
        with pytest.raises(ValueError, match="1 .largest. to 10"):
            Decile(bad)


@settings(max_examples=100, deadline=None)
@given(start=st.none() | st.integers(-40, 40), stop=st.none() | st.integers(-40, 40), rank=st.integers(1, 30))
def test_index_regions_are_python_slices_or_refused(start, stop, rank):
    try:
        region = Index(start, stop)
    except ValueError:
        assert all(not list(range(n))[start:stop] for n in range(1, 90))
        return
    assert picked(region, rank) == list(range(rank))[start:stop]


def parsed(text, by):
    if by == "index":
        return parse_slice(text)
    return (Fraction if by == "fraction" else Energy)("interval", *parse_interval(text))


def test_minus_zero_is_the_end_and_not_nothing():
    assert picked(parsed("-8:-0", "index"), 20) == list(range(12, 20))
    assert picked(parsed("-8:", "index"), 20) == list(range(12, 20))
    with pytest.raises(ValueError, match="leave the end open"):
        Index(-8, -0)


def test_parse_interval():
    assert parsed("0:16", "index").label == "index 0:16"
    assert parsed("1:", "index").label == "index 1:"
    assert parsed(" 0.2 : 0.5", "fraction").label == "interval 0.2:0.5"
    assert parsed("0.9:", "energy").label == "interval energy 0.9:1"
    for text, by in (("0.5:1", "index"), ("5", "index"), ("a:b", "fraction")):
        with pytest.raises(ValueError, match=f"'{text}'"):
            parsed(text, by)
    for text in ("0.5:0.2", "-0.1:0.5", "0.5:1.5", "nan:1"):
        with pytest.raises(ValueError, match="0 <= start < stop <= 1"):
            parsed(text, "fraction")


def test_energy_boundary_is_the_smallest_k_that_holds_the_share():
    sigma = torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64)  # squared: 4 1 1 1 1 of 8
    assert picked(large(0.5, "energy"), 5, sigma) == [0]
    assert picked(large(0.500001, "energy"), 5, sigma) == [0, 1]
    assert picked(small(0.5, "energy"), 5, sigma) == [1, 2, 3, 4]
    assert picked(large(1.0, "energy"), 5, sigma) == [0, 1, 2, 3, 4]
    # A tail of zeros belongs to the small end: only the share 1 claims it for the large one.
    assert picked(large(1.0, "energy"), 3, torch.tensor([1.0, 0, 0])) == [0, 1, 2]
    assert picked(large(0.999, "energy"), 3, torch.tensor([1.0, 0, 0])) == [0]
    assert picked(large(0.5, "energy"), 3, torch.zeros(3)) == [0]


def test_random_has_the_count_of_its_reference_and_depends_on_the_seed_only():
    reference = small(0.1)
    first = select(Random(reference, 0), None, (200, 300))
    assert len(first) == len(select(reference, None, (200, 300))) == 20
    assert torch.equal(first, first.unique())
    torch.manual_seed(5)
    assert torch.equal(first, select(Random(reference, 0), None, (200, 300)))
    assert not torch.equal(first, select(Random(reference, 1), None, (200, 300)))
    assert fraction_interval(first, 200) == (None, None)


def test_a_disjoint_control_draws_nothing_of_its_reference():
    reference, shape = small(0.3), (200, 300)
    inside = select(reference, None, shape)
    seen = []
    for seed in range(20):
        chosen = select(Random(reference, seed, disjoint=True), None, shape)
        assert len(chosen) == 60 and not torch.isin(chosen, inside).any()
        seen.append(chosen)
    assert len(torch.cat(seen).unique()) == 140  # every other value may be drawn
    assert len(select(Random(small(0.9), 0, disjoint=True), None, shape)) == 20  # no more are left
    sigma = spectrum(400)
    target = float((sigma[select(reference, None, (400, 400))] ** 2).sum())
    chosen = select(EnergyMatched(reference, 3, disjoint=True), sigma, (400, 400))
    assert not torch.isin(chosen, select(reference, None, (400, 400))).any()
    assert abs(float((sigma[chosen] ** 2).sum()) - target) < 1e-2 * target


@pytest.mark.parametrize("reference", [small(0.2), bulk(0.3), Decile(1)])
def test_energy_matched_control(reference):
    sigma = spectrum(400)
    chosen = select(EnergyMatched(reference, 3), sigma, (400, 400))
    target = float((sigma[select(reference, None, (400, 400))] ** 2).sum())
    assert abs(float((sigma[chosen] ** 2).sum()) - target) < 1e-3 * target
    assert torch.equal(chosen, chosen.unique())
    assert not torch.equal(chosen, select(reference, None, (400, 400)))


def test_what_depends_on_the_rank_alone():
    fraction = large(0.1)
    energy = large(0.1, "energy")
    for region in (fraction, Decile(2), Index(0, 4), Nothing(), Random(fraction, 0)):
        assert region.rank_only
        select(region, None, (30, 40))
    for region in (energy, Random(energy, 0), EnergyMatched(fraction, 0)):
        assert not region.rank_only
        with pytest.raises(ValueError, match="depends on the singular values"):
            select(region, None, (30, 40))


def test_fraction_interval():
    assert fraction_interval(torch.arange(3, 9), 12) == (0.25, 0.75)
    assert fraction_interval(torch.arange(0), 12) == (None, None)
    assert fraction_interval(torch.tensor([1, 2, 4]), 12) == (None, None)


def test_labels_differ():
    sizes = [size(f, by) for size in (large, bulk, small) for f in (0.1, 0.3, 1) for by in ("fraction", "energy")]
    others = [Decile(d) for d in range(1, 11)]
    others += [Nothing(), Index(0, 4), Index(None, 4), Index(-4, None), interval(0.1, 0.3)]
    controls = [make(region, seed, disjoint) for region in sizes for seed in (0, 1) for disjoint in (False, True)
                for make in (Random, EnergyMatched)]
    labels = [region.label for region in sizes + others + controls]
    assert len(set(labels)) == len(labels)
    assert small(0.1).label == "small 0.1" and bulk(0.3).label == "bulk 0.3"
    assert large(0.9, "energy").label == "large energy 0.9"


def test_bad_parameters():
    for size in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError):
            large(size)
    for region_type in (Fraction, Energy):
        with pytest.raises(ValueError, match="large, bulk, small"):
            region_type.of_size("middle", 0.1)
        with pytest.raises(ValueError, match="unknown region kind 'middle' by .*: use large, bulk, small, interval"):
            region_type("middle", 0.0, 0.1)
    for make in (large, bulk, small):
        with pytest.raises(ValueError, match="by fraction or by energy, not by 'rate'"):
            make(0.1, "rate")
    with pytest.raises(ValueError, match="by fraction or by energy, not by 'rate'"):
        interval(0.0, 0.1, "rate")
    with pytest.raises(TypeError, match="reference"):
        Random(seed=0)
    with pytest.raises(ValueError, match="8x9 matrix has 8 singular values"):
        select(large(0.5), torch.ones(9), (8, 9))


REGIONS = [
    large(0.1), bulk(0.3), small(1), interval(0.2, 0.35), large(0.9, "energy"), interval(0.0, 0.5, "energy"),
    Decile(1), Decile(10), Index(0, 16), Index(None, 4), Index(-8, None),
    *(MarchenkoPastur(kind, estimator, margin) for kind in ("above", "inside", "below")
      for estimator, margin in (("gavish_donoho", False), ("bulk_fit", True))),
    GavishDonoho("above"), GavishDonoho("below"),
    Nothing(), Random(small(0.1), 3), Random(Random(Index(0, 4), 1), 2), EnergyMatched(bulk(0.2, "energy"), 0),
    LowerBulk(MarchenkoPastur("above", "usvt", True)),
]  # fmt: skip


def test_every_region_is_read_back_from_plain_values():
    types = {rule.region_type for _, rule in RULES.items()} | set(CONTROLS.values())
    assert {type(region) for region in REGIONS} == types
    for region in REGIONS:
        written = json.loads(json.dumps(to_plain(region)))
        assert (written["by"], written["kind"]) == (region.by, region.kind)
        again = from_plain(written)
        assert again == region and type(again) is type(region) and again.label == region.label
        assert to_plain(again) == to_plain(region)
        # a region is one value: equal ones are one entry of a study, and nothing changes one
        assert {region: 1} == {again: 1}
        for field in fields(region):
            with pytest.raises(AttributeError):
                setattr(region, field.name, None)
    assert len({json.dumps(to_plain(region)) for region in REGIONS}) == len(REGIONS)


@pytest.mark.parametrize("values, message", [
    ({"by": "rate", "kind": "large"}, "'rate' is not a region rule; use one of fraction, decile, index, energy, mp"),
    ({"by": "fractoin", "kind": "large"}, "'fractoin' is not a region rule; did you mean 'fraction'"),
    ({"by": "control", "kind": "shuffled"}, "'shuffled' is not a control; known are random, energy_matched"),
    ({"by": "control", "kind": "random", "seed": 0, "reference": {"by": "rate", "kind": "x"}}, "'rate' is not a"),
])  # fmt: skip
def test_plain_values_of_what_is_not_installed(values, message):
    with pytest.raises(InputError, match=message):
        from_plain(values)


def test_rules_list_their_regions():
    assert FractionRule().regions() == [large(0.1), bulk(0.1), small(0.1)]
    assert FractionRule(["small"], [0.1, 0.3]).regions() == [small(0.1), small(0.3)]
    assert FractionRule(["small", "bulk"], [0.1, 0.2], ["0.9:"]).regions() == [
        small(0.1), small(0.2), bulk(0.1), bulk(0.2), interval(0.9, 1),
    ]  # fmt: skip
    assert FractionRule([], [], ["0.2:0.5"]).regions() == [interval(0.2, 0.5)]
    assert EnergyRule(["large"], [0.9], ["0.9:"]).regions() == [large(0.9, "energy"), interval(0.9, 1, "energy")]
    assert DecileRule().regions() == [Decile(d) for d in range(1, 11)]
    assert IndexRule(["0:16", "-8:-0"]).regions() == [Index(0, 16), Index(-8, None)]
    assert MarchenkoPasturRule(["above"], "usvt", True).regions() == [MarchenkoPastur("above", "usvt", True)]
    assert [region.kind for region in MarchenkoPasturRule().regions()] == ["above", "inside", "below"]
    assert GavishDonohoRule().regions() == [GavishDonoho("above"), GavishDonoho("below")]


@pytest.mark.parametrize("make, message", [
    (lambda: FractionRule(values=[0.1, 0]), "^values: 0 is wrong; a fraction must be above 0 and at most 1$"),
    (lambda: EnergyRule(values=[float("nan")]), "^values: nan is wrong; a fraction must be above 0"),
    (lambda: FractionRule(values=[]), r"^values: \[\] is wrong; name at least one, for example \[0.1\]"),
    (lambda: FractionRule(kinds=[]), r"^kinds: \[\] is wrong; name at least one, for example \[small\]"),
    (lambda: FractionRule(intervals=["0.5:0.2"]), "^intervals: region interval by fraction needs 0 <= start < stop"),
    (lambda: EnergyRule(intervals=["half"]), "^intervals: interval 'half' is not start:stop with numbers$"),
    (lambda: DecileRule([]), r"^deciles: \[\] is wrong; region.by=decile needs at least one"),
    (lambda: DecileRule([1, 11]), "^deciles: 11 is wrong; deciles are 1 .the largest tenth. to 10"),
    (lambda: IndexRule(), r"^intervals: \[\] is wrong; region.by=index needs at least one"),
    (lambda: IndexRule(["0.5:1"]), "^intervals: interval '0.5:1' is not start:stop with whole numbers$"),
    (lambda: IndexRule(["4:4"]), "^intervals: index region 4:4 is empty"),
    (lambda: MarchenkoPasturRule([]), r"^mp: \[\] is wrong; region.by=mp needs at least one"),
    (lambda: MarchenkoPasturRule(estimator="iqr"), "^estimator: 'iqr' is wrong; use one of gavish_donoho"),
    (lambda: GavishDonohoRule([]), r"^gavish_donoho: \[\] is wrong; region.by=gavish_donoho needs at least one"),
])  # fmt: skip
def test_rules_refuse_what_cannot_be(make, message):
    with pytest.raises(SettingError, match=message):
        make()
