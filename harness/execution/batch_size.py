"""The largest batch that fits, found once per study and then fixed: in low precision it moves the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from harness.config import RuntimeConfig
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask
from harness.evaluation.scoring import Scorer, scorer_of
from harness.execution.manifest import MANIFEST, read_manifest
from harness.execution.memory import is_out_of_memory, release_memory
from harness.execution.planned import PlannedStudy
from harness.execution.study import build_study
from harness.models.loading import LoadedModel

SMALLEST = 256
LARGEST = 1 << 20
# What is tried, over what is then used: memory gets fragmented over hours.
MARGIN = 1.25
# Out of memory a CPU process is killed rather than told, and larger batches are slower there (docs/speed.md).
LARGEST_ON_CPU = RuntimeConfig.batch_tokens


def largest_batch(loaded: LoadedModel, tasks: Mapping[str, PreparedTask], runtime: RuntimeConfig) -> int:
    """Padded tokens per pass: the largest power of two, within SMALLEST and LARGEST, at which the widest batch of every
    task with requests can be scored beside what a study keeps in memory, with a margin; no larger than what makes one
    batch of each.

    Raises InputError where SMALLEST does not fit.
    """
    found, budget = None, SMALLEST
    while budget <= (LARGEST_ON_CPU if loaded.device.type == "cpu" else LARGEST):
        try:
            n_batches = _rehearse(loaded, tasks, dataclasses.replace(runtime, batch_tokens=int(budget * MARGIN)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            release_memory()
        found = budget
        if n_batches <= 1:
            break
        budget *= 2
    if found is None:
        raise InputError(
            f"runtime.batch_tokens: on {loaded.device}, not even {SMALLEST} tokens fit beside the model; use a smaller"
            " runtime.stream_gib, runtime.decomposition_gib or model.dtype, or model.device_map=auto"
        )
    return found


def _rehearse(loaded: LoadedModel, tasks: Mapping[str, PreparedTask], runtime: RuntimeConfig) -> int:
    """Score the batches that need the most memory; returns the largest number of batches of a task."""
    scorer = scorer_of(loaded, tasks, runtime)
    reserved = torch.empty(_kept_bytes(loaded, scorer, runtime), dtype=torch.uint8, device=loaded.device)
    for task in scorer.packed:
        scorer.rehearse(task)
    del reserved
    return max((len(packed.batches) for packed in scorer.packed.values()), default=0)


def _kept_bytes(loaded: LoadedModel, scorer: Scorer, runtime: RuntimeConfig) -> int:
    """Of the stream at the frontier, the decompositions, and four float64 copies of a matrix while it is edited."""
    tokens = sum(batch.input_ids.numel() for packed in scorer.packed.values() for batch in packed.batches)
    width = loaded.model.config.get_text_config().hidden_size
    stream = tokens * width * loaded.model.dtype.itemsize if runtime.reuse else 0
    vectors = sum(8 * min(matrix.shape) ** 2 for matrix in loaded.matrices)
    edit = 4 * 8 * max(matrix.shape[0] * matrix.shape[1] for matrix in loaded.matrices)
    kept = min(stream, runtime.stream_gib * 2**30) + min(vectors, runtime.decomposition_gib * 2**30)
    return int(kept + edit)


def frozen_batch(planned: PlannedStudy) -> int | None:
    """The batch of the study that the folder holds already."""
    if not (planned.folder / MANIFEST).is_file():
        return None
    return read_manifest(planned.folder)["config"]["runtime"]["batch_tokens"]


def with_batch(planned: PlannedStudy, batch_tokens: int) -> PlannedStudy:
    """The same study in the same folder with its batch; in low precision its cells get other ids."""
    config = planned.study.config
    config = dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, batch_tokens=batch_tokens))
    study = build_study(config, planned.description, planned.matrices, planned.tasks)
    return dataclasses.replace(planned, study=study)
