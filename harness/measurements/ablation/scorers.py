"""The scorers of a run over cells. If memory runs out, they keep less and take smaller batches from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from harness.evaluation.adaptive import Sampler
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, PreparedTask, ScoredTask, scored_tasks
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings
from harness.models.loading import LoadedModel
from harness.models.memory import is_out_of_memory, release_memory

SMALLER = 0.25  # size of the batches, relative to those before, once memory has run out


class Scorers:
    """One scorer for all tasks, and one for each task for which memory has run out.

    tasks: by name. sampler: what divides tasks into groups, for adaptive precision.
    """

    def __init__(
        self, loaded: LoadedModel, tasks: Mapping[str, PreparedTask], sampler: Sampler | None,
        runtime: RuntimeSettings, division: Division,
    ) -> None:
        self._loaded, self._tasks, self._sampler = loaded, tasks, sampler
        self._options, self._division = runtime.scoring(), division
        self._usual = Scorer(loaded, self._scored(tasks), self._options, division)
        self._small: dict[str, Scorer] = {}
        # Of each task for which memory has run out: what its cells now use instead of the settings.
        self._used: dict[str, dict[str, Any]] = {}

    def of(self, task: str) -> Scorer:
        """Return the scorer of a task; of a DirectTask any, which it does not use."""
        return self._small.get(task, self._usual)

    def used(self, task: str) -> dict[str, Any]:
        """Return what the cells of a task use instead of the settings: smaller batches, if memory has run out."""
        return dict(self._used.get(task, {}))

    def stream_bytes(self) -> int:
        """Return the bytes of the stream of all tasks at one boundary."""
        return self._usual.stream_bytes()

    def leave_device(self) -> None:
        """Keep no stream on the device any more."""
        for scorer in (self._usual, *self._small.values()):
            scorer.leave_device()

    def keep_nothing_inside(self) -> None:
        """Keep no outputs inside the block at the frontier any more."""
        for scorer in (self._usual, *self._small.values()):
            scorer.keep_nothing_inside()

    def advance(self, block: int) -> None:
        """Move the frontier to a block. If memory runs out, go on without a frontier, which gives the same numbers."""
        for scorer in (self._usual, *self._small.values()):
            _advance(scorer, block)

    @contextmanager
    def in_smaller_batches(self, task: str, first_block: int) -> Iterator[None]:
        """Take a quarter of the batch for a task; if the block of the context does not raise, from then on.

        first_block: the first block that may be edited now.
        """
        before = self._used.get(task), self._small.get(task)
        self._small.pop(task, None)
        try:
            self._shrink(task)
            yield
        except BaseException:
            for kept, of_task in zip((self._used, self._small), before):
                kept.pop(task, None)  # type: ignore[attr-defined]
                if of_task is not None:
                    kept[task] = of_task  # type: ignore[index]
            raise
        if task in self._small:
            for name in self._small[task].packed:
                self._usual.forget(name)
            self._small[task].reuse = self._options.reuse
            _advance(self._small[task], first_block)

    def _shrink(self, task: str) -> None:
        used = self.used(task)
        if isinstance(self._tasks[task], DirectTask):
            self._used[task] = {"generation_batch_share": SMALLER * used.get("generation_batch_share", 1.0)}
            return
        tokens = max(1, int(SMALLER * used.get("batch_tokens", self._options.batch_tokens)))
        self._used[task] = {"batch_tokens": tokens}
        options = dataclasses.replace(self._options, batch_tokens=tokens, reuse=False)
        self._small[task] = self._division.agree(
            "a smaller batch", lambda: Scorer(self._loaded, self._scored([task]), options, self._division)
        )

    def _scored(self, tasks: Iterable[str]) -> dict[str, ScoredTask]:
        """Return what a scorer needs for some tasks, by the names by which it knows them."""
        scored = scored_tasks({name: self._tasks[name] for name in tasks})
        return scored if self._sampler is None else self._sampler.groups(scored)


def _advance(scorer: Scorer, block: int) -> None:
    try:
        scorer.advance(block)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # This is outside of the except clause, in which the traceback would keep the tensors of the failed pass.
    scorer.stop_keeping()
    release_memory()
