"""A model in memory that can be decomposed, edited and scored: `wrap` and `load` make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.api.scores import Score
from harness.api.tasks import NamedTask, task
from harness.errors import InputError
from harness.evaluation.calibration import Calibration, CalibrationText
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, PreparedTask, TaskContext, task_digest
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.measurements.ablation.preparation import Prepared
from harness.measurements.ablation.treatment_settings import TreatmentSettings, refuse_common_text
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
from harness.models.targets import Target, choose_matrices
from harness.models.treatment import Sources
from harness.registry import nearest
from harness.settings.validation import validated
from harness.spectral.decomposition import Decomposition
from harness.spectral.regions import Region
from harness.tasks.registry import check_kinds, prepare_task


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


def prepared_for_study(
    model: Model, tasks: Sequence[NamedTask], treatment: TreatmentSettings
) -> tuple[LoadedModel, Prepared]:
    """Return the loaded model with the identity of its present weights, and what a study must know of it.

    Raises InputError if the model is edited now, if it cannot answer a task, or if a task has the calibration text.
    """
    if model._edits:
        raise InputError("run: the model is edited now; leave the `with model.ablated(...)` block first")
    loaded = model._identified()
    ready = {one.name: model.prepare(one) for one in tasks}
    text = treatment.prepared(model._context())
    refuse_common_text(text, ready)
    return loaded, Prepared(loaded.description, loaded.matrices, loaded.tokenizer, ready, text)
