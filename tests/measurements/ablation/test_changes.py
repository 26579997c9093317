"""Regions of the change from a reference: identities bit for bit, controls against numpy, and the rows of the gap."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.measurements import compose_settings
from harness.measurements.ablation.cells import region_key
from harness.measurements.ablation.units import plan, restore
from harness.models.editing import Ablation, ablated
from harness.models.loading import describe_model, load
from harness.models.reference import describe_reference
from harness.models.reference_matrices import ComparedMatrices
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.models.targets import Target
from harness.models.treatment import Sources, Treatment
from harness.spectral import regions
from harness.spectral.changes import haar
from tests.checkpoints import save_checkpoint, text_file
from tests.models.test_adapter import save_adapter

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Every parameter differs, the norms and the embeddings, too."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tuned"))
    generator = torch.Generator().manual_seed(5)
    tensors = {name: weight + 0.05 * torch.randn(weight.shape, generator=generator)
               for name, weight in load_file(base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class Opened:
    """A tuned model, its reference, and the edits of the change between them."""

    def __init__(self, tuned, base, dtype="float32"):
        settings = ModelSettings(name=str(tuned), dtype=dtype, device="cpu")
        self.loaded = load(settings)
        reference = describe_reference(ReferenceSettings(name=str(base)), settings, describe_model(settings))
        self.other = load(reference.settings, reference.description)
        self.sources = Sources(lambda matrix: None, reference=ComparedMatrices(self.loaded, reference, 2**24, None))

    def edited(self, name, region, **treatment):
        """The matrix under an edit, and what was realised."""
        target = Target("matrix", name, (name,), 0)
        (matrix,) = [one for one in self.loaded.matrices if one.name == name]
        before = matrix.read(self.loaded.model)
        with ablated(self.loaded, Ablation(target, region, Treatment(**treatment)), self.sources) as realised:
            found = matrix.read(self.loaded.model)
        assert torch.equal(matrix.read(self.loaded.model), before)
        return found, realised

    def pair(self, name):
        """W and B."""
        (matrix,) = [one for one in self.loaded.matrices if one.name == name]
        return matrix.read(self.loaded.model), matrix.read(self.other.model)


@pytest.fixture(scope="module", params=DTYPES)
def opened(request, base, tuned):
    return Opened(tuned, base, request.param)


NAMES = ["0.up_proj", "1.down_proj", "2.q_proj", "1.k_proj"]  # tall, wide, square, wide


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_change_removed_is_the_reference_bit_for_bit(opened, name):
    weight, reference = opened.pair(name)
    everything = regions.interval(0, 1)
    found, realised = opened.edited(name, everything, of="change")
    assert torch.equal(found, reference) and not torch.equal(found, weight)
    assert realised.energy_removed == pytest.approx(1) and realised.realised_removal == 1
    change = float((weight.double() - reference.double()).norm())
    assert realised.norm_removed == pytest.approx(change, rel=1e-9)
    assert torch.equal(opened.edited(name, regions.ReferenceMatrices(), of="change")[0], reference)
    assert torch.equal(opened.edited(name, regions.Nothing(), of="change")[0], weight)
    if weight.shape[0] <= weight.shape[1]:  # the directions of the reference are all of its outputs
        assert torch.equal(opened.edited(name, everything, of="reference")[0], reference)


@pytest.mark.parametrize("of", ["change", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_removed_and_what_is_kept_partition_the_change(base, tuned, of, name):
    opened = Opened(tuned, base)
    weight, reference = (one.double() for one in opened.pair(name))
    removed, gone = opened.edited(name, regions.Decile(2), of=of)
    kept, left = opened.edited(name, regions.Decile(2), of=of, keep=True)
    # (W - P D) + (B + P D) = W + B, but for the rounding of the two to float32
    total = removed.double() + kept.double()
    assert torch.allclose(total, weight + reference, rtol=0, atol=2**-23 * float((weight + reference).abs().max()))
    assert gone.energy_removed + left.energy_removed == pytest.approx(1)
    assert gone.n_removed + left.n_removed == gone.n_values
    change, n = (weight - reference).numpy(), min(weight.shape)
    output = np.linalg.svd(change if of == "change" else reference.numpy(), full_matrices=False)[0]
    directions = output[:, round(n / 10):round(n / 5)]
    expected = weight.numpy() - directions @ (directions.T @ change)
    assert np.allclose(removed.numpy(), expected, rtol=0, atol=2**-22)
    assert gone.energy_removed == pytest.approx(
        np.linalg.norm(directions.T @ change) ** 2 / np.linalg.norm(change) ** 2, rel=1e-6)


def test_scale_damps_and_amplifies_the_change(base, tuned):
    opened = Opened(tuned, base)
    weight, reference = opened.pair("1.down_proj")
    doubled, _ = opened.edited("1.down_proj", regions.interval(0, 1), of="change", scale=2.0)
    assert torch.allclose(doubled, 2 * weight - reference, rtol=0, atol=1e-6)
    rank_one, _ = opened.edited("1.down_proj", regions.Index(0, 1), of="change", keep=True)
    assert np.linalg.matrix_rank((rank_one - reference).double().numpy(), tol=1e-4) == 1


@pytest.mark.parametrize("name", NAMES)
def test_swaps_are_those_of_numpy(base, tuned, name):
    opened = Opened(tuned, base)
    pair = [one.double().numpy() for one in opened.pair(name)]
    (uw, sw, vw), (ub, sb, vb) = (np.linalg.svd(one, full_matrices=False) for one in pair)
    for region, expected in ((regions.SwapValues(), uw * sb @ vw), (regions.SwapVectors(), ub * sw @ vb)):
        found, realised = opened.edited(name, region, of="change")
        assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-6)
        assert realised.norm_removed == pytest.approx(np.linalg.norm(pair[0] - expected), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_rotated_has_the_size_of_the_part_in_random_directions(base, tuned, name):
    opened = Opened(tuned, base)
    weight, reference = (one.double() for one in opened.pair(name))
    region = regions.Decile(1)
    real, of_real = opened.edited(name, region, of="change")
    turned, of_turned = opened.edited(name, regions.Rotated(region, 0), of="change")
    again, _ = opened.edited(name, regions.Rotated(region, 1), of="change")
    assert of_turned.norm_removed == pytest.approx(of_real.norm_removed, rel=1e-9)
    assert float((turned.double() - weight).norm()) == pytest.approx(float((real.double() - weight).norm()), rel=1e-5)
    assert not torch.allclose(turned, real) and not torch.allclose(turned, again)
    grafted, _ = opened.edited(name, regions.Rotated(region, 0), of="change", keep=True)
    assert torch.allclose(grafted.double() - reference, weight - turned.double(), rtol=0, atol=1e-6)
    n = min(weight.shape)
    random = haar(torch.empty(weight.shape[0], n, dtype=torch.float64), 0, f"output {name}")[:, : round(n / 10)]
    undone, _ = opened.edited(name, regions.Rotated(region, 0), of="reference")
    expected = weight - random @ (random.T @ (weight - reference))
    assert torch.allclose(undone.double(), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- studies


def words(model, base, text, folder, *more):
    return ["model=pretrained", f"model.name={model}", "model.device=cpu", f"reference.name={base}", "target=all",
            "task=text", f"tasks.text.data_files={text}", "tasks.text.split=train", "tasks.text.window=16",
            f"output={folder}", *more]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return text_file(tmp_path_factory.mktemp("text") / "text.txt", 200)


def test_a_study_of_a_change_and_the_gap(base, tuned, text, tmp_path):
    asked = words(tuned, base, text, tmp_path / "out", "region=change", "region.deciles=[1,10]")
    assert main(["run", "--quiet", *asked]) == 0
    rows = pd.read_parquet(tmp_path / "out" / "metrics").query("metric == 'nll'").set_index("region")
    assert set(rows.index) == {
        "none", "matrices of the reference", "reference", "own vectors, reference values",
        "reference vectors, own values",
        *(label for n in ("decile 1 (0.0-0.1), of the change", "decile 10 (0.9-1.0), of the change")
          for label in (n, f"rotated ({n}) seed 0")), "random (decile 1 (0.0-0.1), of the change) seed 0",
    } | set(rows.index[rows.index.str.startswith("random")])
    assert set(rows["status"]) == {"ok"}
    ask_base = words(base, base, text, tmp_path / "base", "region=fraction")
    assert main(["run", "--quiet", *(word for word in ask_base if not word.startswith("reference"))]) == 0
    of_base = pd.read_parquet(tmp_path / "base" / "metrics").query("metric == 'nll' and target == 'baseline'")
    assert rows.loc["reference", "value"] == of_base["value"].item()
    # norms, embeddings and head are still those of the tuned model
    gap = rows.loc["matrices of the reference", "value"] - rows.loc["reference", "value"]
    assert abs(gap) > 1e-3 and rows.loc["matrices of the reference", "n_matrices"] == 21
    edited = rows.drop(index="none")
    assert set(edited["reference"]) == {str(base)} and set(edited["region_of"]) == {"change"}
    assert edited["reference_digest"].nunique() == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert main(["run", "--quiet", *asked]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before
    assert main(["report", str(tmp_path / "out")]) == 0


def test_a_graft_the_other_way_round(base, tuned, text, tmp_path):
    """The whole change of the swapped pair, removed, is the tuned model's matrices in the base."""
    asked = words(base, tuned, text, tmp_path / "out", "region=fraction", "region.values=[1.0]", "region.of=change")
    assert main(["run", "--quiet", *asked]) == 0
    rows = pd.read_parquet(tmp_path / "out" / "metrics").query("metric == 'nll'").set_index("region")
    whole = [label for label in rows.index if label.endswith("of the change")][0]
    assert rows.loc[whole, "value"] == rows.loc["matrices of the reference", "value"]


def test_a_larger_vocabulary_has_no_row_of_the_whole_reference(base, text, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=3, vocab_size=80)
    asked = words(other, base, text, tmp_path / "out", "region=undo", "region.deciles=[1]", "region.keep=true")
    assert main(["run", "--quiet", *asked]) == 0
    rows = pd.read_parquet(tmp_path / "out" / "metrics")
    assert set(rows["status"]) == {"ok"} and "matrices of the reference" in set(rows["region"])
    assert "reference" not in set(rows["region"]) and set(rows["region_keep"].dropna()) == {True, False}


def test_ids_depend_on_the_reference_and_those_of_the_weights_do_not(base, tuned, text, tmp_path):
    def ids(*more, reference=base):
        settings = compose_settings("ablation", words(tuned, reference, text, tmp_path / "out", *more))
        return {(cell.ablation.target.label, cell.ablation.label): cell.id for cell in plan(settings).units}

    other = save_checkpoint(tmp_path / "other", seed=3)
    asked = ("region=change", "region.deciles=[1]")
    change, again, third = ids(*asked), ids(*asked), ids(*asked, reference=other)
    assert change == again
    assert {key for key in change if change[key] == third[key]} == {("baseline", "none")}
    undo = ids("region=undo", "region.deciles=[1]")
    assert {key for key in undo if undo[key] in change.values()} == {("baseline", "none")}
    assert "treatment" not in region_key(regions.Decile(1), Treatment())


def test_a_changed_reference_is_not_served_as_the_old_one(base, tuned, text, tmp_path):
    other = save_checkpoint(tmp_path / "other", seed=3)
    asked = words(tuned, other, text, tmp_path / "out", "region=change", "region.deciles=[1]")
    assert main(["run", "--quiet", *asked]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    settings = compose_settings("ablation", asked)
    assert restore(tmp_path / "out", manifest, settings).id
    save_checkpoint(other, seed=4)
    with pytest.raises(Exception, match="reference.name: it is no longer what"):
        restore(tmp_path / "out", manifest, settings)


def test_an_export_of_the_change_of_an_adapter(base, tmp_path, text):
    """The base and rank 1 of the change: model auditing, as a checkpoint."""
    adapter = save_adapter(tmp_path / "adapter", base)
    asked = ["model=adapter", f"model.adapter={adapter}", "model.device=cpu", "target=all", "region=index",
             "region.intervals=['0:1']", "region.of=change", "region.keep=true", f"output={tmp_path / 'out'}"]
    assert main(["export", *asked]) == 0
    found, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    name = "model.layers.1.mlp.down_proj.weight"
    change = (found[name] - plain[name]).double().numpy()
    assert np.linalg.matrix_rank(change, tol=1e-4) == 1
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], plain["model.layers.1.mlp.up_proj.weight"])


def test_bad_settings_are_one_line(base, tuned, text, tmp_path, capsys):
    def refused(*more, without=""):
        asked = [word for word in words(tuned, base, text, tmp_path / "out")
                 if not (without and word.startswith(without))]
        capsys.readouterr()
        assert main(["run", "--quiet", *asked, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err.removeprefix("harness: ")

    assert refused("region.of=change", without="reference").startswith("reference.name: must be set, because region.of")
    assert refused("region=decile").startswith(f"reference.name: '{base}' is wrong; only region.of=change")
    assert refused("region=change", "runtime.edit=branch").startswith("runtime.edit: 'branch' is wrong")
    assert refused("region=decile", "region.controls=[swap_values]").startswith("region.controls: 'swap_values' is")
    assert refused("region=change", "region.metric=activations").startswith("region.of: 'change' is wrong; a change is")
    assert refused("region=change", "region.of=weights").startswith("region.of: 'weights' is wrong; did you mean")
