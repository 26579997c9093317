"""A frozen run of any kind comes back as it was, whatever its regions; what changed since is refused by name."""

import json
import os
import shutil

import pytest

from harness.engine import worker
from harness.engine.manifest import MANIFEST, freeze, read_manifest
from harness.engine.plan import Plan
from harness.errors import InputError
from harness.measurements import ABLATION, SEARCH, SPECTRA, compose_settings, find
from harness.tables import identity
from tests.checkpoints import ioi_file, save_checkpoint, text_file

RECALL = ["model.recall.dim=16", "model.recall.hidden_dim=32", "model.recall.context_length=32", "model.recall.steps=1",
          "tasks.recall.n_sequences=4"]


def planned(*overrides: str) -> Plan:
    return ABLATION.units.plan(compose_settings("ablation", [*RECALL, *overrides]))


def restored(folder) -> Plan:
    return worker.restore(folder, find)[1]


@pytest.mark.parametrize("overrides", [
    ["region=decile", "region.controls=[none,random]", "region.random_seeds=[0,1]", "target=type"],
    ["region=mp", "region.controls=[none,random,lower_bulk]"],
    ["region=energy", "target=block"],
    ["region=index", "target=all"],
    ["region=fraction", "region.intervals=['0.2:0.5']", "target=matrix", "target.blocks=[1]", "seed=3"],
    ["region=gavish_donoho"],
])
def test_a_frozen_study_comes_back(tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    plan = planned(*overrides, f"output={tmp_path}/study")
    freeze(ABLATION, plan)
    again = restored(tmp_path / "study")
    assert (again.id, again.settings, again.units) == (plan.id, plan.settings, plan.units)
    assert again.digests == plan.digests
    assert {name: task.protocol for name, task in again.tasks.items()} == {
        name: task.protocol for name, task in plan.tasks.items()
    }
    assert again.folder == tmp_path / "study" and again.tasks.keys() == plan.tasks.keys()


@pytest.mark.parametrize("overrides", [
    ["model=pretrained", "model.name={checkpoint}", "init=both", "layer_types=[v_proj,mlp]", "seed=3"],
    ["model=pretrained", "model.name={checkpoint}", "task=text", "tasks.text.data_files={text}",
     "tasks.text.window=16"],
    ["model.recall.steps=4", "model.recall.dim=16", "revisions=[0,4]", "estimator=bulk_fit", "vectors=false"],
])
def test_frozen_spectra_come_back(tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    where = {"checkpoint": save_checkpoint(tmp_path / "model"), "text": text_file(tmp_path / "text.txt")}
    words = [one.format(**where) for one in overrides]
    plan = SPECTRA.units.plan(compose_settings("spectra", [*words, f"output={tmp_path}/spectra"]))
    freeze(SPECTRA, plan)
    again = restored("spectra")
    assert (again.id, again.settings, again.units) == (plan.id, plan.settings, plan.units)
    assert again.folder == tmp_path / "spectra" and (again.task is None) == (plan.task is None)
    assert [one.label for one in again.weights] == [one.label for one in plan.weights]


@pytest.mark.parametrize("overrides", [[], ["search.choice=compare", "search.compose=greedy", "seed=2"]])
def test_a_frozen_search_comes_back(tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    words = ["model=pretrained", f"model.name={save_checkpoint(tmp_path / 'model')}", "target.layer_types=[up_proj]",
             "region=fraction", "task=ioi", f"tasks.ioi.data_files={ioi_file(tmp_path / 'ioi.jsonl')}", "output=search"]
    plan = SEARCH.units.plan(compose_settings("search", [*words, *overrides]))
    freeze(SEARCH, plan)
    again = restored("search")
    assert (again.id, again.units) == (plan.id, plan.units)
    assert again.selection.units == plan.selection.units and again.report.units == plan.report.units
    assert (again.examples and again.examples.id) == (plan.examples and plan.examples.id)
    assert again.folder == tmp_path / "search"
    assert again.selection.folder == tmp_path / "search" / "studies" / "selection"


def test_relative_paths_mean_what_they_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    freeze(ABLATION, planned("output=study"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert restored("../study").folder == tmp_path / "study"
    assert os.getcwd() == str(tmp_path)


def test_another_version_or_an_unknown_setting_is_refused(tmp_path):
    freeze(ABLATION, planned(f"output={tmp_path}"))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for version in (1, 99):
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "manifest_version": version}))
        with pytest.raises(InputError, match=f"version {version}, this harness reads version 3"):
            read_manifest(tmp_path)
    manifest["settings"]["runtime"]["warp"] = 9
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json: settings.runtime.warp: unknown key; known here: batch_tokens"):
        restored(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest)[:-1])
    with pytest.raises(InputError, match="not readable as JSON"):
        read_manifest(tmp_path)


@pytest.mark.assets
def test_changed_data_and_changed_weights_are_refused(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(assets / "models" / "stories260K", tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a girl. " * 30)
    plan = ABLATION.units.plan(compose_settings("ablation", [
        "model=pretrained", "model.name=./model", "task=text", "tasks.text.data_files=text.txt",
        "tasks.text.window=64", "output=study", "target=all", "region=decile",
    ]))
    freeze(ABLATION, plan)
    again = restored("study")
    assert (again.id, again.settings, again.units) == (plan.id, plan.settings, plan.units)
    text.write_text("Once upon a time there was a boy. " * 30)
    with pytest.raises(InputError, match="tasks.text: its digest, n_bytes changed since .*study was frozen"):
        restored("study")
    text.write_text("Once upon a time there was a girl. " * 30)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="model.name: './model'.* no longer"):
        restored("study")


def test_two_tasks_that_ask_the_same_are_refused():
    """They would be one cell under two names."""
    with pytest.raises(InputError, match="tasks.again: it asks exactly what tasks.recall asks"):
        planned("+tasks.again={kind: recall, n_sequences: 4}")


def test_changed_weights_and_data_of_spectra_and_of_a_search_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model")
    data = ioi_file(tmp_path / "ioi.jsonl")
    model = ["model=pretrained", "model.name=./model"]
    for measurement, words in (
        (SPECTRA, ["layer_types=[up_proj]"]),
        (SEARCH, ["target.layer_types=[up_proj]", "region=fraction", "task=ioi", f"tasks.ioi.data_files={data}"]),
    ):
        settings = compose_settings(measurement, [*model, *words, f"output={measurement.name}"])
        freeze(measurement, measurement.units.plan(settings))
        assert restored(measurement.name).id == read_manifest(measurement.name).id
    ioi_file(data, ["bird", "house"])
    with pytest.raises(InputError, match="its data or this harness is no longer what .*search was frozen for"):
        restored("search")
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="model.name: './model', .* is no longer what .*spectra was frozen for"):
        restored("spectra")


def test_the_kind_of_a_manifest_must_be_installed(tmp_path):
    freeze(ABLATION, planned(f"output={tmp_path}"))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "kind": "spectre"}))
    with pytest.raises(InputError, match="'spectre' is no measurement .*did you mean 'spectra'.*ablation, spectra, se"):
        restored(tmp_path)
    assert read_manifest(tmp_path).kind == "spectre"


@pytest.mark.parametrize(("break_it", "message"), [
    ({"parts": []}, "unit [0-9a-f]+ is of no part in parts"), ({"units": 3}, "units is not a list of pairs"),
    ({"units": [["x"]]}, "its units are not pairs"), ({"units": [["x", "recall"]]}, "unit x is of no part in parts"),
    ({"parts": 3}, "parts is not a list of texts"),
])
def test_units_that_are_none_are_refused(tmp_path, break_it, message):
    freeze(ABLATION, planned(f"output={tmp_path}"))
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **break_it}))
    with pytest.raises(InputError, match=f"manifest.json: not a manifest, {message}"):
        read_manifest(tmp_path)


def test_a_manifest_that_changed_is_checked_anew_and_an_equal_one_is_not_parsed_again(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(identity.json, "loads", lambda text, loads=json.loads: parsed.append(text) or loads(text))
    monkeypatch.chdir(tmp_path)
    freeze(ABLATION, planned("region=gavish_donoho", f"output={tmp_path}/study"))
    path = tmp_path / "study" / MANIFEST
    first, text, before = read_manifest(path.parent), path.read_text(), os.stat(path)
    first.settings["model"]["recall"]["dim"] = 17
    del parsed[:]
    again = read_manifest(path.parent)
    assert (again.units, again.settings["model"]["recall"]["dim"]) == (first.units, 16) and text not in parsed
    assert identity.run_of(path.parent) == first.id and text not in parsed
    other = "0" if first.id[0] != "0" else "1"
    path.write_text(text.replace(f'"{first.id}"', f'"{other}{first.id[1:]}"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size and os.stat(path).st_ino == before.st_ino
    assert identity.run_of(path.parent) == other + first.id[1:]
    with pytest.raises(InputError, match="changed since it was frozen"):
        read_manifest(path.parent)
