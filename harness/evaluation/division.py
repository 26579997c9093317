"""Divide one scoring pass among the processes of a launch: each scores some batches, and all get every answer."""

from __future__ import annotations

import itertools
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class LostStep(Exception):
    """A process of the launch has ended, or is not at the same step as the others.

    Nothing that the processes exchange after that can be trusted.
    """


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Division:
    """The place of this process among `n` processes that measure the same cells in the same order.

    rank: the number of this process, counted from 0. gather: a function that takes a value of this process, waits for
    all processes, and returns their values in the order of their ranks. The values must pickle.
    """

    rank: int = 0
    n: int = 1
    gather: Callable[[Any], list[Any]] = _alone
    _steps: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def own(self, n_batches: int, before: int = 0) -> range:
        """Return the indices of the batches that this process scores.

        Batches are sorted by length. Neighbours go to different processes, so that all have about as much to do.
        before: the number of batches that were dealt out before these, after which the deal goes on.
        """
        return range((self.rank - before) % self.n, n_batches, self.n)

    def together(self, label: str, compute: Callable[[], T]) -> list[T]:
        """Call `compute` in every process, and return the results of all in the order of their ranks.

        label: names what is computed, so that processes notice if they are not at the same step. If `compute` raises an
        exception in some processes, the exception of the lowest rank is raised in all, so that all continue in the same
        way. Raises LostStep.
        """
        if self.n == 1:
            return [compute()]
        found: T | None = None
        problem: Exception | None = None
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
        for rank, (_, _, theirs) in enumerate(everyone):
            if theirs is not None:
                raise problem if rank == self.rank and problem is not None else theirs
        return [value for _, value, _ in everyone]

    def agree(self, label: str, compute: Callable[[], T]) -> T:
        """Call `compute` in every process, and return the result of this one if all have succeeded.

        The result need not pickle. Otherwise as `together`.
        """
        own: list[T] = []
        self.together(label, lambda: own.append(compute()))
        return own[0]


def _portable(error: Exception, rank: int) -> Exception:
    """Return a copy of an exception that another process can raise.

    It has the traceback of this process as a note, or in Python 3.10 as its cause.
    """
    note = f"in process {rank}:\n{''.join(traceback.format_exception(error))}"
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    if sys.version_info >= (3, 11):
        copy.add_note(note)
    else:  # exceptions have no notes there
        copy.__cause__ = RuntimeError(note)
    return copy
