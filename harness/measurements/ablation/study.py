"""A study: the cells of one model and some tasks, with what is known before the weights are loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.engine.plan import Plan, ShardCost
from harness.evaluation.requests import PreparedTask
from harness.measurements.ablation.cells import (
    Cell,
    cell_id,
    group_by_ablation,
    has_noise_floor,
    numeric_settings,
)
from harness.measurements.ablation.costs import CostTable, ShardOfCells, costs_of
from harness.measurements.ablation.preparation import Prepared
from harness.measurements.ablation.region_settings import NO_REGION, OTHER_ORDER
from harness.measurements.ablation.settings import StudySettings
from harness.models.description import ModelDescription
from harness.models.editing import Ablation
from harness.models.loading import train_embedded
from harness.models.matrices import Matrix
from harness.models.targets import BASELINE, UNEDITED
from harness.spectral.regions import to_plain


@dataclass(frozen=True, kw_only=True)
class Study(Plan):
    """The plan of a study.

    units: the cells in the order in which they run: first the baselines, then by first edited block, then by target.
        In this order the frontier moves only forward.
    digests: task -> digest of what it asks, as `task_digest` returns.
    """

    settings: StudySettings
    units: tuple[Cell, ...]
    prepared: Prepared
    digests: dict[str, str]

    @property
    def description(self) -> ModelDescription:
        """The description of the model, for which no weights are read."""
        return self.prepared.description

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix of the model."""
        return self.prepared.matrices

    @property
    def tasks(self) -> dict[str, PreparedTask]:
        """The tasks by name."""
        return self.prepared.tasks

    def frozen(self) -> dict[str, Any]:
        """Return the tasks, and for each cell the indices of its target, its region and its task."""
        targets = list(dict.fromkeys(cell.ablation.target for cell in self.units))
        regions = list(dict.fromkeys((cell.ablation.region, cell.ablation.treatment) for cell in self.units))
        target_index = {target: i for i, target in enumerate(targets)}
        region_index = {region: i for i, region in enumerate(regions)}
        task_index = {name: i for i, name in enumerate(self.tasks)}
        return {
            "tasks": {name: {"digest": self.digests[name], "protocol": dict(task.protocol)}
                      for name, task in self.tasks.items()},
            "targets": [dataclasses.asdict(target) for target in targets],
            # A region that is removed, and no more, is written as ever.
            "regions": [to_plain(region) | ({"treatment": treatment.key()} if treatment.key() else {})
                        for region, treatment in regions],
            "cells": [
                [target_index[c.ablation.target], region_index[c.ablation.region, c.ablation.treatment],
                 task_index[c.task]]
                for c in self.units
            ],
        }

    def require_settled(self, command: str) -> None:
        """Raise InputError if runtime.batch_tokens is null. command: the command that needs the number."""
        self.settings.runtime.require_batch_tokens(command)

    def together(self, n_missing: int, n_ranks: int) -> bool:
        """Return whether all processes score each cell together, which they do if there are fewer cells than processes.
        """
        return n_missing < n_ranks

    def groups(self, units: Sequence[Cell]) -> list[list[Cell]]:
        """Return the baselines as one group, then the cells of each ablation as one group."""
        baselines = [cell for cell in units if cell.is_baseline]
        rest = group_by_ablation([cell for cell in units if not cell.is_baseline])
        return [group for group in (baselines, *(cells for _, cells in rest)) if group]

    @cached_property
    def costs(self) -> CostTable:
        """The predicted costs of its passes, moves of the frontier and decompositions."""
        return costs_of(self.settings, self.prepared, self.units)

    def shard_cost(self) -> ShardCost:
        """Return the cost of an empty shard."""
        return ShardOfCells(self.costs)

    def before_jobs(self) -> None:
        """Train the embedded model once, so that not every job trains it."""
        train_embedded([self.settings.model])

    def with_cells(self, pairs: Iterable[tuple[Ablation, str]]) -> Study:
        """Return the study of the baselines and of these (ablation, name of a task) only, by first edited block.

        In low precision it measures its noise floor, too.
        """
        numeric = numeric_settings(self.settings, self.description)
        unedited = [Ablation(BASELINE, NO_REGION)]
        if has_noise_floor(self.description):
            unedited.append(Ablation(UNEDITED, OTHER_ORDER))
        baselines = [(ablation, name) for ablation in unedited for name in self.tasks]
        unique = dict.fromkeys([*baselines, *sorted(pairs, key=lambda pair: pair[0].target.first_block)])
        cells = tuple(
            Cell(cell_id(numeric, ablation, self.digests[task]), ablation, task) for ablation, task in unique
        )
        return dataclasses.replace(self, units=cells)
