"""Start quickly: the collector of cyclic garbage rests while libraries are imported, which make millions of objects."""

from __future__ import annotations

import gc

_resting = False
_keeps = False


def rest(keep: bool = False) -> None:
    """Let the collector rest until `wake`. Nothing happens if the caller has switched it off.

    keep: the process ends with the command, so that the collector never looks again at what there is when it wakes.
    """
    global _resting, _keeps
    if gc.isenabled():
        gc.disable()
        _resting, _keeps = True, keep


def wake() -> None:
    """Let the collector work again. Nothing happens if it does not rest because of `rest`."""
    global _resting
    if _resting:
        if _keeps:
            gc.freeze()
        gc.enable()
        _resting = False
