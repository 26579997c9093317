"""The identity of a model, which goes into the ids of cells: it changes whenever a weight of the model changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from harness.errors import InputError, one_line
from harness.files import hash_file
from harness.models.checkpoint import WeightFile, find_weights, require_regular, weight_file
from harness.models.settings import ModelSettings

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises InputError if it is no regular file, and OSError if it cannot be read.
    """
    require_regular(path)
    with path.open("rb") as file:
        return hash_file(file, hashlib.sha256())


def config_digests(folder: Path, settings: ModelSettings) -> list[str]:
    """Return the digests of the files in a local folder that say how its weights are used.

    These are the config and, if the settings trust it, the checkpoint's own code. Raises InputError if a file of the
    folder is a pipe or a device, whose reader might wait for ever.
    """
    for path in folder.iterdir():
        if path.is_fifo() or path.is_socket() or path.is_char_device():
            raise InputError(f"model.name: {path} is not a regular file; put the file itself in its place")
    files = [folder / CONFIG_FILE] if (folder / CONFIG_FILE).exists() else []
    if settings.trust_remote_code:
        files += sorted(folder.rglob("*.py"))
    return [file_digest(path) for path in files]


def local_weights(folder: Path, settings: ModelSettings, config: Any) -> tuple[WeightFile, ...]:
    """Return the weight files of a local folder, hashed.

    config: the config of transformers. Raises InputError if the folder does not hold the weights of the settings, if
    they are damaged, or if it holds an adapter.
    """
    if settings.gguf_file:
        path = folder / settings.gguf_file
        if not path.exists():
            there = sorted(path.name for path in folder.glob("*.gguf"))
            raise InputError(
                f"model.gguf_file: no file {settings.gguf_file!r} in {folder}; GGUF files there:"
                f" {', '.join(there) or 'none'}"
            )
        return (weight_file(path),)
    if (folder / ADAPTER_FILE).exists():
        raise InputError(
            f"model.name: {folder} holds an adapter ({ADAPTER_FILE}), which is not applied here; write"
            f" model.adapter={folder}, and the model that it was trained for as model.name"
        )
    paths = find_weights(lambda name: folder / name if (folder / name).exists() else None, str(folder), config)
    if not paths:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        beside = f"; {pickled.name} may hold code and is not read" if pickled else ""
        raise InputError(
            f"model.name: the folder {folder} holds no weights that can be read (model.safetensors or"
            f" model.safetensors.index.json, or set model.gguf_file){beside}"
        )
    return tuple(weight_file(path) for path in paths)


def hub_weights(settings: ModelSettings, revision: str | None, config: Any) -> tuple[WeightFile, ...]:
    """Return the weight files of a model on the hub, hashed. Files that the local cache lacks are downloaded.

    revision, config: as in ModelDescription. Raises InputError if there are no such files, and if a file of the cache
    is not the one that was downloaded.
    """
    from transformers.utils.hub import cached_file

    def fetch(name: str) -> Path | None:
        found = cached_file(settings.name, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    try:
        if settings.gguf_file:
            path = fetch(settings.gguf_file)
            paths = [] if path is None else [path]
        else:
            paths = find_weights(fetch, settings.name, config)
        files = tuple(weight_file(path) for path in paths)
    except OSError as error:
        raise InputError(f"model.name: cannot read the weights of {settings.name!r}: {one_line(error)}") from error
    if not files:
        raise InputError(f"model.name: {settings.name!r} has no weights in safetensors; use another revision or a"
                         " checkpoint that was converted")
    for file in files:
        # The cache of huggingface_hub names a large file by its SHA-256.
        blob = file.path.resolve().name
        if len(blob) == 64 and blob != file.digest:
            raise InputError(f"model.name: {file.path.resolve()} is damaged; delete it, so that it is downloaded again")
    return files


def local_identity(files: Sequence[WeightFile], configs: Sequence[str]) -> dict[str, Any]:
    """Return the identity of a model in a local folder: a digest of the bytes of its weights and its configuration.

    files: as `local_weights` returns them. configs: as `config_digests` returns them.
    """
    digests = [*(file.digest for file in files), *configs]
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


def with_adapter(identity: dict[str, Any], adapter: str) -> dict[str, Any]:
    """Return the identity of a model into which an adapter was merged. adapter: the digest of the adapter's files."""
    both = json.dumps([identity, adapter], sort_keys=True)
    return {**identity, "digest": hashlib.blake2b(both.encode(), digest_size=16).hexdigest()}


def module_identity(model: torch.nn.Module) -> dict[str, Any]:
    """Return the identity of a module in memory: a digest of its parameters and buffers, and of its config if any.

    The digest covers every byte of these tensors, and their names, shapes and dtypes. A tensor that is not in memory
    (on the device "meta") counts with its name only.
    """
    config: Any = getattr(model, "config", None)
    head = type(model).__name__
    if hasattr(config, "to_json_string"):
        head += config.to_json_string(use_diff=False)
    return {"digest": _digest_of(head, [*model.named_parameters(), *model.named_buffers()])}


def parameters_digest(model: torch.nn.Module) -> str:
    """Return a digest of every byte of the parameters of a module, by which a change of them is noticed.

    Buffers do not count, because some models change theirs when they read a long sequence (dynamic rotary embeddings).
    """
    return _digest_of("", model.named_parameters())


def _digest_of(head: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    found = xxh3_128(head.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:
            content = tensor.detach().cpu().contiguous()
            found.update(content.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
