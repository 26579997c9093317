"""Spectra and searches go the way of studies: planned, frozen, worked on in shards, looked at, merged, reported."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.engine.manifest import MANIFEST
from harness.measurements import ABLATION
from harness.measurements.search.tables import TABLES
from harness.measurements.spectra.tables import read_spectra
from harness.tables.store import list_table, read_table
from tests.checkpoints import ioi_file, save_checkpoint, text_file
from tests.processes import run_ranks
from tests.studies import assert_same_spectra, assert_same_tables

N_SPECTRA = 2 * 3 * 2  # trained and random weights, blocks, layer types
STAGES = ["predictions", "selection", "report", "verdict", "comparison", "composition"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    return ["model=pretrained", f"model.name={save_checkpoint(folder)}", "model.device=cpu"]


@pytest.fixture(scope="module")
def spectra(model) -> list[str]:
    return [*model, "init=both", "layer_types=[o_proj,up_proj]", "threads=1"]


@pytest.fixture(scope="module")
def search(model, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [
        *model, "target.layer_types=[up_proj]", "region=fraction", "region.kinds=[small]", "region.values=[0.3,0.9]",
        "task=[ioi,text]", f"tasks.ioi.data_files={ioi_file(folder / 'ioi.jsonl')}", "tasks.ioi.selection_share=0.5",
        f"tasks.text.data_files={text_file(folder / 'text.txt')}", "tasks.text.window=32", "search.control_seeds=[0,1]",
        "search.choice=compare", "search.compose=greedy", "runtime.threads=1",
    ]


@pytest.fixture(scope="module")
def measured(spectra, search, tmp_path_factory) -> dict[str, Path]:
    """kind -> the folder of a run in one process, by its own command."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, words in (("spectra", spectra), ("search", search)):
        assert main([kind, "--quiet", *words, f"output={folder / kind}"]) == 0
    return {kind: folder / kind for kind in ("spectra", "search")}


def said(capsys, *command: str, status: int = 0) -> str:
    """What a command printed to the standard output."""
    capsys.readouterr()
    assert main([*command]) == status
    return capsys.readouterr().out


def assert_same_search(one: Path, other: Path) -> None:
    for part in ("selection", "report"):
        assert_same_tables(one / "studies" / part, other / "studies" / part)
    for name in TABLES.names():
        tables = [read_table(folder, TABLES, name) for folder in (one, other)]
        if name == "stages":
            assert all(set(table.status) == {"ok"} for table in tables)
            tables = [table.drop(columns=["seconds", "started_at", "hostname"]) for table in tables]
        assert len(tables[0])
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_plan_of_spectra(spectra, tmp_path, capsys):
    out = said(capsys, "plan", "spectra", *spectra, f"output={tmp_path / 'out'}")
    lines = out.splitlines()
    assert lines[0].startswith("spectra ") and lines[0].endswith(f"  folder {tmp_path / 'out'}")
    assert [line.split(":")[0] for line in lines[1:-1]] == ["weights trained", "weights random"]
    assert lines[-1].endswith(f" for {N_SPECTRA} decompositions") and not (tmp_path / "out").exists()


def test_the_plan_of_a_search(search, tmp_path, capsys):
    lines = said(capsys, "plan", "search", *search, f"output={tmp_path / 'out'}").splitlines()
    assert lines[0].startswith("search ") and lines[0].endswith(f"  folder {tmp_path / 'out'}")
    assert lines[1] == f"stages 6: {', '.join(STAGES)}"
    assert "  cells 8: ioi 8" in lines  # 3 blocks x 2 regions, baseline, control
    assert lines[-1].startswith("report: at most 3 best cells of each of 1 tasks, at most 8 draws of controls for each")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["spectra", "search"])
def test_settings_of_any_kind_can_be_shown(kind, spectra, search, capsys):
    words = {"spectra": spectra, "search": search}[kind]
    shown = said(capsys, "plan", kind, *words, "--show-config")
    assert ("search:" in shown) == (kind == "search") and ("init: both" in shown) == (kind == "spectra")


def test_frozen_spectra_are_worked_on_in_shards(spectra, measured, tmp_path, capsys):
    folder = tmp_path / "spectra"
    said(capsys, "plan", "--freeze", "spectra", *spectra, f"output={folder}")
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
    missing = said(capsys, "status", str(folder)).splitlines()
    assert missing[1] == f"units {N_SPECTRA}  done 0  failed 0  missing {N_SPECTRA}"
    assert missing[-1] == "give the same command again: it does only what is not done"
    assert missing[2:4] == ["  trained: done 0  failed 0  missing 6", "  random: done 0  failed 0  missing 6"]
    assert main(["work", str(folder), "--quiet", "--shard", "1", "--of", "2"]) == 0
    assert said(capsys, "status", str(folder)).splitlines()[1] == f"units {N_SPECTRA}  done 6  failed 0  missing 6"
    assert "no matrix" not in said(capsys, "report", str(folder))
    assert main(["work", str(folder), "--quiet"]) == 0
    assert_same_spectra(folder, measured["spectra"])
    merged = said(capsys, "compact", str(folder))
    assert merged == ", ".join(f"{name}: {N_SPECTRA} files merged"
                               for name in ("matrices", "singular_values", "vectors")) + "\n"
    assert not list_table(folder, "matrices").done
    assert_same_spectra(folder, measured["spectra"])
    assert f"done {N_SPECTRA}  failed 0  missing 0" in said(capsys, "status", str(folder))
    assert f"{N_SPECTRA} matrices" in said(capsys, "report", str(folder))
    assert (folder / "report" / "spectra.md").is_file() and (folder / "report" / "matrices.csv").is_file()


def test_a_frozen_search_is_worked_on(search, measured, tmp_path, capsys):
    folder = tmp_path / "search"
    said(capsys, "plan", "--freeze", "search", *search, f"output={folder}")
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
    lines = said(capsys, "status", str(folder)).splitlines()
    assert lines[1] == "units 6  done 0  failed 0  missing 6"
    assert [line.split(":")[0].strip() for line in lines[2:8]] == STAGES
    assert said(capsys, "report", str(folder)) == f"{folder}: no stage has been measured yet\n"
    # a stage needs those before it: one shard has them all, the others nothing
    assert main(["work", str(folder), "--quiet", "--shard", "1", "--of", "2"]) == 0
    assert "done 0  failed 0  missing 6" in said(capsys, "status", str(folder))
    assert main(["work", str(folder), "--quiet", "--shard", "0", "--of", "2"]) == 0
    assert_same_search(folder, measured["search"])
    assert said(capsys, "status", str(folder)).count("failed 0  missing 0") > 3
    merged = said(capsys, "compact", str(folder)).splitlines()
    assert merged[0] == "stages: 6 files merged" and len(merged) == 3
    assert all(line.startswith("metrics: ") for line in merged[1:])
    assert said(capsys, "compact", str(folder)).splitlines() == ["no files to merge"] * 3
    for path, tables in ((folder, TABLES), (folder / "studies" / "selection", ABLATION.tables)):
        assert not list_table(path, tables.primary.name).done
    assert_same_search(folder, measured["search"])
    assert "| ioi | accuracy |" in said(capsys, "report", str(folder))
    assert (folder / "report" / "search.md").is_file() and (folder / "report" / "verdict.csv").is_file()
    # the studies inside are runs of their own, whoever started them
    assert "Study " in (report_of(folder / "studies" / "selection", capsys)).read_text()


def report_of(folder: Path, capsys) -> Path:
    said(capsys, "report", str(folder))
    (page,) = (folder / "report").glob("*.md")
    return page


@pytest.mark.slow
def test_two_processes_search_together(search, measured, tmp_path):
    """Every process goes through every stage, and the cells of the studies inside are shared out."""
    folder = tmp_path / "search"
    words = ["search", "--quiet", *search, f"output={folder}"]
    done = run_ranks(f"from harness.cli import main; raise SystemExit(main({words!r}))", 2, tmp_path / "log")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_search(folder, measured["search"])
    ranks = read_table(folder / "studies" / "selection", ABLATION.tables, "metrics")["rank"]
    assert set(ranks) == {0, 1}


def refused(capsys, *command: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main([*command]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("harness: ")
    return err


@pytest.mark.parametrize("command", ["status", "report", "work", "compact"])
def test_a_manifest_of_a_kind_that_is_not_installed_is_one_line(command, measured, tmp_path, capsys):
    manifest = json.loads((measured["spectra"] / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "kind": "elsewhere"}))
    line = refused(capsys, command, str(tmp_path))
    assert "'elsewhere' is no measurement that is installed here" in line and "ablation, spectra, search" in line
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_run_of_another_kind_is_refused(spectra, search, measured, capsys):
    study = [word for word in search if not word.startswith("search.")]
    commands = {"run": study, "spectra": spectra, "search": search}
    for there, folder in measured.items():
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        for command, words in commands.items():
            if command == there:
                continue
            # where the batch is still to be found, too
            for more in ([], ["runtime.batch_tokens=null"]) if command == "run" else ([],):
                line = refused(capsys, command, "--quiet", *words, *more, f"output={folder}")
                assert f"output: {folder} holds a run of another kind ({there}); name another folder" in line
        assert main(["plan", "--freeze", *study, f"output={folder}"]) == 2
        assert f"holds a run of another kind ({there})" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_only_the_words_plan_and_submit_take_a_measurement(spectra, capsys):
    line = refused(capsys, "plan", "spectrum", *spectra)
    kinds = "ablation, spectra, search, tuning, coupling, components"
    assert f"'spectrum': neither a setting (key=value) nor one of {kinds}" in line
    assert "plan: 'spectra'" not in said(capsys, "plan", "run", "target=all", "region=fraction")
    assert "init: unknown key" in refused(capsys, "plan", "init=both")
    assert "search.keep: harness plan does not read it; harness search does" in refused(
        capsys, "plan", "search.keep=0.5"
    )


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_failed_units_make_the_exit_status_1_and_one_line(model, tmp_path, capsys, quiet):
    """Of every command that measures; a rerun with the cause gone ends with 0."""
    folder = save_checkpoint(tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    broken = {name: tensor.clone() for name, tensor in whole.items()}
    broken["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(broken, folder / "model.safetensors", {"format": "pt"})
    words = ["model=pretrained", f"model.name={folder}", "model.device=cpu", "layer_types=[up_proj]"]
    for command in (["spectra", *quiet, *words, f"output={tmp_path / 'out'}"], ["work", *quiet, str(tmp_path / "out")]):
        capsys.readouterr()
        assert main(command) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness: ")]
        assert lines == [
            f"harness: 1 of 3 units failed; harness status {tmp_path / 'out'} --failed shows why"
        ]
    assert read_spectra(tmp_path / "out", "matrices")["status"].tolist() == ["ok", "error", "ok"]
    assert "Traceback" in said(capsys, "status", "--failed", str(tmp_path / "out"))
