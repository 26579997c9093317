"""Recognise errors that say that memory ran out, and release memory that is not in use."""

from __future__ import annotations

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that host or device memory ran out.

    The text is read, too, because torch's allocator for the CPU raises a plain RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def release_memory() -> None:
    """Collect garbage and give the device memory that torch keeps in its cache back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
