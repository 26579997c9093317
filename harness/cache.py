"""Where what is worth keeping between studies is kept."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str = "") -> Path:
    """spectral-harness/<name> in $XDG_CACHE_HOME or ~/.cache; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral-harness" / name
