"""Make the rows of the tables `metrics` and `examples` from the outcome of a cell."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from harness.engine.measurement import Measured
from harness.engine.run import error_row
from harness.evaluation.adaptive import Sampled
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import estimate, paired, paired_interval
from harness.measurements.ablation.cells import Cell, numeric_settings
from harness.measurements.ablation.outcomes import Failed, Outcome, Scored
from harness.measurements.ablation.study import Study
from harness.models.editing import RealisedAblation
from harness.models.loading import LoadedModel
from harness.spectral.regions import by_factors

Baseline = Mapping[str, ExampleScores]


class RowMaker:
    """Makes rows from outcomes. It computes once the columns that are the same for all cells of a study."""

    def __init__(self, study: Study, loaded: LoadedModel) -> None:
        self.tasks = study.tasks
        self.keep_examples = study.settings.runtime.examples
        settings, description = study.settings, study.description
        device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu"
        self.common: dict[str, Any] = {
            "study_id": study.id,
            "model": settings.model.label,
            "revision": settings.model.revision,
            "gguf_file": settings.model.gguf_file,
            "model_digest": description.identity.get("digest") or description.identity.get("revision"),
            "model_type": description.config.model_type,
            "dtype": description.dtype,
            "n_blocks": len(loaded.blocks),
            "edit": settings.runtime.edit,
            "settings": json.dumps(numeric_settings(settings, description), sort_keys=True),
            "seed": settings.seed,
            "precision": "exact",
            "rank": int(os.environ.get("RANK", 0)),
            "device": device,
        }
        text = study.prepared.calibration
        self.calibration = text and json.dumps(
            {**text.protocol, "centred": text.centred, "n_tokens": text.n_tokens}, sort_keys=True, default=str
        )
        self._values: dict[str, dict[str, float]] = {}
        self.protocols = {name: json.dumps(dict(task.protocol), sort_keys=True, default=str)
                          for name, task in study.tasks.items()}
        self.reference = study.prepared.reference and study.prepared.reference.settings.label
        self.block_of = {matrix.name: matrix.block for matrix in loaded.matrices}
        self.type_of = {matrix.name: matrix.layer_type for matrix in loaded.matrices}

    def measured(
        self, cell: Cell, outcome: Outcome, baseline: Baseline | None, realised: RealisedAblation | None,
        seconds: float,
    ) -> Measured:
        """Return the rows of a cell.

        If one metric is not a finite number, its row is an error row and the other rows are not. If no rows can be made
        from an outcome, the cell becomes an error row.
        """
        described = {**self._describe(cell, realised), "seconds": seconds}
        if outcome.used:
            described["settings"] = json.dumps({**json.loads(described["settings"]), **outcome.used}, sort_keys=True)
        if isinstance(outcome, Failed):
            # made now, because the traceback keeps the tensors of the failed pass
            rows: Mapping[str, Any] = _failed(described, outcome.error, baseline)
        else:
            rows = _RowsLater(partial(self._rows_or_error, cell, outcome, baseline, described))
        return Measured(cell, rows, {**described, "metric": "all"})

    def _rows_or_error(
        self, cell: Cell, outcome: Any, baseline: Baseline | None, described: Mapping[str, Any]
    ) -> dict[str, Any]:
        try:
            return self._rows(cell, outcome, baseline, described)
        except Exception as error:
            return _failed(described, error, baseline)

    def _describe(self, cell: Cell, realised: RealisedAblation | None) -> dict[str, Any]:
        target, region, treatment = cell.ablation.target, cell.ablation.region, cell.ablation.treatment
        blocks = sorted({self.block_of[name] for name in target.matrices})
        types = list(dict.fromkeys(self.type_of[name] for name in target.matrices))
        return {
            **self.common,
            "cell_id": cell.id,
            "task": cell.task,
            "protocol": self.protocols[cell.task],
            "target": target.label,
            "target_kind": target.kind,
            "block": target.block,
            "layer_type": target.layer_type,
            "blocks": _ranges(blocks) or None,
            "layer_types": ",".join(types) or None,
            "n_matrices": len(target.matrices),
            "region": "none" if cell.is_baseline else cell.ablation.label,
            "region_by": None if cell.is_baseline else region.by,
            "region_kind": None if cell.is_baseline else region.kind,
            "region_seed": getattr(region, "seed", None),
            **({} if cell.is_baseline or cell.in_other_order else {
                "region_metric": treatment.metric, "region_keep": treatment.keep,
                "region_scale": None if by_factors(region) else treatment.scale,
                "region_replace": treatment.replace,
                "calibration": treatment.calibration and self.calibration,
                "region_of": treatment.of, "reference": treatment.reference and self.reference,
                "reference_digest": treatment.reference,
            }),
            **(dataclasses.asdict(realised) if realised else {}),
        }

    def _rows(
        self, cell: Cell, outcome: Any, baseline: Baseline | None, described: Mapping[str, Any]
    ) -> dict[str, Any]:
        if isinstance(outcome, Scored):
            unedited = None if baseline is None else self._unedited(cell.task, baseline)
            rows = [_row(described, name, scores, baseline, unedited) for name, scores in outcome.metrics.items()]
            scores, used = outcome.metrics, None
        else:
            sampled = outcome.sampled
            rows = [_sampled_row(described, name, sampled) for name in sampled.metrics]
            scores, used = sampled.scores, sampled.used
        if not self.keep_examples:
            return {"metrics": rows}
        return {"metrics": rows, "examples": self._examples(described, cell, scores, used)}

    def _unedited(self, task: str, baseline: Baseline) -> dict[str, float]:
        """Return the values of the metrics of the unedited model, which are computed once for each task."""
        if task not in self._values:
            self._values[task] = {name: estimate(scores).value for name, scores in baseline.items()}
        return self._values[task]

    def _examples(
        self, described: Mapping[str, Any], cell: Cell, outcome: Mapping[str, ExampleScores], used: np.ndarray | None
    ) -> dict[str, Any]:
        ids = np.asarray(self.tasks[cell.task].example_ids, dtype=object)
        ids = ids if used is None else ids[used]
        return {
            "study_id": described["study_id"],
            "cell_id": cell.id,
            "task": cell.task,
            "metric": [name for name in outcome for _ in range(len(ids))],
            "example_id": np.tile(ids, len(outcome)),
            "score": np.concatenate([scores.score for scores in outcome.values()]),
            "weight": np.concatenate([scores.weight for scores in outcome.values()]),
            "cluster": [number for scores in outcome.values() for number in (
                [None] * len(ids) if scores.clusters is None else scores.clusters.tolist()
            )],
        }


class _RowsLater(Mapping[str, Any]):
    """The rows of a unit, which are made when they are asked for the first time."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @cached_property
    def _rows(self) -> Mapping[str, Any]:
        return self._make()

    def __getitem__(self, table: str) -> Any:
        return self._rows[table]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _failed(described: Mapping[str, Any], error: Exception, baseline: Baseline | None) -> dict[str, Any]:
    row = error_row(described, error)
    return {"metrics": [{**row, "metric": name} for name in (baseline or ["all"])]}


def _row(
    described: Mapping[str, Any], name: str, scores: ExampleScores, baseline: Baseline | None,
    unedited: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return the row of one metric. unedited: the values of the metrics of the unedited model, if there is a baseline.
    """
    value = estimate(scores)
    if not math.isfinite(value.value):
        return _not_finite(described, name, value.value)
    row = {
        **described, "metric": name, "status": "ok", "value": value.value, "stderr": value.stderr, "n": value.n,
        "n_clusters": value.n_clusters, "n_available": value.n, "higher_is_better": scores.higher_is_better,
    }
    if baseline is not None and unedited is not None and math.isfinite(unedited[name]):
        delta = paired(scores, baseline[name])
        row |= {"baseline": unedited[name], "delta": delta.delta, "delta_stderr": delta.stderr}
        row |= {"p_value": delta.p_value, "delta_freedom": delta.freedom}
        ends = paired_interval(scores, baseline[name], 0.95, delta)
        row |= {f"delta_{end}": value if math.isfinite(value) else None for end, value in zip(("low", "high"), ends)}
    return row


def _sampled_row(described: Mapping[str, Any], name: str, sampled: Sampled) -> dict[str, Any]:
    found = dataclasses.asdict(sampled.metrics[name])
    if not math.isfinite(found["value"]):
        return _not_finite(described, name, found["value"])
    if not math.isfinite(found["baseline"]):
        found |= dict.fromkeys(("baseline", "delta", "delta_stderr", "p_value"))
        found |= dict.fromkeys(("low", "high"), math.nan)
    ends = {f"ci_{end}": found.pop(end) for end in ("low", "high")}
    return {
        **described, **found, "metric": name, "status": "ok", "precision": "adaptive",
        "higher_is_better": sampled.scores[name].higher_is_better,
        # An infinite end of the interval becomes null.
        **{key: end if math.isfinite(end) else None for key, end in ends.items()},
    }


def _not_finite(described: Mapping[str, Any], metric: str, value: float) -> dict[str, Any]:
    return {**described, "metric": metric, "status": "error", "error": f"{metric} is {value}: not a finite number"}


def _ranges(blocks: list[int]) -> str:
    """Return ascending numbers as ranges: "0-2,5" for [0, 1, 2, 5]."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][-1] + 1:
            parts[-1].append(block)
        else:
            parts.append([block])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
