"""Write files and folders that appear complete or not at all, and find the user's cache folder."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk (fsync). Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all. Raises OSError.

    A value of a type that JSON does not have is written as its text.
    """
    write_text(path, json.dumps(value, separators=(",", ":"), default=str))
