"""Another package adds a region rule, a kind of task, a family and a measurement; no file of the harness changes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import harness as sh
from harness.cli import main
from harness.errors import InputError
from harness.measurements import MEASUREMENTS
from harness.models.families import FAMILIES
from harness.spectral.regions import RULES
from harness.tasks import fingerprint
from harness.tasks.registry import TASKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
BEFORE = "71f8d53"  # the last commit before the harness was divided into rooms
PLUGIN = ROOT / "tests" / "plugin"
MODEL = ["model.recall.dim=16", "model.recall.hidden_dim=32", "model.recall.context_length=32", "model.recall.steps=2"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the plug-in as pip installs it."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("target")
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True)
    return target


@pytest.fixture
def run(installed, monkeypatch, tmp_path_factory, capsys):
    """The command line in this process, with the plug-in on the path; the registries forget it afterwards."""
    registries = (TASKS, RULES, FAMILIES, MEASUREMENTS)
    monkeypatch.syspath_prepend(str(installed))
    folder = tmp_path_factory.getbasetemp() / "plugged"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    for registry in registries:
        registry.__dict__.pop("_added", None)

    def harness(*words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(list(words)) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    harness.folder = folder
    yield harness
    fingerprint._distributions.cache_clear()  # else later tests in this process find the plug-in among them
    for registry in registries:
        registry.__dict__.pop("_added", None)
        for name in ("every_nth", "repetition", "starcoder2", "norms"):
            registry._loaded.pop(name, None)


def test_a_rule_and_a_task_of_another_package_in_one_study(run):
    settings = [*MODEL, "task=[]", "+tasks.copy={kind: repetition, n_sequences: 4, length: 6}", "region=index",
                "region.by=every_nth", "region.intervals=null", "region.step=4", "target=all", "output=study"]
    run("run", "--quiet", *settings)
    metrics = pd.read_parquet(run.folder / "study" / "metrics")
    assert set(metrics.status) == {"ok"} and set(metrics.task) == {"copy"}
    assert set(metrics.metric) == {"accuracy", "nll"}
    labels = {"none", *(f"every 4th from {first}" for first in range(4))}
    assert set(metrics.region) == labels and set(metrics.region_by.dropna()) == {"every_nth", "control"}
    # a quarter of the values each, and together all of them
    removed = metrics[(metrics.region_by == "every_nth") & (metrics.metric == "nll")]
    assert removed.n_removed.sum() == removed.n_values.iloc[0]
    # restored from the manifest alone
    shutil.rmtree(run.folder / "study" / "metrics")
    run("work", "--quiet", "study")
    again = pd.read_parquet(run.folder / "study" / "metrics")
    key = ["cell_id", "metric"]
    for one, other in zip(*(frame.sort_values(key)[[*key, "value"]].values.tolist() for frame in (metrics, again))):
        assert one == other


def test_settings_of_another_package_are_checked_like_ours(run):
    base = ["plan", *MODEL, "region=index", "region.intervals=null", "region.by=every_nth"]
    assert "region.stepp: unknown key; did you mean 'step'?" in run(*base, "region.stepp=3", status=2)
    assert "region.step: 1 is wrong; it must be at least 2" in run(*base, "region.step=1", status=2)
    assert "region.firsts: 7 is wrong; it must be within 0..1" in run(*base, "region.firsts=[7]", status=2)
    said = run("plan", *MODEL, "region=decile", "region.step=3", status=2)
    assert "only region.by=reweight or every_nth reads it" in said
    task = ["plan", *MODEL, "task=[]", "+tasks.copy.kind=repetition"]
    assert "tasks.copy.lenght: unknown key; did you mean 'length'?" in run(*task, "+tasks.copy.lenght=3", status=2)
    assert "tasks.copy.length: two halves of 20" in run(*task, "+tasks.copy.length=20", status=2)
    assert "repetition" in run("plan", *MODEL, "task=[]", "+tasks.copy.kind=repetitio", status=2)


def test_a_measurement_of_another_package_has_the_whole_engine(run):
    settings = [*MODEL, "output=norms"]
    assert "matrices 10" in run("plan", "norms", *settings)
    assert "0.k_proj" in run("norms", *settings)
    assert (run.folder / "norms" / "report" / "norms.md").is_file()
    status = run("status", "norms")
    assert "norms" in status and "done 10" in status and "up_proj: done 2" in status
    assert "norms: 10 files merged" in run("compact", "norms")
    assert "0.k_proj" in run("report", "norms")
    table = pd.read_parquet(run.folder / "norms" / "norms")
    manifest = json.loads((run.folder / "norms" / "manifest.json").read_text())
    assert manifest["kind"] == "norms" and set(table.unit_id) == {unit for unit, _ in manifest["units"]}
    assert (table.frobenius >= table.largest_row).all() and table.harness_version.notna().all()
    run("plan", "norms", "--freeze", *MODEL, "layer_types=[mlp]", "output=frozen")
    run("work", "--quiet", "frozen")
    half = pd.read_parquet(run.folder / "frozen" / "norms")
    both = table.merge(half, on="unit_id", suffixes=("", "_frozen"))
    assert len(both) == 4 and (both.frobenius == both.frobenius_frozen).all()
    assert "layer_type: unknown key; did you mean 'layer_types'?" in run("norms", "layer_type=[mlp]", status=2)
    assert "holds a run of another kind (norms)" in run("run", *MODEL, "output=norms", status=2)


def test_without_the_package_its_folder_is_refused_in_one_line(run):
    done = subprocess.run([sys.executable, "-m", "harness", "status", "norms"], cwd=run.folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "'norms' is no measurement that is installed here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_family_of_another_package(run):
    config = AutoConfig.for_model("starcoder2", vocab_size=67, hidden_size=24, intermediate_size=40,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = sh.wrap(AutoModelForCausalLM.from_config(config))
    assert len(model.matrices) == 12 and model["1.down_proj"].shape == (24, 40)
    with model.ablated("mlp", sh.regions.small(0.5)) as removed:
        assert (removed.n_removed, removed.n_values) == (48, 96)


def test_two_packages_cannot_have_one_name(run, monkeypatch):
    added = TASKS._added["repetition"]
    ours = type(added)("text", added.value, added.group)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [added, ours])
    TASKS.__dict__.pop("_added")
    with pytest.raises(InputError, match="its entry point 'text' in harness.tasks is the name of a kind of task"):
        TASKS.names()


def run_git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def test_each_addition_is_as_small_as_the_documentation_says():
    """docs/architecture.md: a rule, a kind of task and a family are one file each, a measurement is one folder."""
    package = PLUGIN / "spectral_extras"
    files = {path.name for path in package.glob("*.py")}
    assert files == {"__init__.py", "every_nth.py", "repetition.py", "starcoder2.py"}
    lines = sum(len(path.read_text().splitlines()) for path in (package / "norms").rglob("*.py"))
    assert lines <= 250
    assert f"has {lines} lines" in PAGE


@pytest.mark.parametrize(("registry", "folder"), [(RULES, "spectral.regions"), (TASKS, "tasks")])
def test_an_addition_to_the_harness_is_one_file_and_one_line(registry, folder):
    """docs/architecture.md: no two rules and no two kinds of tasks share a file, and one line names each."""
    places = [place.split(":")[0] for place in registry._builtin.values()]
    assert len(set(places)) == len(places) and all(place.startswith(f"harness.{folder}.") for place in places)
    measurements = [path for path in (ROOT / "harness" / "measurements").glob("*/units.py")]
    assert len(measurements) == len(MEASUREMENTS._builtin)


def test_an_addition_touched_before_what_the_documentation_says():
    """docs/architecture.md names files of commit 71f8d53. Each exists there and names the rule or the task."""
    if run_git("cat-file", "-e", f"{BEFORE}^{{commit}}").returncode:
        pytest.skip(f"the history of this checkout does not reach back to {BEFORE}")
    row = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in PAGE.splitlines() if " | " in line}
    for addition, word in (("a region rule", "gavish_donoho"), ("a kind of task", "LambadaTask|lambada")):
        for name in re.findall(r"`([\w/]+\.py)`", row[addition]):
            found = run_git("grep", "-cwE", word, BEFORE, "--", f"harness/{name}").stdout
            assert found, name
    spectra = ("execution/spectra", "execution/spectrum_rows", "spectra_config", "tables/spectra_plots",
               "tables/spectra_report", "tables/spectra_schema", "tables/spectra_store")
    lines = sum(len(run_git("show", f"{BEFORE}:harness/{name}.py").stdout.splitlines()) for name in spectra)
    assert f"seven files with {lines} lines" in row["a measurement"]
