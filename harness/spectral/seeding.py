"""Random draws that are the same on every device and in every process, because a text seeds each of them."""

from __future__ import annotations

import hashlib

import torch


def generator_of(text: str) -> torch.Generator:
    """Return a generator on the CPU that is seeded with a hash of the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
