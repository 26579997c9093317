"""Keep the tokens of long texts for later processes, which would make the same ones.

A file is named by a hash of everything on which its content depends: the text, the tokenizer with all of its content,
the function that asks, and the versions of the libraries. A damaged file is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.files import make_room, replacing, user_cache
from harness.tasks.fingerprint import digest_of
from harness.tasks.tokenization import settings_of

LOG = logging.getLogger(__name__)
LEAST_CHARACTERS = 20_000  # a shorter text is tokenised in less time than a file takes
BUDGET_BYTES = 2**28  # of all files; the least recently used are removed
_CHECK = 32  # bytes of the digest at the beginning of a file
Arrays = tuple[np.ndarray, np.ndarray]


def key_of(tokenizer: Any, text: str, asked: str) -> str | None:
    """Return the name of the file of two arrays; None if they are not to be kept.

    They are not for a short text, and for a tokenizer whose tokens depend on more than the content that is hashed: one
    without a backend of the package tokenizers, or of a class that does not come with transformers. asked: what is
    asked about the text, with a version.
    """
    backend, kind = getattr(tokenizer, "backend_tokenizer", None), type(tokenizer)
    if len(text) < LEAST_CHARACTERS or backend is None or not kind.__module__.startswith("transformers."):
        return None
    found = hashlib.sha256(
        f"{asked} {digest_of(settings_of(tokenizer))} {version('tokenizers')} {version('transformers')}\n".encode()
    )
    for part in (backend.to_str(), text):
        whole = part.encode("utf-8", "surrogatepass")
        found.update(len(whole).to_bytes(8, "little"))
        found.update(whole)
    return found.hexdigest()


def read(key: str) -> Arrays | None:
    """Return the two int64 arrays that are kept under `key`; None if there are none. A damaged file is removed."""
    path = _path(key)
    try:
        whole = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    content = whole[_CHECK:]
    if len(whole) < _CHECK + 8 or whole[:_CHECK] != _digest(key, content) or (len(content) - 8) % 8:
        LOG.warning("%s is damaged: computed anew", path)
        path.unlink(missing_ok=True)
        return None
    n = int.from_bytes(content[:8], "little")
    both = np.frombuffer(content[8:], dtype="<i8").astype(np.int64)
    return both[:n], both[n:]


def keep(key: str, arrays: Arrays) -> None:
    """Keep two int64 arrays under `key`. If that cannot be done there is only a message in the log."""
    content = len(arrays[0]).to_bytes(8, "little") + b"".join(one.astype("<i8").tobytes() for one in arrays)
    path = _path(key)
    try:
        with replacing(path, durable=False) as temporary:
            temporary.write_bytes(_digest(key, content) + content)
        make_room(path.parent, BUDGET_BYTES)
    except OSError as error:
        LOG.info("cannot write to %s (%s)", path, error)


def _path(key: str) -> Path:
    return user_cache("tokens") / key


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()
