"""Keep freed memory for the next pass, recognise that memory ran out, release what is not in use, divide what is free.

glibc gives memory back to the system when a large block is freed, or when the end of its heap is free. The next tensor
of that size is then made of new pages, each of which the system must find and fill with zeros when it is first written.
A forward pass frees its activations as it goes, so that every pass pays for this again. How much depends on what
happens to lie at the end of the heap, and so differs between processes that do the same work (experiments/scaling).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What the allocators say, and the libraries of a GPU that allocate for themselves. The last is what cuBLAS says if it
# cannot even allocate its handle.
_WORDS = (
    "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",
)  # fmt: skip
DECOMPOSITIONS_ON_CPU = 4 * 2**30  # bytes
SHARE_FOR_DECOMPOSITIONS = 0.5  # of the memory of a GPU that is free beside the model and the stream
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of parameters in glibc's malloc.h
_NEVER = -1
_LARGEST_KEPT = 2**30  # bytes; larger blocks, such as the weights of large models, are still given back when freed
_USUAL_MMAP, _USUAL_TRIM = 32 * 2**20, 64 * 2**20  # what glibc's own rule leads to once blocks of that size were freed


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that host or device memory ran out.

    The text is read, too, because torch's allocator for the CPU and the libraries of a GPU raise a plain RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let the C library keep what the CPU's tensors free, for the time of the context; no number changes.

    At the end everything that is free goes back to the system. Nothing happens with another C library than glibc.
    """
    kept = _set(_MMAP_THRESHOLD, _LARGEST_KEPT) and _set(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        if kept:
            _set(_MMAP_THRESHOLD, _USUAL_MMAP)
            _set(_TRIM_THRESHOLD, _USUAL_TRIM)
            _give_back()


def _set(parameter: int, value: int) -> bool:
    """Set a parameter of the C library's allocator, and return whether it took it."""
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError, TypeError):  # not glibc
        return False


def _give_back() -> None:
    """Give the memory that the C library holds and nothing uses back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    except (AttributeError, OSError, TypeError):  # not glibc
        pass


def release_memory() -> None:
    """Collect garbage, and give memory that is not in use back to the system: the device's and the host's."""
    gc.collect()
    _give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def decomposition_bytes(gib: float | None, device: torch.device, stream: float = 0.0) -> int:
    """Return the bytes of memory for decompositions.

    gib: the setting in GiB. If it is None, these are DECOMPOSITIONS_ON_CPU, or on a CUDA device, where the model is
    loaded already, a share of what is free now. stream: the bytes that the stream at the frontier will take of that.
    """
    if gib is not None:
        return int(gib * 2**30)
    if device.type != "cuda":
        return DECOMPOSITIONS_ON_CPU
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE_FOR_DECOMPOSITIONS * max(0.0, free - stream))
