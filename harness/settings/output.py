"""Check the output folder of a run before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from harness.errors import wrong


def require_folder(output: str | None) -> None:
    """Raise SettingError if `output` is not a folder and cannot become one. Nothing stays behind from the test."""
    if output is None:
        return
    path = Path(output).expanduser()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise wrong("output", output, f"{there} is a file; name a folder that is there or can be made")
    if there != path:
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".harness-", dir=there))
        except OSError as error:
            right = f"no folder can be made in {there} ({error.strerror}); name another"
            raise wrong("output", output, right) from error
