"""From what a cell's measurement gave to its rows, and their file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from harness.errors import InputError
from harness.evaluation.adaptive import Sampled
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import estimate, paired
from harness.execution.ablating import RealisedAblation
from harness.execution.planned import PlannedStudy
from harness.execution.study import Cell, numeric_settings
from harness.models.loading import LoadedModel
from harness.tables.provenance import provenance
from harness.tables.schema import blank_row
from harness.tables.store import write_cell


class RowWriter:
    """Turns outcomes into rows and writes each cell's file."""

    def __init__(self, planned: PlannedStudy, loaded: LoadedModel) -> None:
        self.folder = planned.folder
        self.tasks = planned.tasks
        self.keep_examples = planned.study.config.runtime.examples
        config, description = planned.study.config, planned.description
        device = torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu"
        self.common: dict[str, Any] = {
            "study_id": planned.study.study_id,
            "model": config.model.name,
            "revision": config.model.revision,
            "gguf_file": config.model.gguf_file,
            "model_digest": description.identity.get("digest") or description.identity.get("revision"),
            "model_type": description.config.model_type,
            "dtype": description.dtype,
            "n_blocks": len(loaded.blocks),
            "edit": config.runtime.edit,
            "settings": json.dumps(numeric_settings(config, description), sort_keys=True),
            "seed": config.seed,
            "precision": "exact",
            "rank": int(os.environ.get("RANK", 0)),
            "device": device,
            **provenance(),
        }
        self.block_of = {matrix.name: matrix.block for matrix in loaded.matrices}
        self.type_of = {matrix.name: matrix.layer_type for matrix in loaded.matrices}

    def _describe(self, cell: Cell, realised: RealisedAblation | None) -> dict[str, Any]:
        target, region = cell.ablation.target, cell.ablation.region
        blocks = sorted({self.block_of[name] for name in target.matrices})
        types = list(dict.fromkeys(self.type_of[name] for name in target.matrices))
        return {
            **blank_row(),
            **self.common,
            "cell_id": cell.cell_id,
            "task": cell.task,
            "protocol": json.dumps(dict(self.tasks[cell.task].protocol), sort_keys=True, default=str),
            "target": target.label,
            "target_kind": target.kind,
            "block": target.block,
            "layer_type": target.layer_type,
            "blocks": _ranges(blocks) or None,
            "layer_types": ",".join(types) or None,
            "n_matrices": len(target.matrices),
            "region": "none" if cell.is_baseline else region.label,
            "region_by": None if cell.is_baseline else region.by,
            "region_kind": None if cell.is_baseline else region.kind,
            "region_seed": region.seed,
            **(dataclasses.asdict(realised) if realised else {}),
        }

    def write(
        self, cell: Cell, outcome: dict[str, ExampleScores] | Exception, baseline: Mapping[str, ExampleScores] | None,
        realised: RealisedAblation | None, seconds: float, used: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a cell's file. used: settings that differ from the study's.

        A metric that is beyond float64 is an error row of its own beside the others; what cannot be made into rows is
        an error of this cell alone. Raises InputError where the file cannot be written.
        """
        described = {**self._describe(cell, realised), "seconds": seconds}
        if used:
            described["settings"] = json.dumps({**json.loads(described["settings"]), **used}, sort_keys=True)
        try:
            self._write(cell, outcome, baseline, described)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot write rows ({error.strerror or error}); what is done is kept: make room and run"
                " the same command again"
            ) from error
        except Exception as error:
            if isinstance(outcome, Exception):
                raise
            self._write(cell, error, baseline, described)

    def _write(
        self, cell: Cell, outcome: dict[str, ExampleScores] | Exception, baseline: Mapping[str, ExampleScores] | None,
        described: dict[str, Any],
    ) -> None:
        if isinstance(outcome, Exception):
            lines = "".join(traceback.format_exception(outcome))
            names = list(baseline) if baseline else ["all"]
            rows = [{**described, "metric": name, "status": "error", "error": lines} for name in names]
            write_cell(self.folder, cell.cell_id, rows, None)
            return
        if isinstance(outcome, Sampled):
            rows = [self._sampled_row(described, name, outcome) for name in outcome.metrics]
            examples = self._examples(described, cell, outcome.scores, outcome.used) if self.keep_examples else None
        else:
            rows = [self._row(described, name, scores, baseline) for name, scores in outcome.items()]
            examples = self._examples(described, cell, outcome) if self.keep_examples else None
        write_cell(self.folder, cell.cell_id, rows, examples)

    def _row(self, described, name, scores: ExampleScores, baseline) -> dict[str, Any]:
        value = estimate(scores)
        if not math.isfinite(value.value):
            return _not_finite(described, name, value.value)
        row = {
            **described, "metric": name, "status": "ok", "value": value.value, "stderr": value.stderr, "n": value.n,
            "n_available": value.n, "higher_is_better": scores.higher_is_better,
        }
        unedited = None if baseline is None else estimate(baseline[name]).value
        if unedited is not None and math.isfinite(unedited):
            delta = paired(scores, baseline[name])
            row |= {"baseline": unedited, "delta": delta.delta, "delta_stderr": delta.stderr,
                    "p_value": delta.p_value}
        return row

    def _sampled_row(self, described, name: str, sampled: Sampled) -> dict[str, Any]:
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
            # an end at infinity is no end
            **{key: end if math.isfinite(end) else None for key, end in ends.items()},
        }

    def _examples(
        self, described, cell: Cell, outcome: Mapping[str, ExampleScores], used: np.ndarray | None = None
    ) -> dict[str, Any]:
        ids = np.asarray(self.tasks[cell.task].example_ids, dtype=object)
        ids = ids if used is None else ids[used]
        n = len(ids)
        return {
            "study_id": [described["study_id"]] * (n * len(outcome)),
            "cell_id": [cell.cell_id] * (n * len(outcome)),
            "task": [cell.task] * (n * len(outcome)),
            "metric": [name for name in outcome for _ in range(n)],
            "example_id": np.tile(ids, len(outcome)),
            "score": np.concatenate([scores.score for scores in outcome.values()]),
            "weight": np.concatenate([scores.weight for scores in outcome.values()]),
        }


def _not_finite(described: Mapping[str, Any], metric: str, value: float) -> dict[str, Any]:
    return {**described, "metric": metric, "status": "error", "error": f"{metric} is {value}: not a finite number"}


def _ranges(blocks: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and block == parts[-1][-1] + 1:
            parts[-1].append(block)
        else:
            parts.append([block])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
