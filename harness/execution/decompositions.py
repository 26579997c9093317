"""One exact decomposition per matrix: in memory while the budget lasts, and on disk for the next process.

The disk cache is keyed by the content of the matrix, so a renamed, copied or re-downloaded model finds it, and a
fine-tuned one does not. A file appears complete or not at all, is verified when it is read, and the least recently
used ones make room. Any number of processes may share the folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.cache import user_cache
from harness.config import RuntimeConfig
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.spectral.decomposition import DECOMPOSITION_VERSION, Decomposition, decompose, decompose_many

LOG = logging.getLogger(__name__)
SUFFIX = ".safetensors"
BATCH_BYTES = 2**28  # of float64 matrices that are decomposed together
ABANDONED_SECONDS = 24 * 3600.0  # a temporary file of that age has lost its writer


@dataclass(frozen=True)
class DiskCache:
    """A folder of decompositions that is kept below `budget_bytes`."""

    folder: Path
    budget_bytes: int


def disk_cache(runtime: RuntimeConfig) -> DiskCache | None:
    """The cache that the settings ask for; None where runtime.cache_gib is 0."""
    if not runtime.cache_gib:
        return None
    folder = user_cache("decompositions") if runtime.cache_dir is None else Path(runtime.cache_dir).expanduser()
    return DiskCache(folder, int(runtime.cache_gib * 2**30))


def _bytes(tensor: Tensor):
    """The tensor's content as a buffer."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def content_key(weight: Tensor) -> str:
    """128 bits of xxh3 over all that a decomposition depends on: the bytes of weight [out, in], its shape and dtype,
    the type of its device (they round differently) and the version of the method."""
    from xxhash import xxh3_128

    about = (tuple(weight.shape), str(weight.dtype), weight.device.type, DECOMPOSITION_VERSION)
    digest = xxh3_128(repr(about).encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def _checksum(about: dict, sigma: Tensor, vectors: Tensor) -> str:
    from xxhash import xxh3_128

    digest = xxh3_128(json.dumps(about, sort_keys=True).encode())
    digest.update(_bytes(sigma))
    digest.update(_bytes(vectors))
    return digest.hexdigest()


def read_cached(cache: DiskCache, key: str, device: torch.device) -> Decomposition | None:
    """The decomposition stored under `key`, on `device`; None where there is none. A damaged file is removed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = cache.folder / f"{key}{SUFFIX}"
    try:
        # Not a memory map: on a network file system another node may remove the file while it is read.
        content = load(path.read_bytes())
        about = json.loads(bytes(content["about"].numpy()))
        checksum = about.pop("checksum")
        sigma, vectors = content["sigma"], content["vectors"]
        if about.pop("key") != key or _checksum(about, sigma, vectors) != checksum:
            raise ValueError("its checksum does not match")
        os.utime(path)  # the age by which the least recently used is told
        return Decomposition(
            sigma.to(device), vectors.to(device), about["side"], tuple(about["shape"]), about["method"],
            about["reconstruction_error"], about["orthogonality_error"],
        )
    except FileNotFoundError:
        return None
    except OSError as error:  # another user's file, a network that fails: nothing to do with its content
        LOG.warning("runtime.cache_dir: cannot read %s (%s)", path, error)
        return None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        LOG.warning("%s is damaged (%s): computed anew", path, error)
        _remove(path)
        return None


def store(cache: DiskCache, key: str, decomposition: Decomposition) -> int:
    """Write a decomposition under `key`; returns the bytes written. A cache that cannot be written is only warned
    about, and what is larger than all of it is left out."""
    from safetensors.torch import save

    if size_of(decomposition) > cache.budget_bytes:
        return 0
    sigma, vectors = decomposition.sigma.cpu(), decomposition.vectors.cpu()
    about = {name: getattr(decomposition, name)
             for name in ("side", "shape", "method", "reconstruction_error", "orthogonality_error")}
    about["shape"] = list(about["shape"])
    text = json.dumps({**about, "key": key, "checksum": _checksum(about, sigma, vectors)}).encode()
    content = {"sigma": sigma, "vectors": vectors, "about": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    temporary = cache.folder / f".{key}.{os.getpid()}"
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        written = temporary.write_bytes(save(content))  # safetensors' own writer shuts out other users of the folder
        temporary.replace(cache.folder / f"{key}{SUFFIX}")
        return written
    except OSError as error:
        LOG.warning("runtime.cache_dir: cannot write to %s (%s)", cache.folder, error)
        _remove(temporary)
        return 0


def make_room(cache: DiskCache) -> None:
    """Remove the least recently used files until the rest fits, and temporary files whose writer is gone."""
    kept = []
    for entry in os.scandir(cache.folder) if cache.folder.is_dir() else ():
        try:
            status = entry.stat()
        except FileNotFoundError:  # another process was faster
            continue
        if entry.name.endswith(SUFFIX):
            kept.append((status.st_mtime_ns, status.st_size, entry.path))
        elif entry.name.startswith(".") and status.st_mtime < time.time() - ABANDONED_SECONDS:
            _remove(Path(entry.path))
    excess = sum(size for _, size, _ in kept) - cache.budget_bytes
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        _remove(Path(path))
        excess -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOG.warning("runtime.cache_dir: cannot remove %s (%s)", path, error)


def size_of(decomposition: Decomposition) -> int:
    """Bytes of its values and vectors."""
    return decomposition.vectors.nbytes + decomposition.sigma.nbytes


class DecompositionCache:
    """matrix -> its Decomposition, on the matrix's device. Kept in memory up to `budget_bytes`, the least recently used
    given up first, and on `disk` where there is one. At a new matrix the model must hold its unedited weights, there
    and in the experts that follow it."""

    def __init__(self, loaded: LoadedModel, budget_bytes: int, disk: DiskCache | None = None) -> None:
        self._loaded, self._budget, self._bytes, self._disk = loaded, budget_bytes, 0, disk
        self._kept: OrderedDict[str, Decomposition] = OrderedDict()
        self._written = math.inf  # since the folder was last gone through

    def __call__(self, matrix: Matrix) -> Decomposition:
        if matrix.name not in self._kept:
            self._fetch(matrix)
        self._kept.move_to_end(matrix.name)
        self._give_up()
        return self._kept[matrix.name]

    def _fetch(self, matrix: Matrix) -> None:
        weight = matrix.read(self._loaded.model)
        key = content_key(weight) if self._disk else None
        if self._disk and (found := read_cached(self._disk, key, weight.device)):
            self._keep(matrix, found)
            return
        # The experts of a parameter are always targets together, and small: one batched call.
        group = [matrix, *self._siblings(matrix)]
        weights = [weight, *(other.read(self._loaded.model) for other in group[1:])]
        results = decompose_many(torch.stack(weights)) if len(group) > 1 else [decompose(weight)]
        for member, own, result in zip(group, weights, results):
            if self._disk:
                self._written += store(self._disk, key if member is matrix else content_key(own), result)
            self._keep(member, result)
        if self._disk and self._written > self._disk.budget_bytes / 64:  # thousands of experts: not at every file
            make_room(self._disk)
            self._written = 0

    def _siblings(self, matrix: Matrix) -> Iterable[Matrix]:
        """The experts that follow this one in its parameter, not yet at hand, as many as a batch takes."""
        out, width = matrix.shape
        each = 8 * max(out * width, min(out, width) ** 2)
        most = min(BATCH_BYTES, self._budget) // each - 1
        if matrix.expert is None or most < 1:
            return []
        following = [
            other for other in self._loaded.matrices
            if other.parameter == matrix.parameter and other.layer_type == matrix.layer_type
            and other.expert > matrix.expert and other.name not in self._kept
        ]
        return following[:most]

    def _keep(self, matrix: Matrix, decomposition: Decomposition) -> None:
        self._kept[matrix.name] = decomposition
        self._bytes += size_of(decomposition)

    def _give_up(self) -> None:
        while self._bytes > self._budget and len(self._kept) > 1:
            self._bytes -= size_of(self._kept.popitem(last=False)[1])
