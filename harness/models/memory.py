"""Recognise errors that say that memory ran out, release memory that is not in use, and divide what is free."""

from __future__ import annotations

import gc

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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that host or device memory ran out.

    The text is read, too, because torch's allocator for the CPU and the libraries of a GPU raise a plain RuntimeError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def release_memory() -> None:
    """Collect garbage and give the device memory that torch keeps in its cache back to the system."""
    gc.collect()
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
