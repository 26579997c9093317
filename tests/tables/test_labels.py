"""What reports call regions and models."""

from __future__ import annotations

import pytest

from harness.models.treatment import Treatment, label_of
from harness.spectral import regions
from harness.spectral.regions import sizes
from harness.spectral.regions.controls import EnergyMatched, LowerBulk, Nothing, OtherOrder, Random, Rotated
from harness.tables.labels import model_name, nominal_interval, region_words

TOP = regions.large(0.1)
WORDS = {
    "top 10 %": regions.large(0.1),
    "middle 10 %": regions.bulk(0.1),
    "bottom 0.5 %": regions.small(0.005),
    "bottom 99 %": regions.small(0.99),
    "whole matrix": regions.interval(0, 1),
    "keep top 1 %": regions.interval(0.01, 1),
    "bottom 30 %": regions.interval(0.7, 1),
    "keep bottom 10 %": regions.interval(0, 0.9),
    "20-50 % of the rank": regions.interval(0.2, 0.5),
    "top 10 % of the energy": regions.large(0.1, "energy"),
    "20-50 % of the energy": regions.interval(0.2, 0.5, "energy"),
    "decile 3 (20-30 %)": regions.Decile(3),
    "keep top 5 % (LASER)": regions.Laser(0.05),
    "largest value": regions.Index(0, 1),
    "keep largest 3 values": regions.Index(3, None),
    "smallest 8 values": regions.Index(-8, None),
    "values 2:-1": regions.Index(2, -1),
    "largest value alone": regions.Component(0),
    "3rd largest value alone": regions.Component(2),
    "12th smallest value alone": regions.Component(-12),
    "2nd best predicted value alone": regions.Component(1, "loss"),
    "worst predicted value alone": regions.Component(-1, "loss"),
    "values 0.k_proj:-1, 28.up_proj:573": regions.Named(("28.up_proj:573", "0.k_proj:-1")),
    "20 % fewer parameters": regions.Compression(0.2),
    "20 % fewer parameters, shared budget": regions.Compression(0.2, "zero_sum"),
    "reweighted by sensitivity, rank 8": regions.Reweight("sensitivity", "nuclear", 8, 0.2, 1.25, 0.8),
    "reweighted by descent, same energy": regions.Reweight("descent", "energy", step=0.2),
    "shuffled factors, reweighted by smooth": regions.Shuffled(
        regions.Reweight("smooth", share=0.2, amplify=1.25, damp=0.8), 0),
    "above the Marchenko-Pastur bulk": regions.MarchenkoPastur("above"),
    "below the Marchenko-Pastur bulk (usvt, Tracy-Widom margin)": regions.MarchenkoPastur("below", "usvt", True),
    "above the Gavish-Donoho threshold": regions.GavishDonoho("above"),
    "nothing removed": Nothing(),
    "other order of additions": OtherOrder(),
    "random, same count as top 10 %": Random(TOP, 0),
    "random, same count as bottom 99 %": Random(regions.interval(0.01, 1), 0),
    "random, same count as bottom 99 % (LASER)": Random(regions.Laser(0.01), 0),
    "random, same count as decile 3 (20-30 %), seed 2": Random(regions.Decile(3), 2),
    "random outside top 10 %, same count": Random(TOP, 0, disjoint=True),
    "random, same energy as top 10 %, seed 1": EnergyMatched(TOP, 1),
    "random outside top 10 %, same energy": EnergyMatched(TOP, 0, disjoint=True),
    "lower bulk, same count as above the Marchenko-Pastur bulk": LowerBulk(regions.MarchenkoPastur("above")),
    "random directions in place of decile 3 (20-30 %)": Rotated(regions.Decile(3), 0),
    "random directions with outputs as large as those of largest value alone": regions.RotatedOutput(
        regions.Component(0), 0),
}  # fmt: skip


def test_words_say_what_is_done():
    assert {region_words(region.label): region for region in WORDS.values()} == WORDS


def test_words_of_treatments():
    kept = Treatment(keep=True)
    assert region_words(label_of(TOP, kept)) == "keep top 10 %"
    assert region_words(label_of(regions.interval(0.01, 1), kept)) == "keep bottom 99 %"
    assert region_words(label_of(TOP, Treatment(metric="activations", keep=True))) == "keep top 10 %, activations"
    assert region_words(label_of(regions.interval(0.01, 1), Treatment(scale=1.5))) == "bottom 99 %, scaled by 1.5"
    of_change = label_of(Random(regions.Decile(1), 0), Treatment(of="change", reference="a"))
    assert region_words(of_change) == "random, same count as decile 1 (0-10 %), of the change"
    assert region_words("a rule, of another package") == "a rule, of another package"


@pytest.mark.parametrize("region", [*WORDS.values()], ids=lambda region: region.label)
def test_the_interval_that_a_label_asks_for_is_that_of_the_region(region):
    start, stop = nominal_interval(region.label)
    if region.by in ("fraction", "decile"):
        assert (start, stop) == pytest.approx((region.start, region.stop))
    elif region.by == "laser":
        assert (start, stop) == (region.keep, 1.0)
    else:
        assert (start, stop) == (None, None)


@pytest.mark.parametrize("kind", sizes.KINDS)
def test_all_sizes_have_words_of_their_own(kind):
    shares = [0.001, 0.01, 0.1, 1 / 3, 0.5, 0.9, 0.999]
    words = [region_words(regions.interval(*sizes.size_bounds(kind, share)).label) for share in shares]
    words += [region_words(getattr(regions, kind)(share).label) for share in shares]
    assert len(set(words)) >= len(shares) and all("%" in one for one in words)


def test_short_names_of_models():
    assert [model_name(name) for name in ("recall", "openai-community/gpt2", "/models/gpt2/")] == [
        "recall", "gpt2", "gpt2",
    ]  # fmt: skip
    assert model_name("/models", "sub/Small-Q4.gguf") == "Small-Q4" and model_name("a/b + c/d") == "b + d"
