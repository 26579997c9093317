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
    Component,
    Compression,
    Decile,
    Energy,
    EnergyMatched,
    Fraction,
    GavishDonoho,
    Index,
    Laser,
    LowerBulk,
    MarchenkoPastur,
    Named,
    Nothing,
    OtherOrder,
    Random,
    Reweight,
    Shuffled,
    bulk,
    fraction_interval,
    from_plain,
    interval,
    large,
    select,
    small,
    to_plain,
)
from harness.spectral.regions.component import ComponentRule
from harness.spectral.regions.decile import DecileRule
from harness.spectral.regions.energy import EnergyRule
from harness.spectral.regions.fraction import FractionRule, boundary
from harness.spectral.regions.gavish_donoho import GavishDonohoRule
from harness.spectral.regions.index import IndexRule, parse_slice
from harness.spectral.regions.laser import LaserRule
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


@settings(max_examples=200, deadline=None)
@given(rank=st.integers(1, 5000), thousandths=st.integers(1, 1000))
def test_large_and_small_of_one_size_have_equally_many_values(rank, thousandths):
    """Thousandths, because halves and exact multiples are among them. An odd rank has no half."""
    size = thousandths / 1000
    both = [len(picked(make(size), rank)) for make in (large, small)]
    assert both[0] == both[1] or (size == 0.5 and rank % 2 == 1 and both == [rank // 2, rank // 2 + 1])
    assert abs(both[0] - thousandths * rank / 1000) <= 0.5
    middle = picked(bulk(size), rank)
    assert abs(len(middle) - both[0]) <= 1
    if middle:
        assert middle[0] == rank - 1 - middle[-1]  # equally many values are left at both ends
    else:
        assert size * rank < 1


@settings(max_examples=100, deadline=None)
@given(rank=st.integers(1, 5000), fractions=st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_boundaries_are_symmetric_and_in_order(rank, fractions):
    found = [boundary(fraction, rank) for fraction in sorted(fractions)]
    assert found == sorted(found) and (boundary(0, rank), boundary(1, rank)) == (0, rank)
    for fraction in fractions:
        halved = rank % 2 == 1 and abs(fraction - 0.5) * rank < 1e-8  # half of an odd rank
        assert boundary(fraction, rank) + boundary(1 - fraction, rank) == rank - halved


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 5000), number=st.integers(1, 5))
def test_deciles_are_symmetric(rank, number):
    counts = [len(picked(Decile(d), rank)) for d in (number, 11 - number)]
    assert counts[0] == counts[1] or (number == 5 and rank % 2 == 1 and counts[1] == counts[0] + 1)


def test_fractions_are_rounded_as_one_would_by_hand():
    # The naive int(0.29 * 100) is 28.
    assert len(picked(large(0.29), 100)) == 29
    assert [len(picked(make(0.1), 256)) for make in (large, bulk, small)] == [26, 26, 26]  # 25.6
    assert picked(small(0.1), 10) == [9]
    assert picked(bulk(0.2), 10) == [4, 5]
    assert picked(bulk(0.1), 10) == [4, 5]  # 4.5 and 5.5: halves are rounded towards the ends
    assert picked(small(0.05), 10) == []  # 9.5
    assert picked(large(1.0), 7) == picked(bulk(1.0), 7) == list(range(7))
    assert picked(large(0.01), 20) == []


@pytest.mark.parametrize(("rank", "share", "kept"), [
    (4096, 0.01, 40), (4096, 0.05, 204), (4096, 0.1, 409), (4096, 0.9, 3686), (768, 0.1, 76), (768, 0.9, 691),
    (1600, 0.01, 16), (100, 0.29, 29), (32, 0.01, 0),
])
def test_laser_keeps_the_floor_of_its_share(rank, share, kept):
    """Its paper writes floor(rho * max_rank). Its code has int(1600 * (10 - 9.9) * 0.1), which is 15."""
    assert picked(Laser(share), rank) == list(range(kept, rank))


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
    others += [Laser(0.1), Nothing(), Index(0, 4), Index(None, 4), Index(-4, None), interval(0.1, 0.3)]
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
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            Laser(share)
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
    Decile(1), Decile(10), Laser(0.1), Laser(0), Index(0, 16), Index(None, 4), Index(-8, None),
    *(MarchenkoPastur(kind, estimator, margin) for kind in ("above", "inside", "below")
      for estimator, margin in (("gavish_donoho", False), ("bulk_fit", True))),
    GavishDonoho("above"), GavishDonoho("below"), Component(573), Component(-1), Component(-2, "loss"),
    Named(("28.up_proj:573", "0.k_proj:-1")), Compression(0.4), Compression(0.4, "zero_sum"),
    Reweight("sensitivity", "nuclear", 8, 0.2, 1.25, 0.8), Reweight("descent", "energy", step=0.2),
    Shuffled(Reweight("smooth", share=0.2, amplify=1.25, damp=0.8), 3),
    Nothing(), OtherOrder(), OtherOrder(0.5), Random(small(0.1), 3), Random(Random(Index(0, 4), 1), 2),
    EnergyMatched(bulk(0.2, "energy"), 0), LowerBulk(MarchenkoPastur("above", "usvt", True)),
    CONTROLS["rotated"](small(0.1), 3), CONTROLS["rotated_output"](Component(2), 3),
    *(CONTROLS[name]() for name in ("swap_values", "swap_vectors", "reference_matrices", "reference_model")),
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
    ({"by": "rate", "kind": "large"}, "'rate' is not a region rule; use one of fraction, decile, index, laser, energy"),
    ({"by": "fractoin", "kind": "large"}, "'fractoin' is not a region rule; did you mean 'fraction'"),
    ({"by": "control", "kind": "mixed"}, "'mixed' is not a control; known are random, energy_matched"),
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
    assert LaserRule().regions()[:2] == [Laser(0.9), Laser(0.8)]
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
    (lambda: LaserRule([]), r"^keep: \[\] is wrong; region.by=laser needs at least one"),
    (lambda: LaserRule([0.1, 1]), "^keep: 1 is wrong; a share of the rank that is kept must be at least 0 and below 1"),
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


def test_components_of_both_ends_are_single_values():
    regions = ComponentRule(ends=2, components=[7, -3, 1]).regions()
    assert [region.position for region in regions] == [0, 1, 7, -3, -2, -1]
    assert [picked(region, 9) for region in regions] == [[0], [1], [7], [6], [7], [8]]
    assert picked(Component(9), 9) == picked(Component(-10), 9) == []
    for wrong_ends in (-1, 0):
        with pytest.raises(SettingError, match="ends"):
            ComponentRule(ends=wrong_ends)


def test_all_components_and_those_by_a_loss():
    assert [one.position for one in ComponentRule(all=True).regions([(5, 9), (7, 7)])] == list(range(7))
    top = ComponentRule(ends=0, top=2).regions()
    assert [(one.position, one.by_loss) for one in top] == [(0, True), (1, True), (-2, True), (-1, True)]
    losses = {"a": torch.tensor([0.3, -0.2]), "b": torch.tensor([-0.2, 0.9, 0.1])}
    shapes = {"a": (2, 4), "b": (3, 3)}
    chosen = [[(name, picked(region, min(shapes[name]))) for name, region in one.resolved(losses, shapes).items()]
              for one in top]
    assert chosen == [[("a", [1]), ("b", [])], [("a", []), ("b", [0])],
                      [("a", [0]), ("b", [])], [("a", []), ("b", [1])]]
    with pytest.raises(ValueError, match="component 5 by loss: the matrices have 5 singular values together"):
        Component(5, "loss").resolved(losses, shapes)
    with pytest.raises(ValueError, match="depends on all matrices of a target"):
        select(Component(0, "loss"), torch.ones(3), (3, 3))
    with pytest.raises(ValueError, match="unknown order 'size' of components"):
        Component(0, "size")
    with pytest.raises(SettingError, match="components"):
        ComponentRule(all=True, components=[3])
