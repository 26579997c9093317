"""Where a number comes from: versions, commit, machine and time."""

from __future__ import annotations

import platform
import socket
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from harness import __version__


def provenance() -> dict[str, str | None]:
    """Return the values of the columns PROVENANCE, without importing the packages that they name.

    Call it once per process, because started_at is the time of the call, in UTC.
    """
    return {
        "harness_version": __version__,
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
        "torch_version": _version("torch"),
        "transformers_version": _version("transformers"),
        "python_version": platform.python_version(),
        "hostname": socket.gethostname(),
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def git_commit(checkout: Path) -> str | None:
    """Return the commit of a checkout, followed by "+dirty" if tracked files differ; None if it is not a checkout."""
    # The package may be inside of another repository, for example in a venv. The commit of that would mean nothing.
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+dirty" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
