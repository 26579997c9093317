"""Where a number comes from: versions, commit, machine, time."""

from __future__ import annotations

import platform
import socket
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from harness import __version__


def provenance() -> dict[str, str | None]:
    """The provenance columns of the metrics table; call once per process. Imports none of the packages it names.

    Keys: harness_version, git_commit, torch_version, transformers_version, python_version, hostname, started_at.
    """
    return {
        "harness_version": __version__,
        "git_commit": git_commit(Path(__file__).resolve().parents[2]),
        "torch_version": _version("torch"),
        "transformers_version": _version("transformers"),
        "python_version": platform.python_version(),
        "hostname": socket.gethostname(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit(checkout: Path) -> str | None:
    """The commit of `checkout`, "+dirty" added when tracked files differ from it; None where it is no checkout."""
    # The package may lie inside somebody else's repository (a venv in a checkout): that commit would say nothing.
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
