"""Write files and folders that appear complete or not at all, and find the user's cache folder."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from harness.errors import InputError

# number of an error of the system -> what the user can do
_REMEDIES = {
    errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room within the quota",
    errno.EROFS: "the file system is read-only: copy the folder to another", errno.EACCES: "give yourself access to it",
    errno.EPERM: "give yourself access to it", errno.ENOTDIR: "a folder must be there: move away what is in its place",
    errno.EEXIST: "a folder must be there: move away what is in its place",
    errno.EISDIR: "a file must be there: move the folder away", errno.ENOTEMPTY: "move away what is there",
}  # fmt: skip


def hash_file(file: BinaryIO, into: Any) -> str:
    """Feed the rest of a file to a hash of hashlib, and return its digest in hexadecimal. Raises OSError.

    It is what hashlib.file_digest of Python 3.11 does.
    """
    buffer = memoryview(bytearray(1 << 18))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        into.update(buffer[:count])
    return str(into.hexdigest())


def user_cache(name: str = "") -> Path:
    """Return the folder spectral-harness/<name> in $XDG_CACHE_HOME or ~/.cache, which this does not create."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral-harness" / name


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; the file that the block writes there is then renamed to `path`.

    If the block raises, `path` is as before and the temporary file is removed. Missing folders above `path` are
    created. durable: write the content to the disk (fsync) before the rename, so that a power failure cannot leave an
    empty file under the name. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to `path` when the block ends.

    If the block raises, the temporary folder is removed. `path` may be an empty folder. Raises OSError, also if `path`
    is not empty when the block ends.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


ABANDONED_SECONDS = 24 * 3600.0  # the process that wrote a temporary file of this age has ended


def make_room(
    folder: Path, budget_bytes: float, suffix: str = "", remove: Callable[[Path], object] | None = None
) -> None:
    """Remove the least recently used files of a cache until the rest fits, and temporary files that are abandoned.

    suffix: how the names of the cache's files end; names that begin with a dot are temporary files. remove: what
    removes a file, which another process may remove meanwhile. Raises OSError if a file cannot be removed and `remove`
    is None.
    """
    kept, abandoned = [], []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        try:
            status = entry.stat()
        except FileNotFoundError:  # another process has removed it
            continue
        if entry.name.startswith("."):
            if status.st_mtime < time.time() - ABANDONED_SECONDS:
                abandoned.append(Path(entry.path))
        elif entry.name.endswith(suffix):
            kept.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
    excess = sum(size for _, size, _ in kept) - budget_bytes
    for _, size, path in sorted(kept):
        if excess <= 0:
            break
        abandoned.append(path)
        excess -= size
    for path in abandoned:
        if remove is None:
            path.unlink(missing_ok=True)
        else:
            remove(path)


@contextmanager
def told_in_one_line(folder: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError of the block, such as one of a full disk, into an InputError that names the file.

    folder: what is named if the system names no file.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except OSError as error:
        raise InputError(describe_os_error(error, folder)) from error


def describe_os_error(error: OSError, folder: str | os.PathLike) -> str:
    """Return what went wrong with which file, and what the user can do. folder: where, if the system names no file."""
    where = error.filename if isinstance(error.filename, (str, os.PathLike)) else folder
    remedy = _REMEDIES.get(error.errno or 0, "see whether it can be read and written")
    return f"{os.fspath(where)}: {error.strerror or error}; {remedy}"


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk (fsync). Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write a file and wait until its content is on the disk (fsync). Raises OSError."""
    with open(path, "wb", buffering=0) as file:
        left = memoryview(content)
        while len(left):
            left = left[file.write(left) or 0 :]
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all. Raises OSError.

    A value of a type that JSON does not have is written as its text.
    """
    write_text(path, json.dumps(value, separators=(",", ":"), default=str))
