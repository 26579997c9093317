"""Dividing one scoring pass over the processes of a launch: each scores some of the batches, all get every answer."""

from __future__ import annotations

import itertools
import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class LostStep(Exception):
    """A process of the launch has ended, or is not where the others are: nothing that they exchange can be trusted."""


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Division:
    """This process is number `rank` of `n` that measure the same cells in the same order. gather: a value that pickles
    -> those of all processes, in the order of their numbers; it waits for all of them."""

    rank: int = 0
    n: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    _steps: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def own(self, n_batches: int) -> range:
        """The batches of this process; neighbours, which are of about the same length, go to different ones."""
        return range(self.rank, n_batches, self.n)

    def together(self, label: str, compute: Callable[[], T]) -> list[T]:
        """What `compute` gives in every process, in the order of their numbers.

        label: what is computed, to notice processes that are not at the same step. An exception of one of them is
        raised in all, so that all go on alike; with several, that of the lowest number. Raises LostStep.
        """
        if self.n == 1:
            return [compute()]
        found = problem = None
        try:
            found = compute()
        except Exception as error:
            problem = error
        step = (next(self._steps), label)
        try:
            everyone = self.gather((step, found, problem and _portable(problem, self.rank)))
        except Exception as error:
            raise LostStep(f"at {label}: another process of this launch has ended") from error
        if any(other != step for other, _, _ in everyone):
            raise LostStep(f"at {label}: another process of this launch is at {[other for other, _, _ in everyone]}")
        for rank, (_, _, error) in enumerate(everyone):
            if error is not None:
                raise problem if rank == self.rank else error
        return [value for _, value, _ in everyone]

    def agree(self, label: str, compute: Callable[[], T]) -> T:
        """What `compute` gives here, which stays here, once it has succeeded in every process; as `together` else."""
        own: list[T] = []
        self.together(label, lambda: own.append(compute()))
        return own[0]


def _portable(error: Exception, rank: int) -> Exception:
    """The exception as another process can raise it, with a note that says where it came from."""
    note = f"in process {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(note)
    return copy
