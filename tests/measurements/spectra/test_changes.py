"""`harness spectra` with a reference, from the command line to its tables and its report, on tiny models."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.engine.plan import digest
from harness.measurements.spectra.change_report import read_changes
from harness.measurements.spectra.tables import CHANGE_OVERLAPS, CHANGE_REGIONS, CHANGES, read_spectra
from harness.models.loading import describe_model
from harness.models.settings import ModelSettings
from tests.checkpoints import save_checkpoint
from tests.models.test_adapter import save_adapter


def run(model, folder, *settings):
    return main(["spectra", "--quiet", "model=pretrained", f"model.name={model}", "model.device=cpu", "vectors=false",
                 f"output={folder}", *settings])


def written(folder):
    """When each figure of a report was written, by its name."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def tune(base, folder, seed, only=""):
    """A copy of a checkpoint whose matrices have a change of low rank and some noise."""
    save_checkpoint(folder)
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in tensors.items():
        if "layers" in name and weight.ndim == 2 and only in name:
            left, right = (torch.randn(n, 2, generator=generator) for n in weight.shape)
            weight += 0.05 * left @ right.T + 0.01 * torch.randn(weight.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    return [tune(base, folder / name, seed, only) for name, seed, only in (("one", 1, ""), ("two", 2, "mlp"))]


def test_changes_of_two_models_and_their_overlap(base, tuned, tmp_path, capsys):
    settings = (f"reference.name={base}", f"revisions=[{tuned[0]},{tuned[1]}]", "blocks=[0,1]", "changes.seeds=[0,1]")
    assert run(tuned[0].parent, tmp_path, *settings) == 0
    changes, regions, overlaps = (read_spectra(tmp_path, name) for name in
                                  ("changes", "change_regions", "change_overlaps"))
    for table, columns in ((changes, CHANGES), (regions, CHANGE_REGIONS), (overlaps, CHANGE_OVERLAPS)):
        assert set(table) == {column.name for column in columns}
    one, two = str(tuned[0]), str(tuned[1])
    of = changes.groupby(["checkpoint", "control"]).size()
    assert of[one].to_dict() == {"noise": 28, "real": 14, "rotated": 28}
    assert of[two].to_dict() == {"noise": 12, "real": 14, "rotated": 12}  # the matrices of attention did not change
    w, b = (load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"].double()
            for folder in (tuned[0], base))
    row = changes[(changes["matrix"] == "1.up_proj") & (changes["checkpoint"] == one)].set_index("control")
    assert row.loc["real", "relative_change"] == pytest.approx(float((w - b).norm() / b.norm()), rel=1e-12)
    assert row.loc["real", "change_sigma_max"] == pytest.approx(float(torch.linalg.svdvals(w - b)[0]), rel=1e-10)
    assert row.loc["real", "reference_sigma_max"] == pytest.approx(float(torch.linalg.svdvals(b)[0]), rel=1e-10)
    same = changes[(changes["checkpoint"] == two) & (changes["matrix"] == "0.q_proj")]
    assert same["relative_change"].tolist() == [0] and same["share_unchanged"].tolist() == [1]
    assert same["change_stable_rank"].isna().all()
    assert not ((regions["checkpoint"] == two) & (regions["matrix"] == "0.q_proj")).any()
    short = regions[(regions["matrix"] == "0.up_proj") & (regions["side"] == "input") & (regions["control"] == "real")]
    assert short.groupby("checkpoint")["energy"].sum().tolist() == pytest.approx([1, 1])
    # both orders of the pair, for the six matrices that both changed, and the two draws of each rotated pair
    assert overlaps.groupby(["checkpoint", "other", "control"]).size().to_dict() == {
        (two, one, "real"): 6, (two, one, "rotated"): 12, (one, two, "real"): 6, (one, two, "rotated"): 12,
    }
    assert main(["report", str(tmp_path)]) == 0
    out = tmp_path / "report"
    lines, first = (out / "spectra.md").read_text(), written(out)
    next(out.glob("relative_change-*.png")).unlink()
    (out / "of-another-report.png").touch()
    assert main(["report", str(tmp_path)]) == 0  # draws what is missing, and no more
    again = written(out)
    assert again.keys() == first.keys() and (out / "spectra.md").read_text() == lines
    assert [name.split("-")[0] for name in first if first[name] != again[name]] == ["relative_change"]
    assert "6 of 14 matrices changed" in lines and "14 of 14 matrices changed" in lines
    assert "within that of" in lines and "first output vectors are intruders" in lines
    assert {path.name.split("-")[0] for path in (tmp_path / "report").glob("*.png")} >= {"changes", "relative_change"}
    assert main(["plan", "spectra", "model=pretrained", f"model.name={tuned[0]}", f"reference.name={base}"]) == 0
    assert f"changes from {base}" in capsys.readouterr().out


def test_a_change_of_bfloat16_checkpoints_is_that_of_the_stored_weights(tmp_path):
    folders = [save_checkpoint(tmp_path / str(seed), dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
    for dtype in ("auto", "float32"):
        assert run(folders[0], tmp_path / dtype, f"reference.name={folders[1]}", f"model.dtype={dtype}",
                   "blocks=[0]", "layer_types=[q_proj]") == 0
    rows = [read_spectra(tmp_path / dtype, "changes").drop(columns=["spectrum_id", "seconds_change"])
            for dtype in ("auto", "float32")]
    pd.testing.assert_frame_equal(*rows)
    assert 1e-3 < rows[0]["rounding_floor"][0] < 2e-3


def test_the_reference_of_an_adapter_is_its_base(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base)
    assert main(["spectra", "--quiet", "model=adapter", f"model.adapter={adapter}", "model.device=cpu", "blocks=[0]",
                 "vectors=false", f"output={tmp_path / 'out'}"]) == 0
    real = read_changes(tmp_path / "out").changes.query("control == 'real'").set_index("matrix")
    assert real["reference"].unique().tolist() == [str(base)]
    assert real["model"].unique().tolist() == [f"{base} + {adapter}"]
    assert real.index[real["relative_change"] > 0].tolist() == ["0.q_proj", "0.down_proj"]
    assert (real["change_rank_90"].dropna() <= 3).all()


def test_ids_depend_on_the_reference_and_those_without_one_are_as_before(base, tuned, tmp_path):
    def ids(*settings):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert run(tuned[0], out, "layer_types=[q_proj]", "blocks=[0]", *settings) == 0
        return read_spectra(out, "matrices")["spectrum_id"].tolist()

    reference = f"reference.name={base}"
    found = [ids(), ids(reference), ids(f"reference.name={tuned[1]}"), ids(reference, "changes.seeds=[1]"),
             ids(reference, "changes.controls=[noise]")]
    assert len({*map(tuple, found)}) == 5
    assert ids(reference, "threads=1") == found[1]
    depends_on = {  # as before there were references
        "version": 3, "identity": describe_model(ModelSettings(name=str(tuned[0]))).identity, "dtype": "float32",
        "init": "trained", "checkpoint": None, "seed": None, "matrix": "0.q_proj", "estimator": "gavish_donoho",
        "tracy_widom": False, "vectors": False, "covariance": None,
    }  # fmt: skip
    assert found[0] == [digest(json.dumps(depends_on, sort_keys=True))]
    pair = [ids(reference, f"revisions=[{first},{second}]") for first, second in (tuned, tuned[::-1])]
    assert not set(pair[0]) & set(pair[1])  # the second of a pair has the overlaps


def test_bad_settings_are_one_line(base, tmp_path, capsys):
    def refused(*settings):
        capsys.readouterr()
        assert run(base, tmp_path / "out", *settings) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err.removeprefix("harness: ").rstrip()

    wide = save_checkpoint(tmp_path / "wide", intermediate_size=48)
    assert refused(f"reference.name={wide}").startswith("reference.name: 0.gate_proj is 40x24 in")
    assert refused("reference.name=./none").startswith("reference.name: './none' is not a folder")
    assert refused("reference.revision=x").startswith("reference.name: must be set, because reference.revision is")
    assert refused("changes.seeds=[1]").startswith("reference.name: must be set, because changes.controls")
    assert refused(f"reference.name={base}", "changes.seeds=[]").startswith("changes.seeds: [] is wrong")
    assert refused(f"reference.name={base}", "changes.controls=[shuffled]").startswith("changes.controls: 'shuffled'")
    assert refused(f"reference.name={base}", "init=random").startswith("init: 'random' is wrong; new weights")
    assert refused("reference=nobody").startswith("reference: there is no 'nobody'; ")
    assert not (tmp_path / "out").exists()
