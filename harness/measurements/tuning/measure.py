"""The measuring of fine-tunings: train, remove, score; or remove, train, score."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harness.engine.measurement import Context, Measured
from harness.engine.ranks import Ranks
from harness.engine.run import error_row
from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, ExampleScores
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.statistics import estimate
from harness.measurements.tuning.training import Trained, load_trained, new_head, save_trained, train
from harness.measurements.tuning.units import TunePlan, Tuning, require_one_process
from harness.models.decompositions import DecompositionCache, disk_cache
from harness.models.editing import RealisedAblation, ablated
from harness.models.families import blocks_of, matrices_of
from harness.models.loading import LoadedModel, load

DECOMPOSITION_BYTES = 4 * 2**30


def open_session(plan: TunePlan, ranks: Ranks, progress: bool) -> LoadedModel:
    """Return the model before any training. Its head may be missing, because each training begins with a new one.

    Raises InputError if it cannot be loaded, or there are several processes.
    """
    require_one_process(ranks)
    if plan.settings.threads:
        torch.set_num_threads(plan.settings.threads)
    return load(plan.settings.model, plan.description, plan.tokenizer, progress)


def measure(plan: TunePlan, units: Sequence[Tuning], context: Context) -> Iterator[Measured]:
    """Measure the units in their order. A training that several of them share is done once, and kept on the disk."""
    run, left = _Run(plan, context), Counter(unit.training for unit in units)
    for unit in units:
        yield run.unit(unit)
        left[unit.training] -= 1
        if not left[unit.training] and not plan.settings.tune.keep_models:
            shutil.rmtree(run.folder_of(unit), ignore_errors=True)


@dataclass(frozen=True)
class _Tuned:
    """A model after its training. realised: what was removed before it, if anything. decompose: those of its weights.

    fresh: whether the model was trained just now, and not read from the disk.
    """

    loaded: LoadedModel
    trained: Trained
    realised: RealisedAblation | None
    decompose: DecompositionCache
    fresh: bool


class _Run:
    """The base model, its decompositions, and the last model that was tuned."""

    def __init__(self, plan: TunePlan, context: Context) -> None:
        self.plan, self.context = plan, context
        self.base: LoadedModel = context.session
        self.disk = disk_cache(plan.settings.cache_gib, plan.settings.cache_dir)
        self.decompose = DecompositionCache(self.base, DECOMPOSITION_BYTES, self.disk)
        self.last: tuple[str, _Tuned] | None = None
        self.failed: dict[str, Exception] = {}  # training -> why it failed, so that it is not tried for every unit

    def folder_of(self, unit: Tuning) -> Path:
        """Return the folder of the checkpoints and the weights of a training."""
        return self.plan.folder / "trainings" / unit.training

    def unit(self, unit: Tuning) -> Measured:
        """Return the rows of one unit; of one that fails, an error row."""
        started = time.perf_counter()
        try:
            if unit.training in self.failed:
                raise self.failed[unit.training]
            tuned = self._tuned(unit)
            self.context.describe(f"{unit.order} seed {unit.seed}: {unit.ablation.label}")
            removed = tuned.realised
            if unit.order == "tune_prune":
                with ablated(tuned.loaded, unit.ablation, tuned.decompose) as removed:
                    scores = self._scores(tuned.loaded)
            else:
                scores = self._scores(tuned.loaded)
            return self._measured(unit, tuned, scores, removed, time.perf_counter() - started)
        except InputError:
            raise
        except Exception as error:  # it must neither stop the other units nor leave this one without a row
            described = self._described(unit)
            return Measured(unit, {"tunings": [error_row(described, error)]}, described)

    def _tuned(self, unit: Tuning) -> _Tuned:
        """Return the model of a unit after its training, which may be in memory or on the disk already."""
        if self.last is not None and self.last[0] == unit.training:
            return replace(self.last[1], fresh=False)
        self.last = None
        try:
            found = self._train(unit)
        except InputError:
            raise
        except Exception as error:
            self.failed[unit.training] = error
            raise
        self.last = unit.training, found
        return found

    def _train(self, unit: Tuning) -> _Tuned:
        realised, folder, before = None, self.folder_of(unit), unit.order == "prune_tune"
        if before:
            with ablated(self.base, unit.ablation, self.decompose) as realised:
                model: Any = copy.deepcopy(self.base.model)
        else:
            model = copy.deepcopy(self.base.model)
        new_head(model, self.base.missing, unit.seed)
        trained = load_trained(model, folder)
        fresh = trained is None
        if trained is None:
            self.context.describe(f"training seed {unit.seed}" + f" after {unit.ablation.label}" * before)
            start = replace(self.base, model=model)
            model, trained = train(
                start, self.plan.examples, self.plan.settings.tune, unit.seed, folder, self.context.progress
            )
            save_trained(model, trained, folder)
        model.eval().requires_grad_(False)
        family = self.base.description.family
        loaded = replace(self.base, model=model, matrices=matrices_of(model, family), blocks=blocks_of(model, family),
                         missing=())
        decompose = DecompositionCache(loaded, DECOMPOSITION_BYTES, self.disk)
        return _Tuned(loaded, trained, realised, decompose, fresh)

    def _scores(self, tuned: LoadedModel) -> dict[str, dict[str, ExampleScores]]:
        found = {}
        options = ScoringOptions(self.plan.settings.batch_tokens, reuse=False)
        for name, task in self.plan.tasks.items():
            if isinstance(task, DirectTask):
                found[name] = task.measure(tuned, Division(), 1.0)
            else:
                found[name] = task.measure(Scorer(tuned, {name: task}, options).score(name))
        return found

    def _described(self, unit: Tuning) -> dict[str, Any]:
        settings, description = self.plan.settings, self.plan.description
        region, device = unit.ablation.region, self.base.device
        none = unit.order == "tune"
        return {
            **_key(unit), "training_id": unit.training, "train_task": settings.trained_task(),
            "method": settings.tune.method, "n_train": len(self.plan.examples),
            "region_by": None if none else region.by, "region_kind": None if none else region.kind,
            "model": settings.model.name, "revision": settings.model.revision,
            "model_digest": description.identity.get("digest") or description.identity.get("revision"),
            "model_type": description.config.model_type,
            "settings": json.dumps(asdict(settings.tune), sort_keys=True),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        }  # fmt: skip

    def _measured(
        self, unit: Tuning, tuned: _Tuned, scores: Mapping[str, Mapping[str, ExampleScores]],
        realised: RealisedAblation | None, seconds: float,
    ) -> Measured:
        described, trained = self._described(unit), tuned.trained
        removed = {} if realised is None else asdict(realised)
        row = {
            **described, "status": "ok", "steps": trained.steps, "n_trained": trained.n_trained,
            "train_loss": trained.loss, "seconds": seconds,
            "seconds_training": trained.seconds if tuned.fresh else None,
            **{key: removed.get(key) for key in ("fraction_start", "fraction_stop", "n_removed", "n_values",
                                                 "energy_removed", "realised_removal")},
        }  # fmt: skip
        results = []
        for task, metrics in scores.items():
            protocol = json.dumps(dict(self.plan.tasks[task].protocol), sort_keys=True, default=str)
            for metric, of_metric in metrics.items():
                found = estimate(of_metric)
                if not math.isfinite(found.value):
                    raise FloatingPointError(f"{metric} of {task} is {found.value}: not a finite number")
                results.append({
                    **_key(unit), "task": task, "metric": metric, "value": found.value, "stderr": found.stderr,
                    "n": found.n, "n_clusters": found.n_clusters, "higher_is_better": of_metric.higher_is_better,
                    "protocol": protocol,
                })
        return Measured(unit, {"tunings": [row], "results": results}, described)


def _key(unit: Tuning) -> dict[str, Any]:
    return {"tuning_id": unit.id, "order": unit.order, "target": unit.ablation.target.label,
            "region": "none" if unit.order == "tune" else unit.ablation.label, "seed": unit.seed}
