"""A run becomes a run of a tracker: real ones with local folders where they are installed, and recorded calls."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType
from unittest.mock import MagicMock

import pandas as pd
import pytest

from harness import optional
from harness.cli import main
from harness.engine.trackers import TRACKERS, TrackerSettings, record, track
from harness.errors import InputError
from harness.measurements import compose_settings, find

ABLATION = find("ablation")


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Those of a study of a few seconds."""
    return ["model.recall.dim=16", "model.recall.steps=2", "model.recall.batch_size=4", "tasks.recall.n_sequences=8",
            f"model.recall.cache_dir={tmp_path_factory.mktemp('recall')}", "region=index", "target=all"]  # fmt: skip


@pytest.fixture(scope="module")
def study(settings, tmp_path_factory):
    """The folder of a study that was run with a tracker."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("results") / "study"
    assert main(["run", *settings, "tracker=tensorboard", f"output={folder}"]) == 0
    return folder


def baseline(study) -> dict[str, float]:
    rows = pd.read_parquet(study / "metrics")
    rows = rows[rows.target == "baseline"]
    return {f"baseline/{row.task}/{row.metric}": row.value for row in rows.itertuples()}


def test_a_record_has_what_was_measured(study):
    found = record(ABLATION, study)
    manifest = json.loads((study / "manifest.json").read_text())
    assert (found.id, found.kind) == (manifest["id"], "ablation")
    assert found.values == {**baseline(study), "units": len(manifest["units"]), "failed": 0}
    units = list(dict.fromkeys(found.rows.cell_id))
    assert units == [unit for unit, _ in manifest["units"]]  # in the order of the study
    assert found.settings["model.recall.dim"] == 16 and found.settings["seed"] == 0
    assert not [key for key in found.settings if key.startswith(("tracker", "cluster", "output"))]
    assert len(found.figures) == len(list((study / "report").rglob("*.png"))) > 0


def test_tensorboard_reads_what_was_written(study):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track(ABLATION, study, TrackerSettings("tensorboard"))  # again, as after an interruption
    events = EventAccumulator(str(study / "tensorboard")).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {**baseline(study), "units": 5.0, "failed": 0.0}
    assert scalars == {key: [pytest.approx(value)] for key, value in expected.items()}  # float32, and only once
    assert events.Tags()["images"] == [path.stem for path in record(ABLATION, study).figures]
    assert {"rows/text_summary", "settings/text_summary"} <= set(events.Tags()["tensors"])


def test_mlflow_has_one_run_for_a_study(study, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    server = (tmp_path / "runs").as_uri()
    for _ in range(2):
        track(ABLATION, study, TrackerSettings("mlflow", project="ours", server=server))
    (run,) = mlflow.search_runs(experiment_names=["ours"], output_format="list")
    assert run.data.metrics == {**baseline(study), "units": 5.0, "failed": 0.0}
    assert run.data.params["model.recall.dim"] == "16"
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/rows.csv")
    assert pd.read_csv(io.StringIO(text)).value.tolist() == pytest.approx(record(ABLATION, study).rows.value.tolist())


def recorded(monkeypatch, name: str) -> MagicMock:
    """A package whose calls are recorded."""
    fake = MagicMock(spec=ModuleType(name), name=name)
    for call in ("init", "log", "finish", "Table", "Image", "Settings", "set_tracking_uri", "set_experiment",
                 "search_runs", "start_run", "log_params", "log_metrics", "log_text", "log_artifact",
                 "get_tracking_uri"):  # fmt: skip
        setattr(fake, call, MagicMock(name=f"{name}.{call}"))
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_gets_one_run_with_rows_and_figures(study, monkeypatch, offline):
    wandb = recorded(monkeypatch, "wandb")
    run = wandb.init.return_value.__enter__.return_value
    run.url = "https://example.org/run"
    assert track(ABLATION, study, TrackerSettings("wandb", "ours", offline=offline)) == "https://example.org/run"
    (call,) = wandb.init.call_args_list
    found = record(ABLATION, study)
    assert (call.kwargs["project"], call.kwargs["id"], call.kwargs["name"]) == ("ours", found.id, "study")
    assert (call.kwargs["mode"], call.kwargs["resume"]) == (("offline", None) if offline else (None, "allow"))
    assert call.kwargs["config"] == found.settings
    pd.testing.assert_frame_equal(wandb.Table.call_args.kwargs["dataframe"], found.rows)
    logged = run.log.call_args.args[0]
    assert set(logged) == {"rows", *(f"figures/{path.stem}" for path in found.figures)}
    run.summary.update.assert_called_once_with(found.values)


def test_trackio_gets_one_run_with_rows_and_figures(study, monkeypatch):
    trackio = recorded(monkeypatch, "trackio")
    said = track(ABLATION, study, TrackerSettings("trackio", "ours", server="me/space"))
    assert said == "trackio show --project ours"
    found = record(ABLATION, study)
    kwargs = trackio.init.call_args.kwargs
    assert (kwargs["project"], kwargs["space_id"], kwargs["resume"]) == ("ours", "me/space", "allow")
    assert kwargs["config"]["id"] == found.id
    logged = trackio.log.call_args.args[0]
    assert {key: logged[key] for key in found.values} == found.values
    pd.testing.assert_frame_equal(trackio.Table.call_args.kwargs["dataframe"], found.rows)
    trackio.finish.assert_called_once_with()


def test_mlflow_is_asked_for_the_run_of_the_same_study(study, monkeypatch):
    mlflow = recorded(monkeypatch, "mlflow")
    mlflow.search_runs.return_value = []
    track(ABLATION, study, TrackerSettings("mlflow", server="http://example.org"))
    mlflow.set_tracking_uri.assert_called_once_with("http://example.org")
    assert record(ABLATION, study).id in mlflow.search_runs.call_args.args[1]
    assert mlflow.start_run.call_args.kwargs["run_id"] is None
    mlflow.log_metrics.assert_called_once_with(record(ABLATION, study).values)


def test_a_tracker_is_no_part_of_an_id(study, settings):
    plans = [ABLATION.units.plan(compose_settings("ablation", [*settings, f"tracker={name}"]))
             for name in ("none", "tensorboard")]  # fmt: skip
    assert plans[0].id == plans[1].id == json.loads((study / "manifest.json").read_text())["id"]
    assert [unit.id for unit in plans[0].units] == [unit.id for unit in plans[1].units]


def test_without_a_tracker_nothing_is_called(study, monkeypatch):
    monkeypatch.setattr("harness.engine.trackers.TRACKERS", {})
    assert track(ABLATION, study, TrackerSettings()) is None


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_one_line_before_the_run(name, settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(optional, "find_spec", lambda package: None)
    assert main(["run", *settings, f"tracker={name}", f"output={tmp_path / 'study'}"]) == 2
    line = capsys.readouterr().err
    assert f"tracker={name} needs the package {name}" in line and "[track]" in line
    assert not (tmp_path / "study").exists()


def test_a_tracker_that_fails_costs_no_row(study, settings, monkeypatch, capsys):
    def fail(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(TRACKERS, "tensorboard", fail)
    assert main(["run", *settings, "tracker=tensorboard", f"output={study}"]) == 1
    assert "tracker=tensorboard: no route to host; the run is whole in" in capsys.readouterr().err
    assert main(["run", "--quiet", *settings, f"output={study}"]) == 0


@pytest.mark.parametrize("values, right", [
    ({"name": "tensorboard", "server": "x"}, "only tracker=wandb, trackio and mlflow read it"),
    ({"name": "mlflow", "offline": True}, "only tracker=wandb reads it"),
])  # fmt: skip
def test_a_setting_that_no_tracker_reads_is_refused(values, right):
    with pytest.raises(InputError, match=right):
        TrackerSettings(**values)
