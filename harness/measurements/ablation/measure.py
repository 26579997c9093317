"""What the engine calls to measure cells: load the model, say what it will take, and yield the rows of each cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from harness.engine.manifest import MANIFEST, manifest_there, reading
from harness.engine.measurement import Context, Measured, require_same_weights
from harness.engine.ranks import Ranks
from harness.errors import InputError
from harness.evaluation.batch_size import largest_batch
from harness.evaluation.graphs import require_graphs
from harness.evaluation.requests import scored_tasks
from harness.measurements.ablation import forecast
from harness.measurements.ablation.cell_run import CellRun
from harness.measurements.ablation.cells import Cell, group_by_ablation
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.texts import write_texts
from harness.measurements.ablation.units import study_of
from harness.models.identity import module_identity, parameters_digest
from harness.models.loading import MEMORY, LoadedModel, load, require_head
from harness.models.memory import is_out_of_memory, release_memory
from harness.tables.labels import region_words


def open_session(study: Study, ranks: Ranks, progress: bool) -> LoadedModel:
    """Return the model of a study with its weights. Raises InputError if it cannot be loaded or lacks the head."""
    settings = study.settings
    if ranks.n > 1 and settings.model.device_map is not None:
        raise InputError(
            "model.device_map: one process holds such a model, over all devices; start one process, or leave it unset"
        )
    require_graphs(settings.runtime, settings.model.device)
    if settings.runtime.threads:
        torch.set_num_threads(settings.runtime.threads)
    loaded = load(settings.model, study.description, study.prepared.tokenizer, progress)
    require_head(loaded)
    if settings.runtime.compile:
        for block in loaded.blocks:
            # All blocks share one graph, in which weights are inputs, so that an edit in place needs no other graph.
            block.forward = torch.compile(block.forward, dynamic=True)
    return loaded


def announce(study: Study, cells: Sequence[Cell], loaded: LoadedModel) -> str:
    """Return how many cells will be measured, and about how long that takes."""
    try:
        return forecast.announce(study, cells, loaded)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory()
    return ""


def settled(
    study: Study, ranks: Ranks, progress: bool, say: Callable[[str], None]
) -> tuple[Study, LoadedModel | None]:
    """Return the study with a number of batch tokens, and the model if it had to be loaded to find that number.

    The number is that of the settings, or if it is null there, that of the manifest, or else the largest that fits.
    """
    if study.settings.runtime.batch_tokens is not None:
        return study, None

    def find() -> tuple[int | None, LoadedModel | None]:
        if not ranks.is_main:
            return None, None
        there = manifest_there("ablation", study.folder)
        if there is not None:
            with reading(study.folder / MANIFEST, "the setting runtime.batch_tokens"):
                return int(there.settings["runtime"]["batch_tokens"]), None
        loaded = open_session(study, ranks, progress)
        targets = list({cell.ablation.target.label: cell.ablation.target for cell in study.units}.values())
        found = largest_batch(loaded, scored_tasks(study.tasks), study.settings.runtime, targets)
        say(f"runtime.batch_tokens: {found}, the largest that fits")
        return found, loaded

    found, loaded = ranks.division().agree("finding the largest batch", find)
    runtime = dataclasses.replace(study.settings.runtime, batch_tokens=ranks.broadcast(found))
    settings = dataclasses.replace(study.settings, runtime=runtime)
    return study_of(settings, study.prepared, study.folder), loaded


def measure(study: Study, cells: Sequence[Cell], context: Context) -> Iterator[Measured]:
    """Measure the baseline of every task, then the ablations in the order in which the frontier moves.

    Raises SpoiledRun at the end if the weights are not those of the beginning, and InputError at the beginning if a
    module in memory is no longer the one for which the study was planned.
    """
    loaded: LoadedModel = context.session
    if loaded.description.source == MEMORY and loaded.description.identity not in ({}, module_identity(loaded.model)):
        raise InputError("model: its weights have changed since the study was planned; plan it again")
    as_loaded = parameters_digest(loaded.model)
    if study.settings.runtime.examples and context.division.rank == 0 and (study.folder / MANIFEST).is_file():
        # The texts are for readers of the report alone: what cannot be decoded or written must cost no number.
        with suppress(Exception):
            write_texts(study.folder, study.id, study.tasks, study.prepared.tokenizer)
    run = CellRun(study, context, {cell.task for cell in cells})
    yield from run.baselines({cell.id for cell in cells if cell.is_baseline})
    run.calibrate({name for cell in cells for name in cell.ablation.target.matrices})
    groups = group_by_ablation([cell for cell in cells if not cell.is_baseline])
    for ablation, members in sorted(groups, key=lambda group: run.first_block(group[0])):
        context.describe(f"{ablation.target.label}: {region_words(ablation.label)}")
        run.scorers.advance(run.first_block(ablation))
        yield from run.ablation(ablation, members)
    context.division.agree("verifying the weights", lambda: require_same_weights(loaded.model, as_loaded))
