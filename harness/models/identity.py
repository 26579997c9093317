"""The identity of a model, which goes into the ids of cells, and the settings with which it generates text."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import InputError
from harness.files import replacing, user_cache
from harness.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from harness.models.loading import ModelDescription

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")
REMEMBERED_FROM = 1 << 28  # bytes; reading a smaller file again takes too little time to remember its digest
# A file may change twice within one tick of its file system's clock, so the digest of a newer file is not remembered.
SETTLED_SECONDS = 10


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    The digest of a large file is remembered in the user's cache folder. It is used again as long as the file's size,
    inode and times of change stay the same. Raises OSError if the file cannot be read.
    """
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
    try:
        with replacing(path, durable=False) as temporary:
            temporary.write_text(json.dumps(what))
    except OSError:
        pass  # the digest is then computed again next time


def _weight_files(folder: Path, gguf_file: str | None) -> list[Path]:
    if gguf_file:
        return [folder / gguf_file]
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(folder.glob(f"*{suffix}"))
        if files:
            return files
    return []


def local_identity(folder: Path, settings: ModelSettings) -> dict[str, Any]:
    """Return the identity of a model in a local folder: a digest of the bytes of its weights and its configuration.

    Raises InputError if the folder holds no weights, or not the GGUF file of the settings.
    """
    files = _weight_files(folder, settings.gguf_file)
    if settings.gguf_file and not files[0].is_file():
        there = sorted(path.name for path in folder.glob("*.gguf"))
        raise InputError(
            f"model.gguf_file: no file {settings.gguf_file!r} in {folder}; GGUF files there:"
            f" {', '.join(there) or 'none'}"
        )
    if not files:
        raise InputError(f"model.name: the folder {folder} holds no weights (*.safetensors, or set model.gguf_file)")
    config_file = folder / "config.json"
    digests = [file_digest(path) for path in files] + ([file_digest(config_file)] if config_file.is_file() else [])
    return {"digest": hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()}


def hub_identity(settings: ModelSettings) -> dict[str, Any]:
    """Return the identity of a model on the hub: its name and the commit that the revision stands for now.

    The commit is needed because a branch may hold other weights tomorrow. Raises OSError if the model is neither
    reachable nor in the local cache.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    file = cached_file(settings.name, settings.gguf_file or "config.json", revision=settings.revision)
    commit = extract_commit_hash(file, None)
    return {"name": settings.name, "revision": commit or settings.revision or "main", "gguf_file": settings.gguf_file}


def generation_settings(settings: ModelSettings, description: ModelDescription) -> GenerationConfig | None:
    """Return the settings with which transformers lets a model generate text, or None if it does not generate.

    They are those of generation_config.json or, without this file, those that transformers derives from config.json.
    No weights are read. Raises InputError if the settings are not valid.
    """
    if description.source == "recall" or description.family.kind not in ("causal", "seq2seq"):
        return None
    from transformers import GenerationConfig

    if settings.gguf_file:  # for which transformers reads no other file
        return GenerationConfig.from_model_config(description.config)
    revision = description.revision or "main"
    try:
        try:
            return GenerationConfig.from_pretrained(description.source, revision=revision)
        except OSError:
            return GenerationConfig.from_pretrained(
                description.source, config_file_name="config.json", revision=revision, _from_model_config=True
            )
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model.name: generation_config.json of {settings.name!r} is not valid: {reason}; correct the file"
        ) from error


def generation_values(found: GenerationConfig | None) -> dict[str, Any]:
    """Return the settings that differ from the defaults of transformers, as plain values; none for None."""
    return {} if found is None else json.loads(found.to_json_string(ignore_metadata=True))


def module_identity(model: torch.nn.Module) -> dict[str, Any]:
    """Return the identity of a module in memory: a digest of its parameters and buffers, and of its config if any.

    The digest covers every byte of these tensors, and their names, shapes and dtypes.
    """
    from xxhash import xxh3_128

    config: Any = getattr(model, "config", None)
    found = xxh3_128(type(model).__name__.encode())
    found.update(config.to_json_string(use_diff=False).encode() if hasattr(config, "to_json_string") else b"")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content = tensor.detach().cpu().contiguous()
        found.update(content.view(-1).view(torch.uint8).numpy().data if content.numel() else b"")
    return {"digest": found.hexdigest()}
