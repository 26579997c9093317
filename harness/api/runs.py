"""Runs from Python: measure what is missing of a run, compare runs, and open, read, report and draw one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.api.model import Model, prepared_for_study
from harness.api.tasks import NamedTask, task
from harness.engine.manifest import Manifest, read_in_order, read_manifest
from harness.engine.ranks import Ranks
from harness.engine.run import RunOptions, run_plan, to_stderr
from harness.engine.run import run as run_measurement
from harness.errors import InputError
from harness.evaluation.settings import RuntimeSettings
from harness.measurements import ABLATION, compose_settings, find
from harness.measurements.ablation.region_settings import NO_REGION, RegionSettings
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.treatment_settings import TreatmentSettings
from harness.measurements.ablation.units import build
from harness.measurements.comparison.report import Comparison
from harness.measurements.comparison.report import compare as compare_studies
from harness.models.loading import evaluating
from harness.models.targets import TargetSettings, expand_targets
from harness.settings.validation import validated
from harness.spectral.regions import Region
from harness.tables.drawing import FigureSettings, drawn_as
from harness.tables.store import unit_states

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def run(
    model: Model, targets: Literal["matrix", "type", "block", "all"] | TargetSettings = "matrix", *,
    regions: Sequence[Region], tasks: Sequence[NamedTask | str], output: str | Path | None = None,
    runtime: RuntimeSettings | None = None, treatment: TreatmentSettings | None = None, progress: bool = True,
) -> Run:
    """Run what is missing of a study, which measures each region of each target on every task.

    It also measures the unablated model, and a control that decomposes all matrices and removes nothing.

    targets: "matrix" (each matrix alone), "type", "block" or "all", or TargetSettings with layer types and blocks.
    output: the folder of the tables, by default results/<model>-<id>. The id depends on everything that the numbers
        depend on, so that the same call again measures nothing.
    runtime: as `runtime.*` of the command line. treatment: as in `Model.ablated`, for every region.
    progress: whether a progress bar is shown.
    Raises InputError for wrong settings, and inside of `ablated`.

    >>> study = sh.run(model, sh.TargetSettings("type", ["mlp"]), regions=[sh.regions.small(0.5)], tasks=[ioi])
    >>> study.metrics[["target", "region", "metric"]].drop_duplicates("target").values.tolist()[-1]
    ['down_proj', 'small 0.5', 'accuracy']
    """
    named = [task(one) if isinstance(one, str) else one for one in tasks]
    target = TargetSettings(targets) if isinstance(targets, str) else targets
    settings = StudySettings(
        model=model.settings, target=validated(TargetSettings, dataclasses.asdict(target), "target"),
        region=RegionSettings(treatment=treatment or TreatmentSettings()),
        tasks={one.name: one.task for one in named}, runtime=runtime or RuntimeSettings(),
        output=None if output is None else str(output),
    )
    loaded, prepared = prepared_for_study(model, named, settings.region.treatment)
    chosen = expand_targets(settings.target, loaded.matrices)
    study = build(settings, prepared, chosen, list(dict.fromkeys([*regions, NO_REGION])))
    options = RunOptions(progress, to_stderr if progress else _silent, tidy=True, session=loaded)
    with evaluating(model.module):
        outcome = run_plan(ABLATION, study, options, Ranks())
    return open(outcome.folder)


def measure(kind: str, *overrides: str, config_dir: str | None = None, progress: bool = True) -> Run:
    """Run what is missing of any measurement, with settings in the grammar of the command line.

    kind: "ablation" (harness run), "spectra", "search", or a measurement of another package. overrides: such as
    "model=gpt2". config_dir: a folder with YAML files of the user. Raises InputError for wrong settings.

    >>> spectra = sh.measure("spectra", "model=pretrained", f"model.name={checkpoint}", progress=False)
    >>> spectra.matrices[["matrix", "rank"]].values.tolist()[0]
    ['0.q_proj', 24]
    """
    measurement = find(kind)
    settings = compose_settings(measurement, overrides, config_dir)
    options = RunOptions(progress, to_stderr if progress else _silent, tidy=True)
    return open(run_measurement(measurement, settings, options).folder)


def compare(
    first: str | Path | Run, *others: str | Path | Run, output: str | Path | None = None, figures: bool = True
) -> Comparison:
    """Compare a study with each of some others, cell by cell and paired over the examples, as `harness compare`.

    first, others: folders, or what `run`, `measure` and `open` return. output: the folder of the comparison, by default
    results/compare-<id>. figures: whether they are drawn. Raises InputError for folders that are no studies, and if no
    cell can be compared.

    >>> found = sh.compare(study, tuned_study, output="comparison")
    >>> found.rows[["target", "region", "difference", "p_holm"]].iloc[-1]["target"]
    'down_proj'
    """
    folders = [one.folder if isinstance(one, Run) else one for one in (first, *others)]
    return compare_studies(folders, output, _silent, figures)


def open(folder: str | Path) -> Run:
    """Return the run in a folder that the harness wrote, of any kind. Raises InputError if there is none.

    >>> sh.open(study.folder).kind
    'ablation'
    """
    return Run(Path(folder), read_manifest(folder))


@dataclass(frozen=True)
class Run:
    """A run and its tables, which are attributes and pandas DataFrames.

    A study has `metrics` and `examples`, spectra have `matrices`, `singular_values` and `vectors`, a search has
    `verdict` and others; `tables` lists the names. A table is read whenever it is asked for, so that it shows the rows
    that an unfinished run has at that time. Its rows are those of the units that are done, in the order of the run.
    """

    folder: Path
    manifest: Manifest = dataclasses.field(repr=False)

    @property
    def kind(self) -> str:
        """The name of the measurement: "ablation", "spectra", "search", or that of another package."""
        return self.manifest.kind

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of its tables."""
        return find(self.kind).tables.names()

    def table(self, name: str) -> pandas.DataFrame:
        """Return the table of a name. Raises InputError if this kind of run does not have it."""
        tables = find(self.kind).tables
        if name not in tables.names():
            raise InputError(f"{name!r} is not a table of {self.kind}; it has {', '.join(tables.names())}")
        return read_in_order(self.folder, tables, name)

    def __getattr__(self, name: str) -> pandas.DataFrame:
        if name.startswith("_") or name not in find(self.manifest.kind).tables.names():
            raise AttributeError(f"a run of {self.manifest.kind} has no {name!r}; its tables are"
                                 f" {', '.join(find(self.manifest.kind).tables.names())}")
        return self.table(name)

    @property
    def states(self) -> dict[str, str]:
        """The state of each unit, "ok", "error" or "missing", by its id and in the order of the run."""
        there = unit_states(self.folder, find(self.kind).tables)
        return {unit: there.get(unit, "missing") for unit, _ in self.manifest.units}

    def report(self, figures: FigureSettings | None = None) -> Path | None:
        """Print the summary and write the report into <folder>/report/. Return its page, or None for no rows.

        figures: the format and width of its figures, such as FigureSettings("pdf", "column").
        """
        with drawn_as(figures or FigureSettings()):
            return find(self.kind).report.report(self.folder)

    def plot(self, figures: FigureSettings | None = None, **which: Any) -> Figure:
        """Return the main figure as a figure of matplotlib, which can be shown, changed and saved.

        figures: its width, such as FigureSettings(width="column"); whoever saves the figure chooses the format.
        which: `task` and `metric` for a study, `weights` for spectra; by default the first of each. Raises InputError
        if this kind of run has no figure, or there is nothing to draw.
        """
        report = find(self.kind).report
        if not hasattr(report, "figure"):
            raise InputError(f"{self.kind} has no figure of its own")
        with drawn_as(figures or FigureSettings()):
            return report.figure(self.folder, **which)


def _silent(line: str) -> None:
    pass
