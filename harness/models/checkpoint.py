"""The weight files of a checkpoint: which files they are, what is in them, and their tensors.

A plan computes the identity of a model from the bytes of its files. The weights are loaded later, perhaps from a file
that somebody has overwritten meanwhile. Therefore each tensor is read into memory of its own, and the digest of what
was read must be the one that the plan has seen. What happens to the file afterwards does not matter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from harness.errors import InputError
from harness.files import hash_file, replacing, user_cache

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
CHUNK = 1 << 24  # bytes that are read and hashed at once
REMEMBERED_FROM = 1 << 28  # bytes; reading a smaller file again takes too little time to remember its digests
# A file may change twice within one tick of its file system's clock, so the digests of a newer file are not remembered.
SETTLED_SECONDS = 10
ATTEMPTS = 3  # how often a file is read again that changes while it is hashed

# The names that the format has for dtypes: https://huggingface.co/docs/safetensors
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    dtype: a key of DTYPES. begin, end: its bytes in the file. digest: XXH3 of these bytes, 128 bits in hexadecimal.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    digest: str = ""


@dataclass(frozen=True)
class WeightFile:
    """A file as it was when it was hashed.

    digest: SHA-256 of the whole file, in hexadecimal. tensors: name -> tensor of a safetensors file; empty for a GGUF
    file.
    """

    path: Path
    digest: str
    tensors: Mapping[str, StoredTensor]


def require_regular(path: Path) -> None:
    """Raise InputError if a path is a FIFO, a device or a folder, because reading it might never end.

    Raises OSError if there is no such file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"model.name: {path} is not a regular file; put the file itself in its place")


def find_weights(fetch: Callable[[str], Path | None], where: str, config: Any = None) -> list[Path]:
    """Return the paths of the safetensors files that hold a model's weights, in the order in which they are read.

    These are the files that `from_pretrained` of transformers opens: the one that config.json names
    (`transformers_weights`), else model.safetensors, else every file that the index names.
    fetch: a function from a name in the checkpoint to its path, or None if there is no such file. where: the
    checkpoint, for messages. config: the config of transformers. The list is empty if there are no such files. Raises
    InputError for an index that is broken or names a file that is missing or outside of the checkpoint.
    """
    named = getattr(config, "transformers_weights", None)
    for name in [named] if named is not None else [SINGLE_FILE, INDEX_FILE]:
        if not isinstance(name, str) or not _inside(name):
            raise InputError(f"model.name: {where} is damaged: config.json: transformers_weights is {name!r}, which is"
                             " no file of the checkpoint")
        path = fetch(name)
        if path is None:
            continue
        names = _names_of_index(path) if name.endswith(".index.json") else [name]
        # config classes may name further files with weights (the experimental `extra_files` of transformers)
        found = [(one, path if one == name else fetch(one)) for one in names]
        found += [(one, extra) for one in getattr(type(config), "extra_files", ()) if (extra := fetch(one))]
        missing = [one for one, there in found if there is None]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"model.name: {where} is not complete: {path.name} names {missing[0]}{more}, which is not"
                             " there; download it again")
        return [there for _, there in found if there is not None]
    if named is not None:
        raise InputError(f"model.name: {where} holds no file {named!r}, which config.json names as its weights")
    return []


def _names_of_index(path: Path) -> list[str]:
    problem = "it is not a JSON object with a weight_map"
    try:
        require_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        bad = next((name for name in names if not _inside(name) or not name.endswith(".safetensors")), None)
        if names and bad is None:
            return names
        problem = "its weight_map is empty"
        if bad is not None:
            problem = f"it names {bad!r}, which is no safetensors file in its folder"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"model.name: {path} is damaged: {problem}; download it again")


def _inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def weight_file(path: Path) -> WeightFile:
    """Return what is in a safetensors or GGUF file, with digests of all of it.

    The digests of a large file are remembered in the user's cache folder. They are used again as long as the file's
    size, inode and times of change stay the same. Raises InputError for a file that is damaged, is no regular file, or
    is being written, and OSError if it cannot be read.
    """
    require_regular(path)
    for _ in range(ATTEMPTS):
        with path.open("rb") as file:
            before = _state(file)
            remembered = user_cache("digests") / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
            if before[0] >= REMEMBERED_FROM and (known := _recall(remembered, path, before)) is not None:
                return known
            found = _hash(path, file, before[0])
            if _state(file) != before:
                continue
        if before[0] >= REMEMBERED_FROM and time.time() - max(before[3:]) / 1e9 > SETTLED_SECONDS:
            _remember(remembered, found, before)
        return found
    raise InputError(f"model.name: {path} is being written; wait until it is complete")


def _state(file: BufferedReader) -> list[int]:
    found = os.fstat(file.fileno())
    return [found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _recall(remembered: Path, path: Path, state: list[int]) -> WeightFile | None:
    try:
        there = json.loads(remembered.read_text())
        if there["state"] != state:
            return None
        tensors = there["tensors"].items()
        stored = {name: StoredTensor(**{**one, "shape": tuple(one["shape"])}) for name, one in tensors}
        return WeightFile(path, str(there["digest"]), stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(remembered: Path, found: WeightFile, state: list[int]) -> None:
    tensors = {name: asdict(one) for name, one in found.tensors.items()}
    try:
        with replacing(remembered, durable=False) as temporary:
            what = {"path": str(found.path), "state": state, "digest": found.digest, "tensors": tensors}
            temporary.write_text(json.dumps(what))
    except OSError:
        pass  # the digests are then computed again next time


def _hash(path: Path, file: BufferedReader, size: int) -> WeightFile:
    """Read a file once, from its beginning to its end, and return it with all digests."""
    if path.suffix == ".gguf":
        return WeightFile(path, hash_file(file, hashlib.sha256()), {})
    start, tensors = _read_header(path, file, size)
    whole, found = hashlib.sha256(start), {}
    buffer = memoryview(bytearray(CHUNK))
    for name, tensor in tensors:
        of_tensor, left = xxh3_128(), tensor.end - tensor.begin
        while left:
            n = file.readinto(buffer[: min(left, CHUNK)])
            if not n:
                raise _damaged(path, "it ends too early")
            whole.update(buffer[:n])
            of_tensor.update(buffer[:n])
            left -= n
        found[name] = StoredTensor(tensor.dtype, tensor.shape, tensor.begin, tensor.end, of_tensor.hexdigest())
    return WeightFile(path, whole.hexdigest(), found)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"model.name: cannot read {path} as safetensors: {reason}; download it again")


def _read_header(path: Path, file: BufferedReader, size: int) -> tuple[bytes, list[tuple[str, StoredTensor]]]:
    """Return the first bytes of a file up to its first tensor, and its tensors in the order of their bytes.

    Raises InputError if the tensors do not fill the file exactly, as the format demands.
    """
    length = file.read(8)
    n = int.from_bytes(length, "little")
    if len(length) < 8:
        raise _damaged(path, f"it has only {size} bytes")
    if n > min(MAX_HEADER, size - 8):
        raise _damaged(path, f"its header would have {n} bytes, and the whole file has {size}")
    header = file.read(n)
    try:
        content = json.loads(header)
        content.pop("__metadata__", None)
        tensors = sorted(((name, _stored(one, 8 + n)) for name, one in content.items()), key=lambda t: t[1].begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header describes no tensors") from error
    at = 8 + n
    for name, tensor in tensors:
        if tensor.begin != at or tensor.end < at:
            raise _damaged(path, f"its header describes bytes of {name!r} that are not there or belong to others")
        at = tensor.end
    if at != size:
        raise _damaged(path, f"it has {size} bytes, and its header describes {at}")
    return length + header, tensors


def _stored(one: Mapping[str, Any], start: int) -> StoredTensor:
    begin, end = one["data_offsets"]
    shape, dtype = tuple(one["shape"]), one["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("not a size")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise ValueError("not the bytes of this shape")
    return StoredTensor(dtype, shape, start + begin, start + end)


def read_tensor(file: WeightFile, name: str) -> Tensor:
    """Return one tensor of a file on the CPU, in its dtype there, in memory of its own.

    Raises InputError if its bytes are not those that were hashed.
    """
    with file.path.open("rb") as opened:
        return _read(opened, file, name)


def read_state(files: Sequence[WeightFile]) -> dict[str, Tensor]:
    """Return all tensors of some files by name, as `read_tensor` does. A later file wins over an earlier one."""
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with file.path.open("rb") as opened:
                state.update((name, _read(opened, file, name)) for name in file.tensors)
        except OSError as error:
            raise InputError(f"model.name: cannot read {file.path}: {error.strerror}") from error
    return state


def _read(opened: BufferedReader, file: WeightFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    content, dtype = bytearray(tensor.end - tensor.begin), DTYPES[tensor.dtype]
    opened.seek(tensor.begin)
    view, n = memoryview(content), 1
    while view and n:  # one call reads at most 2 GiB
        n = opened.readinto(view)
        view = view[n:]
    if view or xxh3_128(content).hexdigest() != tensor.digest:
        raise _changed(file.path)
    if not content:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(tensor.shape)


def private_copy(file: WeightFile) -> Any:
    """Return a temporary file with the content of a file, which is deleted when it is closed or no longer referred to.

    A reader of GGUF files maps the file into memory, so that it would see every later change of the original. Raises
    InputError if the content is not what was hashed, or if there is no room for the copy.
    """
    copy = tempfile.NamedTemporaryFile(prefix="harness-", suffix=file.path.suffix)  # noqa: SIM115  # the caller keeps it
    found = hashlib.sha256()
    try:
        with file.path.open("rb") as opened:
            while chunk := opened.read(CHUNK):
                found.update(chunk)
                copy.write(chunk)
        copy.flush()
    except OSError as error:
        raise InputError(
            f"model.gguf_file: cannot copy {file.path} to {tempfile.gettempdir()} ({error.strerror}); make room there,"
            " or set TMPDIR to a folder with room"
        ) from error
    if found.hexdigest() != file.digest:
        raise _changed(file.path)
    return copy


def _changed(path: Path) -> InputError:
    return InputError(
        f"model.name: {path} has changed since the run was planned; leave the weights as they are, and start again"
    )


def refuse_unscaled(files: Sequence[WeightFile], config: Any) -> None:
    """Raise InputError if weights are stored in a quantised type and the config does not say how to read them.

    Their numbers would be taken for weights, without the scales that belong to them.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    for file in files:
        for name, tensor in file.tensors.items():
            if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.dtype not in WEIGHT_DTYPES:
                raise InputError(
                    f"model.name: {file.path} holds {name} as {tensor.dtype}, and config.json has no"
                    " quantization_config that gives its scale; use weights in float32, bfloat16 or float16"
                )
