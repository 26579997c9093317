"""The progress of a run: a bar in a terminal, and elsewhere, as in the log of a job, a plain line every 30 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

SECONDS = 30.0  # between two lines where there is no terminal


class Progress:
    """The progress over a number of units, shown on the standard error.

    unit: the name of what is counted. shown: whether anything is shown. clock: seconds of a clock that never goes back.
    """

    def __init__(self, total: int, unit: str = "unit", shown: bool = True,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.unit, self.done, self.text = total, unit, 0, ""
        self._clock, self._bar = clock, None
        self._plain = shown and not sys.stderr.isatty()
        self._started = self._said = clock()
        if shown and not self._plain:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._bar is not None:
            self._bar.close()

    def describe(self, text: str) -> None:
        """Say what is measured at present."""
        self.text = text
        if self._bar is not None:
            self._bar.set_description(text[:48].ljust(48))
        self._line()

    def update(self, n: int = 1, **more: Any) -> None:
        """Count `n` further units as done. more: what else is shown beside the count."""
        self.done += n
        if self._bar is not None:
            self._bar.set_postfix(more, refresh=False)
            self._bar.update(n)
        self._line()

    def _line(self) -> None:
        now = self._clock()
        if not self._plain or now - self._said < SECONDS:
            return
        self._said = now
        taken = now - self._started
        left = f", about {_duration(taken * (self.total - self.done) / self.done)} left" if self.done else ""
        at = f": {self.text}" if self.text else ""
        line = f"{self.done} of {self.total} {self.unit}s after {_duration(taken)}{left}{at}"
        print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
