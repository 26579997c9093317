"""The Python door: the functions and classes that `import harness as sh` offers.

    import harness as sh
    model = sh.wrap(my_module, tokenizer)              # or sh.load("openai-community/gpt2")
    with model.ablated("mlp", sh.regions.small(0.1), blocks=[3]) as removed:
        print(removed.energy_removed, removed.realised_removal)
        logits = my_module(tokens).logits

The tests run each example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from harness.engine.manifest import Manifest, read_in_order, read_manifest
from harness.engine.ranks import Ranks
from harness.engine.run import RunOptions, run_plan, to_stderr
from harness.engine.run import run as run_measurement
from harness.errors import InputError
from harness.evaluation.calibration import Calibration, CalibrationText
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask, TaskContext
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings, ScoringOptions
from harness.evaluation.statistics import estimate
from harness.evaluation.statistics import paired as paired_difference
from harness.measurements import ABLATION, compose_settings, find
from harness.measurements.ablation.cells import task_digest
from harness.measurements.ablation.region_settings import NO_REGION, RegionSettings
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.treatment_settings import TreatmentSettings, refuse_common_text
from harness.measurements.ablation.units import Prepared, build
from harness.measurements.comparison.report import Comparison
from harness.measurements.comparison.report import compare as compare_studies
from harness.models.decompositions import DecompositionCache
from harness.models.description import generation_values
from harness.models.editing import Ablation, RealisedAblation, ablated
from harness.models.families import Family
from harness.models.identity import module_identity
from harness.models.loading import MEMORY, LoadedModel, evaluating, loaded_from, require_head
from harness.models.loading import load as load_model
from harness.models.matrices import Matrix
from harness.models.memory import decomposition_bytes
from harness.models.settings import ModelSettings
from harness.models.targets import Target, TargetSettings, choose_matrices, expand_targets
from harness.models.treatment import Sources
from harness.settings.compose import config_folder
from harness.settings.validation import validated
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region
from harness.tables.drawing import FigureSettings, drawn_as
from harness.tables.store import unit_states
from harness.tasks.lm_eval.index import knows
from harness.tasks.registry import TASKS, check_kinds, prepare_task, require_name, task_of
from harness.tasks.settings import Task

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

def wrap(
    module: torch.nn.Module, tokenizer: Any = None, *, family: Family | None = None, name: str | None = None
) -> Model:
    """Return a model for a module that is in memory, so that it can be decomposed, edited and scored.

    After every use the module has its training mode, its `requires_grad` and every byte of its weights back. Its
    identity is a digest of its weights at the time of use, so that a module that was trained in between is another
    model.

    tokenizer: a tokenizer of transformers, which tasks of text need.
    family: the names of the blocks and matrices, for an architecture that is not in the table of known ones.
    name: the name of the model in tables; by default the name of its class.
    Raises InputError for an unknown architecture, and if the blocks are not those of the family.

    >>> model = sh.wrap(module, tokenizer)
    >>> model
    <Model LlamaForCausalLM: 3 blocks, 21 matrices>
    """
    loaded = loaded_from(module, tokenizer, family=family)
    return Model(loaded, ModelSettings(name=f"{MEMORY}/{name or type(module).__name__}"))


def load(name: str, **settings: Any) -> Model:
    """Load a model.

    name: a Hugging Face name, a local folder, or "recall" for the embedded model.
    settings: any of `model.*` of the command line, such as revision, gguf_file, dtype, device, device_map.
    Raises InputError if the name, a file, a setting or the device does not exist.

    >>> model = sh.load(checkpoint, dtype="float32")
    >>> model.matrices[:3]
    ('0.q_proj', '0.k_proj', '0.v_proj')
    """
    asked: ModelSettings = validated(ModelSettings, {"name": name, **settings}, "model")
    asked.require_attention()
    return Model(load_model(asked, progress=False), asked)


def task(name: str, **settings: Any) -> NamedTask:
    """Return a task by name.

    name: the name of a YAML file in conf/task/ ("wikitext", "piqa"), of a kind of task ("text", "ioi"), or of a task
        or group of lm-eval ("mmlu"). With the setting `kind` it may be any other name.
    settings: those of the task, as `tasks.<name>.*` on the command line.
    Raises InputError for an unknown name, kind or setting, and if a file does not exist.

    >>> sh.task("ioi", data_files="ioi.jsonl", limit=8)
    NamedTask(name='ioi', task=IoiTask(limit=8, ...))
    """
    values: dict[str, Any] = {}
    file = config_folder() / "task" / f"{name}.yaml"
    if file.is_file():
        import yaml

        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    elif name in TASKS:
        values = {"kind": name}
    elif "kind" not in settings and knows(name):
        values = {"kind": "lm_eval", "task": name}
    elif "kind" not in settings:
        there = sorted({*TASKS, *(path.stem for path in file.parent.glob("*.yaml"))})
        raise InputError(
            f"task: there is no {name!r}; give kind=..., a name of lm-eval, or one of {', '.join(there)}"
        )
    missing = [key for key, value in {**values, **settings}.items() if value == "???"]
    if missing:
        raise InputError(f"task {name!r}: {missing[0]} must be given")
    require_name(name)
    return NamedTask(name, task_of({**values, **settings}, name))


@dataclass(frozen=True)
class NamedTask:
    """The settings of a task, and the name of the task in a study."""

    name: str
    task: Task


@dataclass(frozen=True)
class Score:
    """The scores of a model on a task.

    scores: metric -> the scores of all examples. example_ids: the names of the examples, in the same order.
    asked: a digest of what the task asked, by which `paired` refuses scores of different examples.
    """

    task: str
    scores: Mapping[str, ExampleScores]
    example_ids: Sequence[str]
    asked: str

    @property
    def metrics(self) -> pandas.DataFrame:
        """A table with one row per metric, the primary one first: metric, value, stderr, n, higher_is_better."""
        import pandas

        rows = []
        for name, scores in self.scores.items():
            found = estimate(scores)
            rows.append({"metric": name, "value": found.value, "stderr": found.stderr, "n": found.n,
                         "higher_is_better": scores.higher_is_better})
        return pandas.DataFrame(rows)

    @property
    def examples(self) -> pandas.DataFrame:
        """A table with one row per metric and example: metric, example_id, score, weight.

        The value of a metric is sum(score) / sum(weight), or the exponential of that for a perplexity.
        """
        import pandas

        return pandas.concat([
            pandas.DataFrame({"metric": name, "example_id": list(self.example_ids), "score": scores.score,
                              "weight": scores.weight})
            for name, scores in self.scores.items()
        ], ignore_index=True)


def paired(ablated: Score, baseline: Score) -> pandas.DataFrame:
    """Return how two scores of one task differ, paired over the examples.

    The table has one row per metric: metric, baseline, value, delta (ablated - baseline, in the unit of the metric),
    stderr (of delta), p_value (two-sided, paired; exact for counts of right answers). Raises InputError if the examples
    are not the same.

    >>> base = model.score(ioi)
    >>> with model.ablated("mlp", sh.regions.small(0.5)):
    ...     change = sh.paired(model.score(ioi), base)
    >>> list(change.columns)
    ['metric', 'baseline', 'value', 'delta', 'stderr', 'p_value']
    """
    import pandas

    if ablated.asked != baseline.asked:
        raise InputError(f"paired: {ablated.task!r} and {baseline.task!r} did not ask the same of the same examples")
    rows = []
    for name, scores in ablated.scores.items():
        reference = baseline.scores[name]
        found = paired_difference(scores, reference)
        rows.append({"metric": name, "baseline": estimate(reference).value, "value": estimate(scores).value,
                     "delta": found.delta, "stderr": found.stderr, "p_value": found.p_value})
    return pandas.DataFrame(rows)


class MatrixView:
    """One matrix of a model, always `out x in`. name: such as "3.down_proj". shape: (out, in)."""

    def __init__(self, model: Model, matrix: Matrix) -> None:
        self._model, self._matrix = model, matrix
        self.name, self.shape = matrix.name, matrix.shape

    def __repr__(self) -> str:
        return f"<{self.name}: {self.shape[0]} x {self.shape[1]}>"

    @property
    def weight(self) -> Tensor:
        """A copy of its present weights [out, in], in the model's dtype and on its device."""
        return self._matrix.read(self._model.module)

    def decompose(self) -> Decomposition:
        """Return the exact singular values and the singular vectors of the smaller side, in float64.

        The result is kept as long as the weights stay the same.

        >>> found = model["1.down_proj"].decompose()
        >>> found.sigma.shape, found.sigma.dtype, found.side
        (torch.Size([24]), torch.float64, 'left')
        """
        return self._model._decompose(self._matrix)


class Model:
    """A model that can be decomposed, edited, scored and studied. `wrap` and `load` make one."""

    def __init__(self, loaded: LoadedModel, settings: ModelSettings) -> None:
        self.loaded, self.settings = loaded, settings
        self._matrices = {matrix.name: matrix for matrix in loaded.matrices}
        self._decompose = DecompositionCache(loaded, decomposition_bytes(None, loaded.device), watched=True)
        self._edits = 0
        # The identity of the weights of a checkpoint, by which `run` notices that they have changed in memory.
        self._as_loaded = None if loaded.description.source == MEMORY else module_identity(loaded.model)

    def __repr__(self) -> str:
        return (f"<Model {type(self.module).__name__}: {len(self.loaded.blocks)} blocks,"
                f" {len(self._matrices)} matrices>")

    @property
    def module(self) -> torch.nn.Module:
        """The torch module."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.loaded.tokenizer

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of all matrices, such as "3.down_proj", ordered by block and layer type."""
        return tuple(self._matrices)

    def __getitem__(self, name: str) -> MatrixView:
        """Return the matrix of a name. Raises InputError if the model does not have it."""
        if name not in self._matrices:
            from harness.registry import nearest

            near = nearest(name, list(self._matrices))
            raise InputError(f"{name!r} is not a matrix of this model; {near}its names are like"
                             f" {', '.join(list(self._matrices)[:3])}")
        return MatrixView(self, self._matrices[name])

    @contextmanager
    def ablated(
        self, what: str | Sequence[str], region: Region, blocks: Sequence[int] | None = None, edit: str = "weight",
        treatment: TreatmentSettings | None = None,
    ) -> Iterator[RealisedAblation]:
        """Remove a region from some matrices for the time of the context; afterwards every byte is as before.

        what: a layer type or a group of them ("down_proj", "mlp", "attn", "all"), the name of a matrix, or a list of
            these.
        blocks: the numbers of the blocks; None means all.
        edit: "weight" rounds the edited weights to the model's dtype; "branch" leaves the weights as they are and
            removes the part from the outputs in float32.
        treatment: what is done with the region instead of a removal, and in which metric, as `region.*` of the command
            line. Its calibration is the `task` of a result of `sh.task`.
        Yields what was removed: energy_removed (the share of the squared Frobenius norm), realised_removal (1 if all of
        the part is gone after rounding), n_removed, and more. Raises InputError for matrices that the model does not
        have.

        >>> with model.ablated("mlp", sh.regions.small(0.1), blocks=[1]) as removed:
        ...     logits = module(tokens).logits
        >>> removed.n_removed, removed.n_values
        (6, 72)
        """
        if edit not in ("weight", "branch"):
            raise InputError(f"edit: {edit!r} is wrong; use weight or branch")
        wanted = treatment or TreatmentSettings()
        if wanted.of != "weight":
            raise InputError(f"treatment: of={wanted.of!r} needs a reference; use sh.measure('ablation',"
                             " 'region.of=change', 'reference.name=...', ...)")
        text = None if wanted.calibration is None else wanted.prepared(self._context())
        ablation = Ablation(self._target(what, blocks), region, wanted.treatment(text))
        self._decompose.expect(ablation.target.matrices)
        with ExitStack() as stack:
            with evaluating(self.module):  # for the pass over the calibration text
                edited = ablated(self.loaded, ablation, self._sources(text), edit)
                realised = stack.enter_context(edited)
            self._edits += 1
            try:
                yield realised
            finally:
                self._edits -= 1

    def _sources(self, text: CalibrationText | None) -> Sources:
        """Return the sources of an edit. The inputs are measured anew for each, because the weights may have changed.
        """
        if text is None:
            return Sources(self._decompose)
        calibrated = Calibration(self.loaded, text)
        budget = decomposition_bytes(None, self.loaded.device)
        return Sources(self._decompose, DecompositionCache(self.loaded, budget, calibrated=calibrated), calibrated)

    def _identified(self) -> LoadedModel:
        """Return the loaded model with the identity of its present weights, which may no longer be its checkpoint's."""
        present, description = module_identity(self.module), self.loaded.description
        if present == self._as_loaded:
            return self.loaded
        return dataclasses.replace(self.loaded, description=dataclasses.replace(description, identity=present))

    def _target(self, what: str | Sequence[str], blocks: Sequence[int] | None) -> Target:
        names = [what] if isinstance(what, str) else list(what)
        if names and all(name in self._matrices for name in names) and blocks is None:
            chosen = [self._matrices[name] for name in names]
        else:
            chosen = choose_matrices(self.loaded.matrices, names, blocks)
        label = "+".join(names) + ("" if blocks is None else f" in blocks {','.join(map(str, blocks))}")
        return Target("all", label, tuple(m.name for m in chosen), min(m.block for m in chosen))

    def prepare(self, asked: NamedTask | str) -> PreparedTask:
        """Return a task prepared for this model, so that it is tokenised only once if it is scored several times.

        Raises InputError for a task that this model cannot answer.
        """
        named = task(asked) if isinstance(asked, str) else asked
        loaded, family = self.loaded, self.loaded.description.family
        if loaded.description.config is None:
            raise InputError("a module without a transformers config can be decomposed and edited, but not scored")
        check_kinds({named.name: named.task}, loaded.description.config, family.kind)
        return prepare_task(named.name, named.task, self._context())

    def _context(self) -> TaskContext:
        loaded = self.loaded
        generation = generation_values(getattr(loaded.model, "generation_config", None))
        return TaskContext(
            loaded.tokenizer, loaded.description.config, loaded.context_length, loaded.description.family.kind,
            generation,
        )

    def score(self, asked: NamedTask | PreparedTask | str, batch_tokens: int = 8192) -> Score:
        """Measure a task under the module's present weights, edited or not.

        asked: the result of `task` or of `prepare`, or a name for `task`. batch_tokens: padded tokens of one forward
        pass. Raises InputError for a task that this model cannot answer.

        >>> model.score(ioi).metrics.metric.tolist()
        ['accuracy', 'logit_difference', 'p_answer', 'logprob']
        """
        prepared = self.prepare(asked) if isinstance(asked, (str, NamedTask)) else asked
        require_head(self.loaded)
        with evaluating(self.module):
            if isinstance(prepared, DirectTask):
                scores = prepared.measure(self.loaded, Division(), 1.0)
            else:
                scorer = Scorer(self.loaded, {prepared.name: prepared}, ScoringOptions(batch_tokens, reuse=False))
                scores = prepared.measure(scorer.score(prepared.name))
        return Score(prepared.name, scores, list(prepared.example_ids), task_digest(prepared))


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
    if model._edits:
        raise InputError("run: the model is edited now; leave the `with model.ablated(...)` block first")
    named = [task(one) if isinstance(one, str) else one for one in tasks]
    target = TargetSettings(targets) if isinstance(targets, str) else targets
    settings = StudySettings(
        model=model.settings, target=validated(TargetSettings, dataclasses.asdict(target), "target"),
        region=RegionSettings(treatment=treatment or TreatmentSettings()),
        tasks={one.name: one.task for one in named}, runtime=runtime or RuntimeSettings(),
        output=None if output is None else str(output),
    )
    loaded = model._identified()
    ready = {one.name: model.prepare(one) for one in named}
    text = settings.region.treatment.prepared(model._context())
    refuse_common_text(text, ready)
    prepared = Prepared(loaded.description, loaded.matrices, loaded.tokenizer, ready, text)
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

