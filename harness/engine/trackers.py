"""Trackers: a run that is measured becomes one run of Weights & Biases, Trackio, MLflow or TensorBoard.

A tracker reads what is in the folder of a run, after its report. It changes no number and no id, and the same command
again updates the same run of the tracker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.engine.manifest import read_in_order, read_manifest, settings_of
from harness.errors import wrong
from harness.optional import require

if TYPE_CHECKING:
    import pandas

    from harness.engine.measurement import Measurement

NOT_OF_THE_RUN = ("tracker", "cluster", "report", "output")  # settings that say nothing of what was measured


@dataclass
class TrackerSettings:
    """The tracker that gets the rows and figures of a run when it is done; nothing here changes a number."""

    name: Literal["none", "wandb", "trackio", "mlflow", "tensorboard"] = "none"
    project: str = "spectral-ablation"  # of wandb and trackio; the experiment of mlflow
    server: str | None = None  # address of wandb or mlflow, or a folder of mlflow; the space of trackio; null: its own
    offline: bool = False  # wandb writes to a folder for `wandb sync`, and sends nothing

    def __post_init__(self) -> None:
        if self.offline and self.name != "wandb":
            raise wrong("offline", True, "only tracker=wandb reads it")
        if self.server is not None and self.name in ("none", "tensorboard"):
            raise wrong("server", self.server, "only tracker=wandb, trackio and mlflow read it")

    def require_package(self) -> None:
        """Raise InputError if the package of the tracker is not installed."""
        if self.name != "none":
            require(self.name, "track", f"tracker={self.name}")


@dataclass(frozen=True)
class Record:
    """What a tracker gets of a run.

    settings: name -> value, with dots in the names of nested settings. rows: the first table, in the order of the run,
    without columns that are empty. values: the numbers of the unedited model, and the counts of units. figures: the
    pictures of the report.
    """

    folder: Path
    id: str
    kind: str
    settings: Mapping[str, Any]
    rows: pandas.DataFrame
    values: Mapping[str, float]
    figures: tuple[Path, ...]


def record(measurement: Measurement, folder: Path) -> Record:
    """Read a run for a tracker. Raises InputError if its folder holds none."""
    manifest = read_manifest(folder)
    name = measurement.tables.names()[0]
    rows = read_in_order(folder, measurement.tables, name)
    values = {"units": float(len(manifest.units)), "failed": float((rows["status"] == "error").sum())}
    if {"target", "task", "metric", "value"} <= set(rows.columns):
        of_baseline = rows[(rows["target"] == "baseline") & rows["value"].notna()]
        names = "baseline/" + of_baseline["task"] + "/" + of_baseline["metric"]
        values |= dict(zip(names.tolist(), of_baseline["value"].tolist()))
    settings = {key: value for key, value in settings_of(folder).items() if key.split(".")[0] not in NOT_OF_THE_RUN}
    pictures = tuple(sorted((folder / "report").rglob("*.png")))
    rows = rows.dropna(axis="columns", how="all")
    return Record(folder, manifest.id, manifest.kind, settings, rows, values, pictures)


def track(measurement: Measurement, folder: Path, settings: TrackerSettings) -> str | None:
    """Give a run to the tracker of the settings, and return where it is to be seen there; None without a tracker.

    Raises whatever the package of the tracker raises.
    """
    if settings.name == "none":
        return None
    return TRACKERS[settings.name](record(measurement, folder), settings)


def _wandb(of: Record, settings: TrackerSettings) -> str:
    import wandb

    options = {"base_url": settings.server} if settings.server else {}
    with wandb.init(
        project=settings.project, name=of.folder.name, id=of.id, resume=None if settings.offline else "allow",
        job_type=of.kind, config=dict(of.settings), dir=str(of.folder), mode="offline" if settings.offline else None,
        settings=wandb.Settings(**options),
    ) as run:
        run.log({"rows": wandb.Table(dataframe=of.rows),
                 **{f"figures/{path.stem}": wandb.Image(str(path)) for path in of.figures}})
        run.summary.update(dict(of.values))
        return str(run.url or run.dir)


def _trackio(of: Record, settings: TrackerSettings) -> str:
    import trackio

    trackio.init(project=settings.project, name=of.folder.name, space_id=settings.server, resume="allow",
                 config={**of.settings, "id": of.id, "kind": of.kind})
    trackio.log({"rows": trackio.Table(dataframe=of.rows), **of.values,
                 **{f"figures/{path.stem}": trackio.Image(str(path)) for path in of.figures}})
    trackio.finish()
    return f"trackio show --project {settings.project}"


def _mlflow(of: Record, settings: TrackerSettings) -> str:
    import mlflow

    if settings.server:
        mlflow.set_tracking_uri(settings.server)
    experiment = mlflow.set_experiment(settings.project)
    there = mlflow.search_runs([experiment.experiment_id], f"tags.harness_id = '{of.id}'", output_format="list")
    run_id = there[0].info.run_id if there else None
    with mlflow.start_run(run_id=run_id, run_name=of.folder.name, tags={"harness_id": of.id, "kind": of.kind}) as run:
        if not there:  # MLflow refuses another value for a parameter that it has
            mlflow.log_params({key: str(value)[:500] for key, value in of.settings.items()})
        mlflow.log_metrics(dict(of.values))
        mlflow.log_text(of.rows.to_json(orient="records"), "rows.json")
        mlflow.log_text(of.rows.to_csv(index=False), "rows.csv")
        for path in of.figures:
            mlflow.log_artifact(str(path), "figures")
        return f"run {run.info.run_id} of experiment {settings.project!r} in {mlflow.get_tracking_uri()}"


def _tensorboard(of: Record, settings: TrackerSettings) -> str:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    from harness.tables.text import markdown_table

    folder = of.folder / "tensorboard"
    for before in folder.glob("events.out.tfevents.*"):  # of the same run, which is written anew
        before.unlink()
    with SummaryWriter(str(folder)) as writer:
        settings_table = [{"setting": key, "value": str(value)} for key, value in of.settings.items()]
        writer.add_text("settings", markdown_table(settings_table))
        rows = [dict(zip(of.rows.columns, row)) for row in of.rows.itertuples(index=False)]
        writer.add_text("rows", markdown_table(rows))
        for key, value in of.values.items():
            writer.add_scalar(key, value)
        for path in of.figures:
            with Image.open(path) as picture:
                writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")
    return f"tensorboard --logdir {folder}"


TRACKERS: dict[str, Callable[[Record, TrackerSettings], str]] = {
    "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow, "tensorboard": _tensorboard,
}  # fmt: skip
