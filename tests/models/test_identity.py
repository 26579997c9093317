"""What a model is: any byte of its weights is part of every cell's id, and a remembered digest is never a stale one."""

import hashlib
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from xxhash import xxh3_128

from harness.models import checkpoint
from harness.models.checkpoint import weight_file
from harness.models.loading import describe_model
from harness.models.settings import ModelSettings
from tests.checkpoints import save_checkpoint


def test_any_byte_of_any_tensor_counts(tmp_path):
    folder = save_checkpoint(tmp_path / "wide", "llama", intermediate_size=8192, hidden_size=64)
    path = folder / "model.safetensors"
    assert path.stat().st_size > 4 << 20
    header = int.from_bytes(path.read_bytes()[:8], "little")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    offsets = json.loads(path.read_bytes()[8 : 8 + header])
    found = {describe_model(ModelSettings(name=str(folder))).identity["digest"]}
    for name in names:
        start, stop = offsets[name]["data_offsets"]
        at = 8 + header + (start + stop) // 2
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        found.add(describe_model(ModelSettings(name=str(folder))).identity["digest"])
        with path.open("r+b") as file:
            file.seek(at)
            file.write(byte)
    assert len(found) == 1 + len(names)
    assert describe_model(ModelSettings(name=str(folder))).identity["digest"] in found


def set_clock(monkeypatch, seconds):
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(time=lambda: seconds))


def content(changed=0, longer=b""):
    """The bytes of a safetensors file with one tensor of 992 bytes."""
    tensor = torch.zeros(248 + len(longer), dtype=torch.float32)
    tensor[100] = changed
    return save({"a": tensor})


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """A file whose digests are remembered, and how often a file has been hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "REMEMBERED_FROM", 100)
    reads, real = [], checkpoint._hash
    monkeypatch.setattr(checkpoint, "_hash", lambda path, *rest: reads.append(path) or real(path, *rest))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content())
    set_clock(monkeypatch, time.time() + 60)
    return path, reads


def file_digest(path):
    """The digest of the file, after its tensor was seen to have the digest of its bytes."""
    found = weight_file(path)
    stored = found.tensors["a"]
    assert xxh3_128(path.read_bytes()[stored.begin : stored.end]).hexdigest() == stored.digest
    assert torch.equal(checkpoint.read_tensor(found, "a"), load_file(path)["a"])
    return found.digest


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(remembered):
    path, reads = remembered
    assert file_digest(path) == file_digest(path) == sha256(path) and len(reads) == 1


@pytest.mark.parametrize("change", ["content", "content and time put back", "replaced", "longer"])
def test_a_changed_file_is_read_again(remembered, change):
    path, reads = remembered
    file_digest(path)
    before = path.stat()
    changed = content(1, b"longer" if change == "longer" else b"")
    if change == "replaced":
        other = path.with_name("other")
        other.write_bytes(changed)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(changed)
    if change == "content and time put back":
        time.sleep(0.02)  # more than a tick of the file system's clock
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) == sha256(path) and len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered(remembered, monkeypatch):
    path, reads = remembered
    set_clock(monkeypatch, path.stat().st_mtime + 1)
    assert file_digest(path) == file_digest(path) and len(reads) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_memory_is_made_anew(remembered, tmp_path, damage):
    path, reads = remembered
    file_digest(path)
    (memory,) = (tmp_path / "cache" / "spectral-harness" / "digests").iterdir()
    memory.write_bytes(damage)
    assert file_digest(path) == sha256(path) and len(reads) == 2
    assert file_digest(path) == sha256(path) and len(reads) == 2


def test_where_nothing_can_be_remembered_it_is_read_every_time(remembered, tmp_path):
    path, reads = remembered
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert file_digest(path) == file_digest(path) == sha256(path) and len(reads) == 2
