"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from harness import files
from harness.files import hash_file, new_folder, replacing, user_cache, write_json, write_text
from tests import warm

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_when_the_block_ends(tmp_path, durable, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path, real=files.sync: (real(path), synced.append(path.read_text())))
    path = tmp_path / "deep" / "er" / "file.txt"
    for content in ("first", "second"):
        with replacing(path, durable) as temporary:
            temporary.write_text(content)
            assert temporary.parent == path.parent and (content == "first" or path.read_text() == "first")
        assert path.read_text() == content and names(path.parent) == ["file.txt"]
    assert synced == (["first", "second"] if durable else [])


def test_a_block_that_raises_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    for before in (None, "before"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(KeyError), replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError
        assert names(tmp_path) == ([] if before is None else ["file.txt"])
    assert path.read_text() == "before"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "file.txt").write_text("before")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file.txt"):
        pass
    assert (tmp_path / "file.txt").read_text() == "before"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1} and names(tmp_path) == ["file.json"]


DYING = """
import os, signal, sys
from pathlib import Path
from harness.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_while_writing_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    done = subprocess.run([warm.python(), "-c", DYING, str(path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "before"
    # what it left is hidden, and never in the way of the next writer
    left = [name for name in names(tmp_path) if name != "file.txt"]
    assert len(left) == 1 and left[0].startswith(".")
    write_text(path, "after")
    assert path.read_text() == "after"


def test_readers_beside_writers_see_a_whole_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "0" * 20_000)
    stop, seen, problems = threading.Event(), set(), []

    def write(letter: str) -> None:
        try:
            while not stop.is_set():
                write_text(path, letter * 20_000)
        except Exception as problem:  # noqa: BLE001 - shown by the assertion below
            problems.append(repr(problem))

    writers = [threading.Thread(target=write, args=letter) for letter in "abc"]
    for writer in writers:
        writer.start()
    for _ in range(300):
        content = path.read_text()
        assert len(content) == 20_000 and len(set(content)) == 1
        seen.add(content[0])
    stop.set()
    for writer in writers:
        writer.join()
    assert not problems and len(seen) > 1 and names(tmp_path) == ["file.txt"]


def test_json_is_compact_and_takes_anything(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, None, 0.1], "path": Path("/some/where"), "ä": "é"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, None, 0.1], "path": "/some/where", "ä": "é"} and " " not in text


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_when_the_block_ends(tmp_path, there):
    path = tmp_path / "deep" / "new"
    if there:
        path.mkdir(parents=True)
    with new_folder(path) as temporary:
        (temporary / "file").write_text("content")
        assert temporary.parent == path.parent and path.exists() == there and not (path / "file").exists()
    assert (path / "file").read_text() == "content" and names(path.parent) == ["new"]


def test_a_folder_whose_block_raises_does_not_appear(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "new") as temporary:
        (temporary / "file").write_text("content")
        raise KeyError
    assert names(tmp_path) == []


def test_a_folder_with_content_is_not_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    with pytest.raises(OSError), new_folder(tmp_path / "there") as temporary:
        (temporary / "file").write_text("content")
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == ["mine"]


def test_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "spectral-harness"
    assert user_cache("models") == tmp_path / "xdg" / "spectral-harness" / "models"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset is None else monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert user_cache("models") == tmp_path / "home" / ".cache" / "spectral-harness" / "models"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 19) + 7])
def test_a_file_is_hashed_from_where_it_is_read(tmp_path, size):
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "file").write_bytes(b"head" + content)
    with (tmp_path / "file").open("rb") as file:
        file.seek(4)
        assert hash_file(file, hashlib.sha256()) == hashlib.sha256(content).hexdigest()
