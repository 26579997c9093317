"""Find the largest batch that fits into memory.

It is found once per study and then fixed, because in low precision the scores depend on the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from harness.errors import InputError
from harness.evaluation.requests import ScoredTask
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import GIB, RuntimeSettings, ScoringOptions
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.memory import decomposition_bytes, is_out_of_memory, release_memory
from harness.models.targets import Target

SMALLEST = 256
# Larger batches do not make a GPU faster, and a model of fewer parameters needs more tokens to keep it busy. This is on
# paper; the stages "passes" and "cells" of experiments/speed/gpu.py measure it.
LARGEST, LARGEST_OF_SMALL, SMALL = 1 << 15, 1 << 16, 10**9
MARGIN = 1.25  # what is tried over what is then used, because memory becomes fragmented over hours
# A process on the CPU that runs out of memory is killed without an error, and larger batches are slower there
# (docs/speed.md).
LARGEST_ON_CPU = ScoringOptions.batch_tokens


def largest_batch(
    loaded: LoadedModel, tasks: Mapping[str, ScoredTask], runtime: RuntimeSettings, targets: Sequence[Target] = ()
) -> int:
    """Return the largest number of padded tokens per pass that fits into memory, a power of two.

    It fits if the largest batches of every task can be scored, with a margin, beside everything that a study keeps in
    memory. It is not increased further once each task is a single batch, and not above `largest_useful`. targets: what
    the study edits. Raises InputError if SMALLEST does not fit.
    """
    found, budget = None, SMALLEST
    while budget <= largest_useful(loaded):
        try:
            tried = dataclasses.replace(runtime, batch_tokens=int(budget * MARGIN))
            n_batches = _rehearse(loaded, tasks, tried, targets)
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


def largest_useful(loaded: LoadedModel) -> int:
    """Return the number of tokens per pass above which the device of the model is no faster."""
    if loaded.device.type == "cpu":
        return LARGEST_ON_CPU
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return LARGEST_OF_SMALL if parameters < SMALL else LARGEST


def _rehearse(
    loaded: LoadedModel, tasks: Mapping[str, ScoredTask], runtime: RuntimeSettings, targets: Sequence[Target]
) -> int:
    """Score the batches that need the most memory, and return the largest number of batches of a task."""
    scorer = Scorer(loaded, tasks, runtime.scoring())
    reserved = torch.empty(_kept_bytes(loaded, scorer, runtime, targets), dtype=torch.uint8, device=loaded.device)
    for task in scorer.packed:
        scorer.rehearse(task)
    del reserved
    return max((len(packed.batches) for packed in scorer.packed.values()), default=0)


def _kept_bytes(
    loaded: LoadedModel, scorer: Scorer, runtime: RuntimeSettings, targets: Sequence[Target] = ()
) -> int:
    """Return the bytes of what a study keeps in memory beside the model and the batch.

    These are the stream at the frontier, the decompositions, what the edit of the largest target holds until it is
    undone, and four float64 copies of a matrix while it is edited.
    """
    stream = min(scorer.stream_bytes(), runtime.stream_gib * GIB)
    vectors = sum(8 * min(matrix.shape) ** 2 for matrix in loaded.matrices)
    budget = decomposition_bytes(runtime.decomposition_gib, loaded.device, stream)
    edit = 4 * 8 * max(matrix.shape[0] * matrix.shape[1] for matrix in loaded.matrices)
    held_by = {matrix.name: _held_bytes(matrix, loaded.model.dtype.itemsize, runtime.edit)
               for matrix in loaded.matrices}
    held = max((sum(held_by[name] for name in target.matrices) for target in targets), default=0)
    return int(stream + min(vectors, budget) + edit + held)


def _held_bytes(matrix: Matrix, itemsize: int, edit: str) -> int:
    """Return the bytes that an edited matrix holds: its original, or the float32 factors of a branch.

    A branch holds the factors of what is removed or of what is kept, whichever is less, so at most half of the rank.
    """
    out, width = matrix.shape
    if edit == "branch":
        return 4 * (min(matrix.shape) // 2) * (out if out <= width else out + width)
    return itemsize * out * width
