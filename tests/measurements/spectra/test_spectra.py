"""`harness spectra` from the command line to its tables, on tiny models."""

from __future__ import annotations

import json
import math
import runpy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.measurements.spectra.rows import Inputs, spectrum_of, vectors_of
from harness.measurements.spectra.tables import MATRICES, SINGULAR_VALUES, VECTORS, read_spectra
from harness.measurements.spectra.units import checkpoint_settings
from harness.models.settings import ModelSettings
from harness.spectral.decomposition import decompose
from tests.checkpoints import save_checkpoint, text_file
from tests.models.test_sources import hub_cache
from tests.models.tiny import tiny_model
from tests.processes import run_ranks
from tests.studies import ROOT, assert_same_spectra


def run(*settings):
    return main(["spectra", "--quiet", "model=pretrained", "model.device=cpu", *settings])


def refused(capsys, *settings):
    """The one line that settings are refused with."""
    capsys.readouterr()
    assert main(["spectra", "--quiet", *settings]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("harness: ")
    return err[len("harness: ") :].rstrip()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"))


def test_columns_are_those_of_the_schema():
    weight = gaussian(20, 50)
    decomposition = decompose(weight)
    inputs = Inputs(torch.linalg.qr(gaussian(50, 30, seed=1)).Q, 31)
    row, values = spectrum_of(weight, decomposition)
    summary, vectors = vectors_of(weight, decomposition, inputs)
    key = {column.name for column in SINGULAR_VALUES} & {column.name for column in VECTORS} - {"index"}
    assert set(values) | key == {column.name for column in SINGULAR_VALUES}
    assert set(vectors) | key == {column.name for column in VECTORS}
    assert set(row) | set(summary) <= {column.name for column in MATRICES}
    assert None not in row.values()


def test_noise_lies_within_theory_and_planted_directions_do_not():
    shape = (160, 400)
    noise = gaussian(*shape) * 0.02
    row, values = spectrum_of(noise, decompose(noise))
    assert row["share_outside"] <= 1 / 160 and row["entry_std"] == pytest.approx(float(noise.std()), rel=1e-3)
    assert row["noise"] == pytest.approx(0.02, rel=0.015) and row["ks_mp"] < 5 / 160
    basis = torch.linalg.qr(gaussian(400, 400, seed=2)).Q
    planted = noise + 3.0 * torch.outer(gaussian(160, seed=3) / math.sqrt(160), basis[:, 7])
    decomposition = decompose(planted)
    row, values = spectrum_of(planted, decomposition)
    assert row["n_above"] == 1 and values["position"][:2] == ["above", "inside"]
    summary, vectors = vectors_of(planted, decomposition, Inputs(basis, 1000), 1, 0)
    assert vectors["overlap"][0] > 0.95 and vectors["overlap_direction"][0] == 7
    assert summary["n_overlapping_above"] == 1 and summary["n_overlapping"] <= 1 + 0.05 * 160
    assert summary["porter_thomas_input"] == pytest.approx(0.5, abs=4 * 0.29 / math.sqrt(160))
    assert math.isnan(vectors["overlap"][160]) and vectors["overlap_direction"][160] is None  # output vectors have none


def test_a_matrix_of_noise_estimators_and_margins():
    weight = gaussian(60, 150, seed=4)
    plain, wide = (spectrum_of(weight, decompose(weight), "bulk_fit", margin)[0] for margin in (False, True))
    assert wide["edge_upper"] > plain["edge_upper"] and wide["edge_lower"] < plain["edge_lower"]


def test_trained_and_random_with_covariance(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = text_file(tmp_path / "text.txt")
    settings = (f"model.name={model}", "init=both", "task=text", f"tasks.text.data_files={text}",
                "tasks.text.window=16", "layer_types=[q_proj,k_proj,down_proj]", "blocks=[0,2]", "batch_tokens=64")
    assert run(*settings) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith(f"spectra-{model.name}-")
    matrices = read_spectra(folder, "matrices")
    names = ["0.q_proj", "0.k_proj", "0.down_proj", "2.q_proj", "2.k_proj", "2.down_proj"]
    assert matrices["matrix"].tolist() == names * 2 and set(matrices["status"]) == {"ok"}
    assert matrices["init"].tolist() == ["trained"] * 6 + ["random"] * 6
    assert matrices["weights"].tolist() == ["loaded"] * 6 + ["initialised"] * 6
    assert matrices["seed"].isna().tolist() == [True] * 6 + [False] * 6
    assert (matrices["n_tokens"] > 300).all() and json.loads(matrices["covariance"][0])["window"] == 16
    # float64 LAPACK on the weights themselves
    weight = tiny_model("llama").model.layers[2].mlp.down_proj.weight.double()
    values = read_spectra(folder, "singular_values")
    trained = values[(values["matrix"] == "2.down_proj") & (values["init"] == "trained")]
    assert trained["sigma"].tolist() == pytest.approx(torch.linalg.svdvals(weight).tolist(), rel=1e-10)
    vectors = read_spectra(folder, "vectors")
    assert len(vectors) == 2 * len(values)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    assert run(*settings) == 0  # all is there: nothing is written
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before


def test_what_is_missing_is_made_up_for(model, tmp_path):
    settings = (f"model.name={model}", f"output={tmp_path / 'out'}")
    assert run(*settings) == 0
    whole = read_spectra(tmp_path / "out", "matrices")
    assert set(whole["weights"]) == {"streamed"} and len(whole) == 21
    lost = sorted((tmp_path / "out" / "matrices").iterdir())[3]
    lost.unlink()
    assert run(*settings) == 0
    again = read_spectra(tmp_path / "out", "matrices")
    timings = ["started_at", "seconds_decomposition", "seconds_statistics"]
    assert again.drop(columns=timings).equals(whole.drop(columns=timings))
    assert (again["started_at"] != whole["started_at"]).sum() <= 1


@pytest.mark.slow
def test_two_processes_share_the_matrices(model, tmp_path):
    """Each measures a share of its own, and the first one writes the report."""
    settings = ["spectra", "model=pretrained", f"model.name={model}", "model.device=cpu", "layer_types=[o_proj]",
                "init=both", "threads=1"]
    program = f"""
import os, sys
from harness.cli import main
from harness.measurements.spectra import measure
real = measure._measure_matrix
def measured(plan, found, *rest):
    with open(os.path.join({str(tmp_path)!r}, "rank" + os.environ["RANK"]), "a") as log:
        print(found.unit.id, file=log)
    return real(plan, found, *rest)
measure._measure_matrix = measured
sys.exit(main({[*settings, f"output={tmp_path / 'two'}"]!r}))
"""
    done = run_ranks(program, 2, tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("6 matrices, ") == 1
    assert done.stderr.count(f": 6 units, 0 done, in {tmp_path / 'two'} on 2 processes\n") == 1
    assert (tmp_path / "two" / "report" / "spectra.md").exists()
    shares = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    assert main([*settings, "--quiet", f"output={tmp_path / 'one'}"]) == 0
    assert sorted(shares[0] + shares[1]) == sorted(read_spectra(tmp_path / "one", "matrices")["spectrum_id"])
    assert_same_spectra(tmp_path / "two", tmp_path / "one")


def test_other_settings_do_not_mix_in_one_folder(model, tmp_path, capsys):
    assert run(f"model.name={model}", f"output={tmp_path}", "layer_types=[q_proj]") == 0
    assert run(f"model.name={model}", f"output={tmp_path}", "layer_types=[q_proj]", "estimator=bulk_fit") == 2
    line = capsys.readouterr().err
    assert "holds another spectra" in line and "estimator is 'gavish_donoho' there, 'bulk_fit' here" in line


def test_a_matrix_that_fails_is_a_row_and_the_others_are_done(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(["spectra", "model=pretrained", f"model.name={folder}", "model.device=cpu", "layer_types=[up_proj]",
                 f"output={tmp_path / 'out'}"]) == 1
    matrices = read_spectra(tmp_path / "out", "matrices")
    assert matrices.loc[matrices["status"] == "error", "matrix"].tolist() == ["1.up_proj"]
    assert "NaN or infinite" in matrices.loc[matrices["status"] == "error", "error"].item()
    assert (matrices["status"] == "ok").sum() == 2
    out, err = capsys.readouterr()
    assert "failed: trained 1.up_proj: ValueError" in out and "2 matrices" in out
    assert f"harness: 1 of 3 units failed; harness status {tmp_path / 'out'} --failed shows why" in err.splitlines()
    assert main(["status", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "units 3  done 2  failed 1  missing 0" in shown and "trained | 1.up_proj: ValueError" in shown


def test_report_of_a_folder_of_spectra(model, tmp_path, capsys):
    assert run(f"model.name={model}", "layer_types=[o_proj]", "blocks=[1]", f"output={tmp_path}") == 0
    assert not (tmp_path / "report").exists()
    assert main(["report", str(tmp_path)]) == 0
    assert "1 matrices, 24 singular values" in capsys.readouterr().out
    assert (tmp_path / "report" / "spectra.md").exists()


def test_the_same_run_with_and_without_figures_at_its_end(model, tmp_path, capsys):
    settings = ["spectra", "model=pretrained", f"model.name={model}", "model.device=cpu", "layer_types=[o_proj]",
                "blocks=[1]", "vectors=false", f"output={tmp_path}"]
    assert main([*settings, "report.figures=none"]) == 0
    assert (tmp_path / "report" / "spectra.md").exists() and not list((tmp_path / "report").glob("*.png"))
    assert "report.figures=none" in capsys.readouterr().out
    assert main(settings) == 0
    assert len(list((tmp_path / "report").glob("*.png"))) == 2 and "1 done" in capsys.readouterr().err
    for word, left in (("report.figures=none", 0), ("report.figures=all", 2)):
        assert main(["report", str(tmp_path), word]) == 0
        assert len(list((tmp_path / "report").glob("*.png"))) == left


def test_revisions_are_steps_of_the_embedded_model(tmp_path):
    settings = ["model.recall.steps=4", "model.recall.dim=16", "model.recall.hidden_dim=24", "model.device=cpu",
                f"model.recall.cache_dir={tmp_path / 'cache'}", "model.recall.batch_size=4", "revisions=[0,4]",
                "init=both", f"output={tmp_path / 'out'}", "task=recall", "tasks.recall.n_sequences=4"]
    assert main(["spectra", "--quiet", *settings]) == 0
    matrices = read_spectra(tmp_path / "out", "matrices")
    assert matrices["checkpoint"].fillna("-").tolist() == ["0"] * 10 + ["4"] * 10 + ["-"] * 10
    assert matrices["checkpoint_index"].fillna(-1).tolist() == [0] * 10 + [1] * 10 + [-1] * 10
    untouched, trained, fresh = matrices["sigma_max"].to_numpy().reshape(3, 10)
    assert (untouched == fresh).all() and (trained != fresh).all()


def test_revisions_are_folders_or_of_the_hub(tmp_path, monkeypatch):
    for step in (0, 10):
        save_checkpoint(tmp_path / "run" / f"step-{step}", seed=step)
    assert run(f"model.name={tmp_path / 'run'}", "revisions=[step-10,step-0]", "layer_types=[v_proj]", "blocks=[1]",
               f"output={tmp_path / 'out'}") == 0
    found = read_spectra(tmp_path / "out", "matrices")
    assert found["checkpoint"].tolist() == ["step-10", "step-0"]
    models = [tiny_model("llama", seed=seed).requires_grad_(False) for seed in (10, 0)]
    expected = [float(torch.linalg.matrix_norm(model.model.layers[1].self_attn.v_proj.weight)) for model in models]
    assert found["frobenius_norm"].tolist() == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", {"step0": 0, "step10": 10})
    assert run("model.name=some/model", "revisions=[step10,step0]", "layer_types=[v_proj]", "blocks=[1]",
               f"output={tmp_path / 'hub-out'}") == 0
    assert read_spectra(tmp_path / "hub-out", "matrices")["frobenius_norm"].equals(found["frobenius_norm"])


def test_every_setting_changes_the_ids(model, tmp_path):
    def ids(**settings):
        values = {"layer_types": "[q_proj]", "blocks": "[0]", "init": "random", **settings}
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        assert run(f"model.name={model}", f"output={out}", *(f"{key}={value}" for key, value in values.items())) == 0
        return tuple(read_spectra(out, "matrices")["spectrum_id"])

    changed = [{}, {"seed": 1}, {"init": "trained"}, {"estimator": "bulk_fit"}, {"tracy_widom": "true"},
               {"vectors": "false"}, {"model.dtype": "bfloat16"}]
    assert len({ids(**settings) for settings in changed}) == len(changed)
    assert ids() == ids(threads=1)


def test_without_vectors_there_is_no_table_of_them(model, tmp_path):
    for vectors in (True, False):
        assert run(f"model.name={model}", f"vectors={vectors}", f"output={tmp_path / str(vectors)}") == 0
    with_vectors, without = tmp_path / "True", tmp_path / "False"
    assert read_spectra(without, "vectors").empty
    rows = read_spectra(without, "matrices")
    assert rows["porter_thomas_input"].isna().all() and rows["svd_orthogonality_error"].isna().all()
    assert {"gram", "gesdd"} == set(rows["svd_method"])  # matrices that are square or nearly so, and others
    mine, theirs = (read_spectra(folder, "singular_values")["sigma"] for folder in (without, with_vectors))
    assert np.allclose(mine, theirs, rtol=1e-11, atol=1e-14 * theirs.max())
    columns = ["alpha", "alpha_ks", "alpha_xmin", "alpha_n", "stable_rank", "ks_mp", "noise", "n_above", "n_below"]
    assert np.allclose(rows[columns], read_spectra(with_vectors, "matrices")[columns], rtol=1e-8)


def test_bad_settings_are_one_line(model, tmp_path, capsys):
    here = ("model=pretrained", f"model.name={model}")
    assert refused(capsys, "init=fresh") == "init: 'fresh' is wrong; use one of trained, random, both"
    assert refused(capsys, "inti=both").startswith("inti: unknown key; did you mean 'init'?")
    assert refused(capsys, "estimator=iqr").startswith("estimator: 'iqr' is wrong; use one of")
    assert refused(capsys, "threads=0") == "threads: 0 is wrong; it must be at least 1"
    assert refused(capsys, "batch_tokens=0").startswith("batch_tokens: 0 is wrong")
    assert refused(capsys, "layer_types=[]").startswith("layer_types: [] is wrong")
    assert refused(capsys, *here, "layer_types=[w_q]").startswith("layer_types: 'w_q' is not a layer type")
    assert refused(capsys, *here, "layer_types=[router]") == (
        "layer_types: this model has no router; it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )
    assert refused(capsys, *here, "blocks=[3]") == "blocks: 3 is not a block of this model; blocks are 0 to 2"
    assert refused(capsys, *here, "revisions=[step1]").startswith("revisions: no folder 'step1', neither below")
    assert refused(capsys, "revisions=[step1]").startswith("revisions: 'step1' is not a checkpoint of the embedded")
    assert refused(capsys, "revisions=[0,0]").startswith("revisions: ['0', '0'] is wrong")
    assert refused(capsys, *here, "model.revision=main", "revisions=[main]").startswith("model.revision: 'main' is")
    assert refused(capsys, "task=ioi").startswith("tasks.ioi.kind: 'ioi' is wrong")
    assert refused(capsys, "task=[recall,wikitext]").startswith("task: ['recall', 'wikitext'] is wrong")
    assert refused(capsys, "task=recall", "vectors=false").startswith("vectors: False is wrong")
    assert refused(capsys, *here, "task=recall").startswith("tasks.recall: kind recall needs the embedded model")
    (tmp_path / "file").write_text("")
    assert refused(capsys, *here, f"output={tmp_path / 'file'}").endswith("can be made")


def test_no_covariance_of_an_encoder_decoder(tmp_path, capsys):
    folder, text = save_checkpoint(tmp_path / "t5", "t5"), text_file(tmp_path / "text.txt")
    settings = ("model=pretrained", f"model.name={folder}", "model.device=cpu")
    assert refused(capsys, *settings, "task=text", f"tasks.text.data_files={text}").startswith("tasks.text: the cov")
    assert main(["spectra", "--quiet", *settings, "layer_types=[cross_q_proj]", f"output={tmp_path / 'out'}"]) == 0
    assert read_spectra(tmp_path / "out", "matrices")["matrix"].tolist() == [
        "decoder.0.cross_q_proj", "decoder.1.cross_q_proj", "decoder.2.cross_q_proj"
    ]


def test_experts_have_spectra_and_no_overlap(tmp_path):
    folder, text = save_checkpoint(tmp_path / "moe", "mixtral"), text_file(tmp_path / "text.txt")
    assert run(f"model.name={folder}", "layer_types=[o_proj,down_proj]", "blocks=[0]", "task=text",
               f"tasks.text.data_files={text}", "tasks.text.window=16", f"output={tmp_path / 'out'}") == 0
    matrices = read_spectra(tmp_path / "out", "matrices").set_index("matrix")
    assert matrices["n_overlapping"].isna().tolist() == [False, True, True, True]
    assert matrices.loc["0.down_proj.e2", "expert"] == 2 and matrices["covariance"].isna().sum() == 0


def test_settings_of_one_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "step1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert checkpoint_settings(ModelSettings(name=str(tmp_path)), "step1").name == str(tmp_path / "step1")
    assert checkpoint_settings(ModelSettings(name="org/model"), "step1").revision == "step1"
    assert checkpoint_settings(ModelSettings(name="org/model"), str(tmp_path)).name == str(tmp_path)
    assert checkpoint_settings(ModelSettings(name="org/model"), "./step1").name == "step1"
    assert checkpoint_settings(ModelSettings(name="recall"), "100").recall.checkpoint == 100


def test_the_table_of_seconds_can_be_made():
    script = runpy.run_path(str(ROOT / "experiments/spectra/seconds.py"))
    row = script["measure"]("40x64")
    assert row["shape"] == "40x64" and all(row[name] >= 0 for name in ("decomposition", "values", "vectors"))


@pytest.mark.assets
def test_a_trained_model_leaves_theory_and_its_random_control_does_not(assets, tmp_path):
    assert run(f"model.name={assets / 'models/stories15M'}", "init=both", "blocks=[0,4]", "vectors=false",
               f"output={tmp_path}") == 0
    outside = read_spectra(tmp_path, "matrices").groupby("init")["share_outside"].mean()
    assert outside["random"] < 0.005 and outside["trained"] > 0.05
