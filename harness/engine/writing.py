"""Write the rows of units in a thread of its own, so that the next unit is measured while the disk is waited for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
WAITING = 4  # units; more would be measured again after a kill, and would not be faster


class Writer(Generic[T]):
    """A thread that calls `write` with each value, in the order in which the values are put.

    At most `waiting` values are waiting; then `put` waits, too. After a failure nothing more is written, and the next
    `put`, or `close`, raises the error. As a context it is closed at the end, and what was put is written even if the
    block raises.
    """

    def __init__(self, write: Callable[[T], None], waiting: int = WAITING) -> None:
        self._write, self._error = write, None  # type: tuple[Callable[[T], None], BaseException | None]
        self._queue: queue.Queue[tuple[T] | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def put(self, value: T) -> None:
        """Hand over one value. Raises the error of an earlier one."""
        self._complain()
        self._queue.put((value,))

    def close(self) -> None:
        """Wait until everything is written. Raises the error of a value that was not."""
        self._finish()
        self._complain()

    def __enter__(self) -> Writer[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish()
        if error is None:
            self._complain()

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _complain(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(item[0])
                except BaseException as error:  # it is raised where the next value is put
                    self._error = error
