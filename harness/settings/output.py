"""Check the output folder of a run before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from harness.errors import wrong
from harness.settings.plain_values import refuse_long_path

# Folders in which a run would be among the files of other programs. Folders inside most of them may be the user's.
_SYSTEM = frozenset(
    ["/", *(f"/{name}" for name in
            "bin boot dev etc home lib lib32 lib64 media mnt opt proc root run sbin srv sys tmp usr var".split()),
     "/usr/bin", "/usr/lib", "/usr/local", "/usr/local/bin", "/usr/share", "/var/lib", "/var/log", "/var/tmp"]
)


def require_folder(output: str | None) -> None:
    """Raise SettingError if `output` is not a folder and cannot become one, or is no folder for a run.

    Nothing stays behind from the test.
    """
    if output is None:
        return
    refuse_long_path("output", output)
    if not output.strip():
        raise wrong("output", output, "name a folder, or leave it null for a folder in results/")
    path = Path(output).expanduser()
    real = os.path.realpath(path)
    if real in _SYSTEM or real == os.path.realpath(Path.home()):
        raise wrong("output", output, f"{real} belongs to the system or is your home folder; name a folder of its own")
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    if not there.is_dir():
        raise wrong("output", output, f"{there} is a file; name a folder that is there or can be made")
    if there != path:
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".harness-", dir=there))
        except OSError as error:
            right = f"no folder can be made in {there} ({error.strerror}); name another"
            raise wrong("output", output, right) from error
