"""Start quickly: the collector of cyclic garbage rests while libraries are imported, which make millions of objects."""

from __future__ import annotations

import gc

_resting = False


def rest() -> None:
    """Let the collector rest until `wake`. Nothing happens if the caller has switched it off."""
    global _resting
    if gc.isenabled():
        gc.disable()
        _resting = True


def wake() -> None:
    """Let the collector work again. Nothing happens if it does not rest because of `rest`."""
    global _resting
    if _resting:
        gc.enable()
        _resting = False
