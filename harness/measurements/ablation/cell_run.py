"""The state of a run over cells: each ablation is applied to the one loaded model, scored, and undone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import numpy as np

from harness.engine.measurement import Context, Measured
from harness.errors import InputError
from harness.evaluation.adaptive import Sampler
from harness.evaluation.division import LostStep
from harness.evaluation.other_order import AnyBatch, batches_differ, other_options
from harness.evaluation.requests import DirectTask, ExampleScores, Scores, scored_tasks
from harness.evaluation.scoring import Scorer
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.outcomes import Failed, Outcome, SampledPart, Scored
from harness.measurements.ablation.region_settings import REFERENCE_MODEL
from harness.measurements.ablation.rows import RowMaker
from harness.measurements.ablation.scorers import SMALLER, Scorers
from harness.measurements.ablation.sources import sources_of
from harness.measurements.ablation.study import Study
from harness.models.attention import other_attention
from harness.models.editing import Ablation, RealisedAblation, ablated, edited_matrices, loss_changes_of
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.memory import is_out_of_memory, release_memory
from harness.spectral.regions import OtherOrder, by_loss


class NonFiniteLoss(RuntimeError):
    """A log-probability is not finite. The cell becomes an error row, because no mean may hide this."""


class CellRun:
    """The state of a run over cells: the scorer with its frontier, the decompositions, and the baselines.

    tasks: the names of the tasks of these cells.
    """

    def __init__(self, study: Study, context: Context, tasks: set[str]) -> None:
        self.study, self.division, self.describe = study, context.division, context.describe
        self.loaded: LoadedModel = context.session
        self.runtime = study.settings.runtime
        self.tasks = {name: task for name, task in study.tasks.items() if name in tasks}
        scored = scored_tasks(self.tasks)
        self.sampler = None
        if self.runtime.precision == "adaptive":
            batch_tokens = self.runtime.scoring().batch_tokens
            self.sampler = Sampler(scored, self.runtime.adaptive, batch_tokens, study.settings.seed)
        self.scorers = Scorers(self.loaded, self.tasks, self.sampler, self.runtime, self.division)
        stream = min(self.scorers.stream_bytes(), self.runtime.stream_gib * 2**30)
        self.sources = sources_of(self.loaded, self.runtime, study.prepared.calibration, stream,
                                  study.prepared.reference)
        self.rows = RowMaker(study, self.loaded)
        self.baseline_of: dict[str, dict[str, ExampleScores]] = {}
        self._matrices = {matrix.name: matrix for matrix in self.loaded.matrices}
        self._edited_by: dict[Ablation, list[Matrix]] = {}
        self.batches_of: dict[str, list[AnyBatch]] = {}  # those in which the baseline was measured

    def baselines(self, wanted: set[str]) -> Iterator[Measured]:
        """Measure the unedited model on every task, and yield the cells whose ids are wanted."""
        self.describe("baseline")
        by_task = {cell.task: cell for cell in self.study.units if cell.is_baseline}
        for name in sorted(self.tasks):
            started, cell = time.perf_counter(), by_task[name]
            outcome = self.outcome(cell)
            if isinstance(outcome, Scored):
                self.baseline_of[name] = dict(outcome.metrics)
            if cell.id in wanted:
                yield self.rows.measured(cell, outcome, None, None, time.perf_counter() - started)

    def calibrate(self, matrices: set[str]) -> None:
        """Measure the inputs of all matrices that will be edited in one pass over the calibration text, if any.

        If that fails, every cell that needs it becomes an error row.
        """
        if self.study.prepared.calibration is None or not matrices:
            return
        self.describe("calibration")
        try:
            edited = [matrix for matrix in self.loaded.matrices if matrix.name in matrices]
            self.sources.prepare(edited)
            ranked = next((c.ablation for c in self.study.units if by_loss(c.ablation.region)), None)
            if ranked is not None:  # one backward pass for all matrices, not one for each target
                loss_changes_of(ranked, edited, self.sources)
        except InputError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                release_memory()

    def edited(self, ablation: Ablation) -> list[Matrix]:
        """Return the matrices that an ablation may edit."""
        if ablation not in self._edited_by:
            there = [self._matrices[name] for name in ablation.target.matrices]
            with suppress(Exception):  # the edit itself then fails in the same way, and its cells become error rows
                there = edited_matrices(ablation, self.loaded, self.sources) or there
            self._edited_by[ablation] = there
        return self._edited_by[ablation]

    def first_block(self, ablation: Ablation) -> int:
        """Return the first block that an ablation edits."""
        return min((matrix.block for matrix in self.edited(ablation)), default=ablation.target.first_block)

    def ablation(self, ablation: Ablation, cells: Sequence[Cell]) -> Iterator[Measured]:
        """Measure the cells of one ablation under one edit.

        If the edit itself fails, in a decomposition or a region, they become error rows and the run goes on.
        """
        with ExitStack() as undo:
            try:
                realised = self._edit(undo, ablation)
            except (InputError, LostStep):
                raise
            except Exception as error:
                problem = error
            else:
                for cell in cells:
                    yield self._measured(cell, realised)
                return
        for cell in cells:
            yield self.rows.measured(cell, Failed(problem), self.baseline_of.get(cell.task), None, 0.0)

    def _edit(self, undo: ExitStack, ablation: Ablation) -> RealisedAblation | None:
        """Apply an ablation. If memory runs out, keep less and try again.

        The outputs inside a block go first, then decompositions, then the stream.
        """
        self.sources.expect(ablation.target.matrices)
        for give_up in (self.scorers.keep_nothing_inside, self.sources.shrink, self.scorers.leave_device, None):
            try:
                return self.division.agree("editing", lambda: undo.enter_context(self._edited(ablation)))
            except Exception as error:
                if give_up is None or not is_out_of_memory(error):
                    raise
            # This is outside of the except clause, in which the traceback would keep the tensors of the failed edit.
            undo.close()  # the edit of this process, if it was another one that ran out of memory
            give_up()
            release_memory()
        raise AssertionError  # the last try returns or raises

    def _edited(self, ablation: Ablation) -> AbstractContextManager[RealisedAblation | None]:
        if ablation.region == REFERENCE_MODEL:
            return self.sources.require_reference().whole_model()
        if not ablation.target.matrices:
            return nullcontext()
        return ablated(self.loaded, ablation, self.sources, self.runtime.edit)

    def _measured(self, cell: Cell, realised: RealisedAblation | None) -> Measured:
        started, baseline = time.perf_counter(), self.baseline_of.get(cell.task)
        if baseline is None:
            lost = "the baseline of this task failed: there is nothing to compare with"
            outcome: Outcome = Failed(RuntimeError(lost))
        else:
            outcome = self.outcome(cell)
        return self.rows.measured(cell, outcome, baseline, realised, time.perf_counter() - started)

    def outcome(self, cell: Cell) -> Outcome:
        """Measure one cell under the model's present weights.

        If memory runs out, the cell is measured once more with a quarter of the batch. If that works, so are all later
        cells of its task. Raises LostStep if the processes that measure the cell together are no longer at one step.
        """
        used: dict[str, Any] = {}
        try:
            if cell.of_reference_model:
                return self._of_reference_model(cell)
            return self._in_other_order(cell, 1.0, used) if cell.in_other_order else self._in_usual_order(cell, used)
        except LostStep:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                return Failed(error, used)
        # This is outside of the except clause, in which the traceback would keep the tensors of the failed pass.
        used.clear()
        release_memory()
        try:
            if cell.of_reference_model:
                return self._of_reference_model(cell)
            if cell.in_other_order:
                return self._in_other_order(cell, SMALLER, used)
            with self.scorers.in_smaller_batches(cell.task, self.first_block(cell.ablation)):
                return self._in_usual_order(cell, used)
        except LostStep:
            raise
        except Exception as error:
            return Failed(error, used)

    def _in_usual_order(self, cell: Cell, used: dict[str, Any]) -> Outcome:
        """Measure one cell with the batch that fits. used: what differs from the settings is added to it."""
        used |= self.scorers.used(cell.task)
        scorer, share = self.scorers.of(cell.task), used.get("generation_batch_share", 1.0)
        edited = self.edited(cell.ablation)
        first_block = self.first_block(cell.ablation)
        return dataclasses.replace(self._measure(cell, scorer, first_block, share, edited), used=used)

    def _of_reference_model(self, cell: Cell) -> Outcome:
        """Measure the reference model on every example, from its own embeddings on and not from the frontier."""
        options = dataclasses.replace(self.runtime.scoring(), reuse=False)
        task = scored_tasks({cell.task: self.study.tasks[cell.task]})
        scorer = self.division.agree("another model", lambda: Scorer(self.loaded, task, options, self.division))
        return self._measure(cell, scorer, 0)

    def _in_other_order(self, cell: Cell, share: float, used: dict[str, Any]) -> Outcome:
        """Measure the control of the noise floor on every example: by another attention, and in other batches.

        share: the size of the batches, relative to what the control asks for. If it is not 1, the attention is the
        usual one, because the other may need more memory. used: the settings of this are added to it, and whether they
        differ from those of the baseline at all.
        """
        region = cell.ablation.region
        assert isinstance(region, OtherOrder)
        with other_attention(self.loaded.model) if share == 1 else nullcontext() as attention:
            used |= {} if attention is None else {"attn_implementation": attention}
            if isinstance(self.tasks[cell.task], DirectTask):
                used |= {"generation_batch_share": region.share * share, "order_differs": attention is not None}
                scorer = self.scorers.of(cell.task)
                return dataclasses.replace(self._measure(cell, scorer, 0, region.share * share), used=used)
            usual, task = self.batches_of[cell.task], self.study.tasks[cell.task]
            options = other_options(self.runtime.scoring(), usual, region.share)
            options = dataclasses.replace(options, batch_tokens=max(1, int(options.batch_tokens * share)))
            scorer = self.division.agree(
                "other batches", lambda: Scorer(self.loaded, scored_tasks({cell.task: task}), options, self.division)
            )
            differ = attention is not None or batches_differ(usual, scorer.packed[cell.task].batches)
            used |= {"batch_tokens": options.batch_tokens, "share_context": False, "order_differs": differ}
            return dataclasses.replace(self._measure(cell, scorer, 0), used=used)

    def _measure(
        self, cell: Cell, scorer: Scorer, first_block: int, batch_share: float = 1.0, edited: Sequence[Matrix] = ()
    ) -> Scored | SampledPart:
        """Return the scores of one cell. Raises NonFiniteLoss.

        batch_share: the size of the batches of a DirectTask, relative to the usual one. edited: as `Scorer.score` takes
        them.
        """
        task = self.tasks[cell.task]
        if isinstance(task, DirectTask):
            return Scored(task.measure(self.loaded, self.division, batch_share))

        sampled = self.sampler is not None and self.sampler.draws(task.name) and not cell.exactly
        names = list(self.sampler.groups([task.name])) if self.sampler and sampled else [task.name]
        ahead: dict[str, Scores] = {}

        def score(name: str) -> Scores:
            if name not in ahead:
                # Processes that measure an adaptive cell together score some groups more than one process might need.
                next_ones = scorer.until_all_have_work(names[names.index(name) :])
                if len(next_ones) > 1:
                    ahead.update(scorer.score_several(next_ones, first_block, edited))
            scores = ahead.pop(name) if name in ahead else scorer.score(name, first_block, edited)
            bad = int((~np.isfinite(scores.logprob)).sum())
            if bad:
                n = len(scores.logprob)
                raise NonFiniteLoss(f"{bad} of {n} scored tokens have a log-probability that is not finite")
            return scores

        if cell.is_baseline:
            self.batches_of[cell.task] = [batch for name in names for batch in scorer.packed[name].batches]
        if self.sampler is None or not sampled:
            return Scored(task.measure(score(task.name)))
        if cell.is_baseline:
            return Scored(self.sampler.measure_baseline(task.name, score))
        return SampledPart(self.sampler.measure(task.name, score))
