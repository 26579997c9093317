"""The cache of decompositions: in memory within a budget, and on disk for later processes.

The key of the disk cache is the content of the matrix. A renamed, copied or re-downloaded model therefore finds its
decompositions, and a fine-tuned one does not find those of the original. A file appears complete or not at all, and its
content is verified when it is read. When the folder is full, the least recently used files are removed. Any number of
processes may share the folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.files import make_room as make_room_in
from harness.files import replacing, user_cache
from harness.models.cost import n_experts
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.treatment import Calibrated
from harness.spectral.activations import METRIC_VERSION, decompose_in_metric
from harness.spectral.decomposition import DECOMPOSITION_VERSION, Decomposition, decompose, decompose_many

LOG = logging.getLogger(__name__)
SUFFIX = ".safetensors"
EXPERTS_VERSION = 2  # must be raised when a change of the code changes what experts are decomposed to
BATCH_BYTES = 2**28  # the most bytes of float64 matrices that are decomposed together


@dataclass(frozen=True)
class DiskCache:
    """A folder of decompositions, whose files together take at most `budget_bytes`."""

    folder: Path
    budget_bytes: int


def disk_cache(gib: float, folder: str | None = None) -> DiskCache | None:
    """Return a disk cache of `gib` GiB in `folder`, by default in the user's cache folder; None for 0 GiB."""
    if not gib:
        return None
    path = user_cache("decompositions") if folder is None else Path(folder).expanduser()
    return DiskCache(path, int(gib * 2**30))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a buffer on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def experts_key(config: Any) -> dict[str, int]:
    """Return what an id holds besides if its numbers come from decompositions of a model with experts; else nothing."""
    return {"experts_version": EXPERTS_VERSION} if n_experts(config) > 1 else {}


def content_key(weight: Tensor) -> str:
    """Return a hash, 32 hexadecimal digits of xxh3, over everything on which the decomposition of a weight depends.

    These are the bytes of weight [out, in], its shape and dtype, the type of its device, because devices round
    differently, and DECOMPOSITION_VERSION.
    """
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
    """Return the decomposition that is stored under `key`, with its tensors on `device`; None if there is none.

    A damaged file is removed, with a warning.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = cache.folder / f"{key}{SUFFIX}"
    try:
        # A memory map would not do: on a network file system another node may remove the file while it is read.
        content = load(path.read_bytes())
        about = json.loads(bytes(content["about"].numpy()))
        checksum = about.pop("checksum")
        sigma, vectors = content["sigma"], content["vectors"]
        if about.pop("key") != key or _checksum(about, sigma, vectors) != checksum:
            raise ValueError("its checksum does not match")
        os.utime(path)  # `make_room` removes the files with the oldest time first
        return Decomposition(
            sigma.to(device), vectors.to(device), about["side"], tuple(about["shape"]), about["method"],
            about["reconstruction_error"], about["orthogonality_error"],
        )
    except FileNotFoundError:
        return None
    except OSError as error:  # the file may be another user's, or the network may fail: its content may be intact
        LOG.warning("runtime.cache_dir: cannot read %s (%s)", path, error)
        return None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        LOG.warning("%s is damaged (%s): computed anew", path, error)
        _remove(path)
        return None


def store(cache: DiskCache, key: str, decomposition: Decomposition) -> int:
    """Write a decomposition under `key` and return the number of bytes written.

    If the cache cannot be written there is only a warning. A decomposition that is larger than the whole budget is not
    written. In both cases 0 is returned.
    """
    from safetensors.torch import save

    if size_of(decomposition) > cache.budget_bytes:
        return 0
    sigma, vectors = decomposition.sigma.cpu(), decomposition.vectors.cpu()
    about = {name: getattr(decomposition, name)
             for name in ("side", "shape", "method", "reconstruction_error", "orthogonality_error")}
    about["shape"] = list(about["shape"])
    text = json.dumps({**about, "key": key, "checksum": _checksum(about, sigma, vectors)}).encode()
    content = {"sigma": sigma, "vectors": vectors, "about": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    try:
        with replacing(cache.folder / f"{key}{SUFFIX}", durable=False) as temporary:
            return temporary.write_bytes(save(content))  # safetensors' save_file denies other users access to the file
    except OSError as error:
        LOG.warning("runtime.cache_dir: cannot write to %s (%s)", cache.folder, error)
        return 0


def make_room(cache: DiskCache) -> None:
    """Remove the least recently used files until the rest fits into the budget, and abandoned temporary files."""
    make_room_in(cache.folder, cache.budget_bytes, SUFFIX, _remove)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOG.warning("runtime.cache_dir: cannot remove %s (%s)", path, error)


def size_of(decomposition: Decomposition) -> int:
    """Return the number of bytes of the singular values and vectors."""
    return decomposition.vectors.nbytes + decomposition.sigma.nbytes


class DecompositionCache:
    """A function from a matrix of a model to its Decomposition, on the device of the matrix.

    Decompositions are kept in memory up to `budget_bytes` beside the one that is in use, and on `disk` if it is given.
    The least recently used go first, but for those that are expected again (see `expect`). When a matrix is asked for
    whose decomposition is not at hand, the model must hold the unedited weights of this matrix and of the experts that
    follow it.

    watched: the weights may change between two calls, as those of a module that the caller trains. Each call then
    hashes the bytes of the matrix, and decomposes it again if they have changed.

    calibrated: the inputs of the matrices, in whose metric they are decomposed; None: in that of the weights.

    read: a function from a matrix of the model to the matrix [out, in] that is decomposed in its place; None: itself.
    """

    def __init__(
        self, loaded: LoadedModel, budget_bytes: int, disk: DiskCache | None = None, watched: bool = False,
        calibrated: Calibrated | None = None, read: Callable[[Matrix], Tensor] | None = None,
    ) -> None:
        self._loaded, self._budget, self._bytes, self._disk = loaded, budget_bytes, 0, disk
        self._calibrated = calibrated
        self._read = read or (lambda matrix: matrix.read(loaded.model))
        self._kept: OrderedDict[str, Decomposition] = OrderedDict()
        self._expected: frozenset[str] = frozenset()
        self._keys: dict[str, str] | None = {} if watched else None
        self._written = math.inf  # bytes since the last `make_room`; infinite, so that the first file calls it

    def __call__(self, matrix: Matrix) -> Decomposition:
        if self._keys is not None:
            self._forget_changed(matrix, self._keys)
        if matrix.name not in self._kept:
            self._give_up()  # the one that was in use before, while the next is computed
            self._fetch(matrix)
        self._kept.move_to_end(matrix.name)
        self._give_up(matrix.name)
        return self._kept[matrix.name]

    def expect(self, matrices: Iterable[str]) -> None:
        """Say which matrices, by name, will be asked for one after the other and then again, as those of a target.

        If they do not all fit, those that do are kept: the least recently used ones would be the next to be asked for.
        """
        self._expected = frozenset(matrices)

    def shrink(self) -> None:
        """Give up everything that is kept, and keep half as much from now on, because memory ran out."""
        self._kept.clear()
        self._bytes, self._budget = 0, self._budget // 2

    def _forget_changed(self, matrix: Matrix, keys: dict[str, str]) -> None:
        for one in (matrix, *self._siblings(matrix)):
            key = self._key(one, self._read(one))
            if keys.get(one.name) != key and one.name in self._kept:
                self._bytes -= size_of(self._kept.pop(one.name))
            keys[one.name] = key

    def _fetch(self, matrix: Matrix) -> None:
        weight = self._read(matrix)
        key = self._key(matrix, weight) if self._disk else ""
        if self._disk and (found := read_cached(self._disk, key, weight.device)):
            self._keep(matrix, found)
            return
        # The experts of one parameter are small, and they are always targets together: one batched call is faster.
        group = [matrix, *self._siblings(matrix)]
        weights = [weight, *(self._read(other) for other in group[1:])]
        if self._calibrated is not None:
            results = [decompose_in_metric(weight, self._calibrated.factor(matrix))]
        else:
            results = decompose_many(torch.stack(weights)) if len(group) > 1 else [decompose(weight)]
        for member, own, result in zip(group, weights, results):
            if self._disk:
                self._written += store(self._disk, key if member is matrix else self._key(member, own), result)
            self._keep(member, result)
        # Listing the folder after every file would be slow for thousands of experts.
        if self._disk and self._written > self._disk.budget_bytes / 64:
            make_room(self._disk)
            self._written = 0

    def _key(self, matrix: Matrix, weight: Tensor) -> str:
        """Return a hash of everything on which the decomposition of a matrix depends."""
        key = content_key(weight)
        if self._calibrated is None:
            return key
        from xxhash import xxh3_128

        return xxh3_128(f"{METRIC_VERSION} {key} {self._calibrated.key(matrix)}".encode()).hexdigest()

    def _siblings(self, matrix: Matrix) -> Iterable[Matrix]:
        """Return the experts that follow this one in its parameter and are not yet decomposed, up to one batch."""
        if matrix.expert is None or self._calibrated is not None:
            return []
        out, width = matrix.shape
        small = min(out, width)
        expected = sum(size_of(kept) for name, kept in self._kept.items() if name in self._expected)
        room = max(0, self._budget - expected) // (8 * small * (small + 1))
        most = min(room, min(BATCH_BYTES, self._budget) // (8 * max(out * width, small**2)) - 1)
        if most < 1:
            return []
        following = [
            other for other in self._loaded.matrices
            if other.parameter == matrix.parameter and other.layer_type == matrix.layer_type
            and other.expert is not None and other.expert > matrix.expert and other.name not in self._kept
        ]
        return following[:most]

    def _keep(self, matrix: Matrix, decomposition: Decomposition) -> None:
        self._kept[matrix.name] = decomposition
        self._bytes += size_of(decomposition)

    def _give_up(self, in_use: str | None = None) -> None:
        beside = self._bytes - (0 if in_use is None else size_of(self._kept[in_use]))
        while beside > self._budget:
            others = [name for name in self._kept if name != in_use]
            # of those that are expected again, the latest is the last to be asked for
            name = next((name for name in others if name not in self._expected), others[-1])
            size = size_of(self._kept.pop(name))
            self._bytes, beside = self._bytes - size, beside - size
