"""What a model is, for the ids of cells: it changes whenever a number of its weights does."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from harness.cache import user_cache
from harness.config import ModelConfig
from harness.errors import InputError

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")
# Smaller files are read in less time than a remembered digest is worth.
REMEMBERED_FROM = 1 << 28
# A file may change twice within one tick of its file system's clock.
SETTLED_SECONDS = 10


def file_digest(path: Path) -> str:
    """SHA-256 over all of a file. That of a large one is remembered under the cache folder for as long as the file's
    size, inode and times of change stay the same."""
    before = path.stat()
    if before.st_size < REMEMBERED_FROM:
        return _digest(path)
    remembered = user_cache("digests") / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    state = [before.st_size, before.st_dev, before.st_ino, before.st_mtime_ns, before.st_ctime_ns]
    try:
        there = json.loads(remembered.read_text())
        if there["state"] == state:
            return there["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = _digest(path)
    if time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_SECONDS:
        _remember(remembered, {"path": str(path), "state": state, "digest": digest})
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(path: Path, what: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(what))
        temporary.replace(path)
    except OSError:
        pass  # without a cache it is only slower


def _weight_files(folder: Path, gguf_file: str | None) -> list[Path]:
    if gguf_file:
        return [folder / gguf_file]
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if files:
            return files
    return []


def local_identity(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Of a folder: a digest of every byte of its weights and of its configuration. Raises InputError."""
    files = _weight_files(folder, config.gguf_file)
    if config.gguf_file and not files[0].is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        raise InputError(
            f"model.gguf_file: no file {config.gguf_file!r} in {folder}; GGUF files there: {', '.join(there) or 'none'}"
        )
    if not files:
        raise InputError(f"model.name: the folder {folder} holds no weights (*.safetensors, or set model.gguf_file)")
    config_file = folder / "config.json"
    digests = [file_digest(path) for path in files] + ([file_digest(config_file)] if config_file.is_file() else [])
    return {"digest": hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()}


def hub_identity(config: ModelConfig) -> dict[str, Any]:
    """The commit that a hub name and revision stand for now: a branch may hold other weights tomorrow."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(config.name, config.gguf_file or "config.json", revision=config.revision)
    commit = extract_commit_hash(file, None)
    return {"name": config.name, "revision": commit or config.revision or "main", "gguf_file": config.gguf_file}
