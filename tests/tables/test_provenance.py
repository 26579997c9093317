"""Provenance against git itself and the packages' own versions."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from harness.tables.provenance import git_commit, provenance
from harness.tables.schema import PROVENANCE

ROOT = Path(__file__).resolve().parents[2]


def git(folder, *arguments):
    name = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    return subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_keys_are_columns_and_versions_are_those_of_the_packages():
    found = provenance()
    assert found.keys() == {column.name for column in PROVENANCE}
    torch = pytest.importorskip("torch")
    assert found["torch_version"] == torch.__version__
    assert found["python_version"] == sys.version.split()[0]
    started = datetime.fromisoformat(found["started_at"])
    assert started.utcoffset() == timedelta(0)


def test_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None, "no commit yet"
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_commit(tmp_path) == head
    (tmp_path / "other").write_text("untracked")
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == head + "+dirty"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None, "a folder inside somebody's repository is not a checkout of ours"


def test_no_heavy_import():
    code = (
        "import sys; from harness.tables.provenance import provenance; provenance(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
