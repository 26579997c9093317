"""Measure components: the first-order passes over all matrices, and then one matrix after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from harness.engine.measurement import Context, Measured, require_same_weights
from harness.engine.ranks import Ranks
from harness.engine.run import error_row
from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.gradients import SingularGradients, first_gradients, loss_changes
from harness.evaluation.requests import ScoredTask
from harness.evaluation.settings import RuntimeSettings
from harness.measurements.ablation.sources import sources_of
from harness.measurements.components.plan import ComponentsPlan, Unit
from harness.measurements.components.rows import Described, Named, component_columns, prediction_columns
from harness.measurements.components.tables import TABLES
from harness.models.identity import parameters_digest
from harness.models.loading import LoadedModel, load, require_head
from harness.models.matrices import Matrix
from harness.models.sources import MatrixSource, from_model, initialised, open_source
from harness.models.treatment import Treatment, spectrum_of
from harness.models.unembedding import down_proj_of
from harness.spectral.activations import InputCovariance
from harness.spectral.components import leading_directions
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Component

ANY = Component(0)  # stands for every component: the spectrum does not depend on which one is meant


def open_session(plan: ComponentsPlan, ranks: Ranks, progress: bool) -> LoadedModel:
    """Return the model with its weights. Raises InputError if it cannot be loaded or lacks the head."""
    if plan.settings.threads is not None:
        torch.set_num_threads(plan.settings.threads)
    loaded = load(plan.settings.model, plan.description, plan.tokenizer, progress)
    require_head(loaded)
    return loaded


def measure(plan: ComponentsPlan, units: Sequence[Unit], context: Context) -> Iterator[Measured]:
    """Derive the loss and the metrics to all values of all matrices, and then describe one matrix after the other.

    If a pass fails, every matrix gets an error row. Raises SpoiledRun if the weights changed meanwhile.
    """
    loaded: LoadedModel = context.session
    as_loaded = parameters_digest(loaded.model)
    run = ComponentsRun(plan, [unit.matrix for unit in units], loaded)
    problem = None
    context.describe("first-order passes")
    try:
        run.prepare()
    except InputError:
        raise
    except Exception as error:
        problem = error
    for unit in units:
        context.describe(unit.matrix.name)
        described = run.described(unit)
        try:
            if problem is not None:
                raise problem
            yield Measured(unit, run.rows(unit, described), described)
        except InputError:
            raise
        except Exception as error:  # an error of one matrix must neither stop the others nor leave it without a row
            yield Measured(unit, {"matrices": [error_row(described, error)]}, described)
    require_same_weights(loaded.model, as_loaded)


@dataclass
class ComponentsRun:
    """The state of a run: the sources of spectra and inputs, and the derivatives to all values."""

    plan: ComponentsPlan
    matrices: list[Matrix]
    loaded: LoadedModel

    def __post_init__(self) -> None:
        settings = self.plan.settings
        runtime = RuntimeSettings(cache_dir=settings.cache_dir)
        of_change = settings.region.of == "change"
        self.sources = sources_of(self.loaded, runtime, self.plan.text,
                                  reference=self.plan.reference if of_change else None)
        self.treatment = Treatment(settings.region.metric, centred=settings.region.centred, of=settings.region.of)
        self.losses: Mapping[str, torch.Tensor] = {}
        self.gradients: dict[str, SingularGradients] = {}
        self._leading: tuple[torch.Tensor, torch.Tensor] | None = None

    def prepare(self) -> None:
        """Measure the inputs of all matrices, and derive the loss of the text and one metric of each task."""
        also = [down_proj_of(matrix, self.loaded.matrices) for matrix in self.matrices]
        there = {matrix.name: matrix for matrix in [*self.matrices, *(one for one in also if one is not None)]}
        self.sources.expect(there)
        self.sources.prepare(list(there.values()))
        if self.plan.text is not None:
            self.losses = loss_changes(self.loaded, self.plan.text.requests, self.matrices, self.spectrum)
        for name, task in self.plan.tasks.items():
            self.gradients[name] = self._derived(task)

    def spectrum(self, matrix: Matrix) -> Decomposition:
        """Return the spectrum of a matrix, or of its change, in the metric of the run."""
        return spectrum_of(matrix, ANY, self.treatment, self.sources)

    def operand(self, matrix: Matrix) -> torch.Tensor:
        """Return what the components of a matrix make up: its weight, or its change as float64, [out, in]."""
        if self.treatment.of == "change":
            return self.sources.require_reference().change(matrix)
        return matrix.read(self.loaded.model)

    def _derived(self, task: ScoredTask) -> SingularGradients:
        """Return the derivatives of the first wanted metric of a task that has one. Raises InputError without any."""
        there = list(blank_measure(task))
        wanted = [metric for metric in self.plan.settings.metrics if metric in there] or there
        return first_gradients(self.loaded, task, wanted, self.matrices, self.spectrum, self.operand)

    @cached_property
    def others(self) -> dict[str, MatrixSource]:
        """The weights in which each component is looked for again, by the name of their column."""
        settings, found = self.plan.settings, {}
        if "random" in settings.stability:
            found["random"] = from_model(initialised(settings.model, self.plan.description, settings.seed))
        if self.plan.reference is not None:
            found["reference"] = open_source(self.plan.reference.settings, self.plan.reference.description)
        return found

    def _leading_of(self, inputs: InputCovariance) -> torch.Tensor:
        """Return the leading directions of the inputs, which are found once for matrices with the same inputs."""
        if self._leading is None or self._leading[0] is not inputs.covariance:
            self._leading = inputs.covariance, leading_directions(inputs)
        return self._leading[1]

    def _largest(self, matrix: Matrix) -> torch.Tensor | None:
        """Return the positions of the components whose tokens are named: for each derivative those that it predicts to
        matter most. None for all."""
        n, derived = self.plan.settings.tokens_of, [one.products[matrix.name] for one in self.gradients.values()]
        if n is None:
            return None
        derived += [self.losses[matrix.name]] if matrix.name in self.losses else []
        largest = [one.abs().argsort(descending=True, stable=True)[:n] for one in derived]
        return torch.cat(largest).unique() if largest else torch.arange(min(n, min(matrix.shape)))

    @cached_property
    def common(self) -> dict[str, Any]:
        """The columns that are the same for all matrices."""
        plan, settings, description = self.plan, self.plan.settings, self.plan.description
        text, device = plan.text, self.loaded.device
        return {
            "model": settings.model.label,
            "metric": settings.region.metric,
            "of": settings.region.of,
            "calibration": text and json.dumps(
                {**text.protocol, "centred": text.centred, "n_tokens": text.n_tokens}, sort_keys=True, default=str),
            "protocols": json.dumps({name: dict(task.protocol) for name, task in plan.tasks.items()}, sort_keys=True,
                                    default=str),
            "gguf_file": settings.model.gguf_file,
            "model_digest": description.identity.get("digest") or description.identity.get("revision"),
            "model_type": description.config.model_type,
            "dtype": description.dtype,
            "reference": plan.reference and plan.reference.settings.label,
            "reference_digest": plan.reference and plan.reference.digest,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }

    def described(self, unit: Unit) -> dict[str, Any]:
        """Return the columns that are known of a matrix whatever happens."""
        matrix = unit.matrix
        out, width = matrix.shape
        return {**self.common, "components_id": unit.id, "matrix": matrix.name, "block": matrix.block,
                "layer_type": matrix.layer_type, "n_out": out, "n_in": width, "n_components": min(out, width)}

    def rows(self, unit: Unit, described: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rows of one matrix by table."""
        started, matrix, settings = time.perf_counter(), unit.matrix, self.plan.settings
        decomposition = self.spectrum(matrix)
        calibrated, down = self.sources.calibrated, down_proj_of(matrix, self.loaded.matrices)
        neurons = None
        if calibrated is not None and down is not None:
            of_down = calibrated.inputs(down)
            neurons = (of_down.covariance.diagonal() + of_down.mean**2).clamp(min=0).sqrt()
        inputs = None if calibrated is None else calibrated.inputs(matrix)
        leading = None if inputs is None else self._leading_of(inputs)
        about = Described(self.loaded, matrix, self.operand(matrix), decomposition, inputs, leading, neurons)
        tokens = Named(settings.tokens, self._largest(matrix))
        columns = component_columns(about, tokens, self.others, "rounded" in settings.stability)
        if matrix.name in self.losses:
            columns["predicted_loss"] = self.losses[matrix.name].numpy()
        row = {
            **described, "status": "ok", "svd_method": decomposition.method,
            "svd_reconstruction_error": decomposition.reconstruction_error,
            "svd_orthogonality_error": decomposition.orthogonality_error,
        }
        predictions: list[dict[str, Any]] = []
        for name, found in self.gradients.items():
            task = self.plan.tasks[name]
            better = 1.0 if blank_measure(task)[found.metric].higher_is_better else -1.0
            predictions += prediction_columns(task, found, matrix.name, better)
        row["seconds"] = time.perf_counter() - started
        keys = {name: described[name] for name in TABLES["predictions"].names() if name in described}
        return {
            "matrices": [row], "components": TABLES["components"].keyed(described, columns),
            "predictions": [{**keys, "metric": one["metric"], **one} for one in predictions],
        }
