"""The cache of decompositions: same bits as a fresh one, keyed by content, never trusted unread, bounded."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.cli import main
from harness.errors import InputError
from harness.evaluation.settings import RuntimeSettings
from harness.measurements.ablation.settings import StudySettings
from harness.models import decompositions
from harness.models.decompositions import (
    DecompositionCache,
    DiskCache,
    content_key,
    disk_cache,
    make_room,
    read_cached,
    size_of,
    store,
)
from harness.models.loading import loaded_from
from harness.settings.validation import validated
from harness.spectral.decomposition import decompose
from tests import warm
from tests.checkpoints import save_checkpoint, text_file
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")


def weight(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).to(dtype)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(one, other) -> None:
    assert torch.equal(one.sigma, other.sigma) and torch.equal(one.vectors, other.vectors)
    for field in ("side", "shape", "method", "reconstruction_error", "orthogonality_error"):
        assert getattr(one, field) == getattr(other, field)


@pytest.fixture
def cache(tmp_path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 2**20)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many matrices each call decomposed."""
    calls: list[int] = []
    for name, count in (("decompose", lambda w: 1), ("decompose_many", len)):
        real = getattr(decompositions, name)

        def wrapped(weights, real=real, count=count):
            calls.append(count(weights))
            return real(weights)

        monkeypatch.setattr(decompositions, name, wrapped)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_is_what_was_stored(cache, dtype) -> None:
    w = weight(dtype=dtype)
    key, fresh = content_key(w), decompose(w)
    assert read_cached(cache, key, CPU) is None
    store(cache, key, fresh)
    assert_same(read_cached(cache, key, CPU), fresh)
    assert files(cache.folder) == [f"{key}.safetensors"]


def test_the_key_is_all_that_the_answer_depends_on(monkeypatch) -> None:
    w = weight()
    assert content_key(w) == content_key(w.clone()) == content_key(w.T.contiguous().T)
    bit = w.clone()
    bit.view(torch.int32)[3, 4] ^= 1
    zero = torch.zeros(20, 30)
    others = [bit, w.reshape(30, 20), w.view(torch.int32).view(torch.float32).T, w.bfloat16(), zero, zero.bfloat16(),
              torch.zeros(20, 15), torch.zeros(10, 30)]
    keys = {content_key(other) for other in others} | {content_key(w)}
    assert len(keys) == len(others) + 1
    monkeypatch.setattr(decompositions, "DECOMPOSITION_VERSION", 0)
    assert content_key(w) not in keys


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other key", "text"])
def test_a_damaged_file_is_dropped_and_computed_anew(cache, counted, caplog, damage) -> None:
    loaded = loaded_from(tiny_model("llama"))
    matrix = loaded.matrices[0]
    fresh = DecompositionCache(loaded, 2**30, cache)(matrix)
    (path,) = cache.folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-len(content) // 3] ^= 4
    elif damage == "other key":
        store(cache, "0" * 32, decompose(weight()))
        other = cache.folder / f"{'0' * 32}.safetensors"
        content = other.read_bytes()
        other.unlink()
    else:
        content = {"truncate": content[:-9], "empty": b"", "text": b"not a tensor file at all"}[damage]
    path.write_bytes(content)
    again = DecompositionCache(loaded, 2**30, cache)(matrix)
    assert_same(again, fresh)
    assert counted == [1, 1] and "damaged" in caplog.text
    assert_same(DecompositionCache(loaded, 2**30, cache)(matrix), fresh)  # the file is good again
    assert counted == [1, 1]


@pytest.mark.parametrize("model_type, layer_type", [("llama", "up_proj"), ("mixtral", "up_proj")])
@pytest.mark.parametrize("stored", [False, True])
def test_weights_that_somebody_else_changes_are_watched(cache, counted, model_type, layer_type, stored) -> None:
    """Experts are decomposed together: one that changed is not taken from the batch of before."""
    loaded = loaded_from(tiny_model(model_type))
    matrices = [m for m in loaded.matrices if m.layer_type == layer_type]
    watching = DecompositionCache(loaded, 2**30, cache if stored else None, watched=True)

    def fresh():
        return DecompositionCache(loaded, 2**30)

    for matrix in (*matrices, *matrices):
        watching(matrix)
    assert sum(counted) == len(matrices)
    for changed in (matrices[1:2], matrices[::2], matrices):
        for matrix in changed:
            matrix.write(loaded.model, matrix.read(loaded.model) * 1.5)
        before = sum(counted)
        found = [watching(matrix) for matrix in matrices]
        assert len(changed) <= sum(counted) - before  # nothing that changed is taken from before
        for matrix, one, expected in zip(matrices, found, map(fresh(), matrices)):
            assert torch.equal(one.sigma, expected.sigma), matrix.name
            torch.testing.assert_close(one.vectors, expected.vectors, rtol=0, atol=1e-9)


def test_every_bit_of_the_stored_numbers_is_checked(cache) -> None:
    w = weight()
    key = content_key(w)
    store(cache, key, decompose(w))
    path = cache.folder / f"{key}.safetensors"
    content = path.read_bytes()
    for position in range(len(content) - 20 * 20 * 8, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert read_cached(cache, key, CPU) is None and not path.exists()


def test_another_process_finds_it_and_an_edited_matrix_does_not(cache, counted) -> None:
    loaded, other = loaded_from(tiny_model("gpt2")), loaded_from(tiny_model("gpt2"))
    first = DecompositionCache(loaded, 2**30, cache)
    before = [first(matrix) for matrix in loaded.matrices]
    n = len(loaded.matrices)
    assert len(files(cache.folder)) == sum(counted) == n
    second = DecompositionCache(other, 2**30, cache)
    for matrix, expected in zip(other.matrices, before):
        assert_same(second(matrix), expected)
    assert sum(counted) == n
    other.matrices[3].view(other.model)[0, 0] += 1e-3
    changed = DecompositionCache(other, 2**30, cache)(other.matrices[3])
    assert sum(counted) == n + 1 and not torch.equal(changed.sigma, before[3].sigma)


def test_the_least_recently_used_make_room(tmp_path) -> None:
    weights = [weight(seed) for seed in range(5)]
    keys = [content_key(w) for w in weights]
    probe = DiskCache(tmp_path / "probe", 2**30)
    store(probe, keys[0], decompose(weights[0]))
    size = (probe.folder / f"{keys[0]}.safetensors").stat().st_size
    cache = DiskCache(tmp_path / "cache", 3 * size + size // 2)
    for i, (key, w) in enumerate(zip(keys, weights)):
        store(cache, key, decompose(w))
        make_room(cache)
        os.utime(cache.folder / f"{key}.safetensors", ns=(i, i))
        if i == 2:
            assert read_cached(cache, keys[0], CPU) is not None  # used now: the youngest
    assert files(cache.folder) == sorted(f"{keys[i]}.safetensors" for i in (0, 3, 4))
    too_small = DiskCache(tmp_path / "small", 100)
    store(too_small, keys[0], decompose(weights[0]))
    assert not too_small.folder.exists()


def test_temporary_files_of_lost_writers_go_and_those_at_work_stay(cache) -> None:
    cache.folder.mkdir()
    old, young = cache.folder / ".dead.1", cache.folder / ".alive.2"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    store(cache, "a", decompose(weight()))
    make_room(cache)
    assert files(cache.folder) == [".alive.2", "a.safetensors"]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog) -> None:
    (tmp_path / "file").touch()
    loaded = loaded_from(tiny_model("llama"))
    result = DecompositionCache(loaded, 2**30, DiskCache(tmp_path / "file", 2**30))(loaded.matrices[0])
    assert_same(result, decompose(loaded.matrices[0].read(loaded.model)))
    assert "runtime.cache_dir: cannot write" in caplog.text


def test_files_are_for_whom_the_umask_says_and_unreadable_ones_stay(cache, caplog, monkeypatch) -> None:
    w = weight()
    key, umask = content_key(w), os.umask(0o027)
    try:
        store(cache, key, decompose(w))
    finally:
        os.umask(umask)
    path = cache.folder / f"{key}.safetensors"
    assert path.stat().st_mode & 0o777 == 0o640

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert read_cached(cache, key, CPU) is None
    assert path.exists() and "cannot read" in caplog.text


def test_memory_is_bounded_and_what_was_given_up_comes_from_disk(cache, counted) -> None:
    loaded = loaded_from(tiny_model("llama"))
    attention = loaded.matrices[:4]
    ours = DecompositionCache(loaded, 2 * size_of(decompose(attention[0].read(loaded.model))), cache)
    for _ in range(3):
        for matrix in attention:
            assert_same(ours(matrix), decompose(matrix.read(loaded.model)))
            assert sum(size_of(one) for one in ours._kept.values()) <= ours._budget + size_of(ours(matrix))
    assert counted == [1] * 4
    unstored = DecompositionCache(loaded, 0)
    for matrix in (attention[0], attention[1], attention[0]):
        unstored(matrix)
    assert counted == [1] * 7


def test_a_run_keeps_the_folder_within_its_budget(tmp_path) -> None:
    loaded = loaded_from(tiny_model("llama"))
    probe = DiskCache(tmp_path / "probe", 2**30)
    of_one = store(probe, "a", decompose(loaded.matrices[0].read(loaded.model)))
    assert of_one == (probe.folder / "a.safetensors").stat().st_size
    for room in (4.5, 10.5):  # files, which differ by a few bytes
        budget = int(room * of_one)
        cache = DiskCache(tmp_path / str(budget), budget)
        ours = DecompositionCache(loaded, 2**30, cache)
        for matrix in loaded.matrices:
            ours(matrix)
            assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= budget * 65 / 64
        assert len(files(cache.folder)) >= int(room)


@pytest.mark.parametrize("stored", [True, False])
def test_experts_are_decomposed_together(cache, counted, stored) -> None:
    loaded = loaded_from(tiny_model("olmoe"))
    ours = DecompositionCache(loaded, 2**30, cache if stored else None)
    for matrix in loaded.matrices:
        assert_same(ours(matrix), decompose(matrix.read(loaded.model)))
    blocks = 3
    assert counted.count(3) == 3 * blocks and counted.count(1) == 5 * blocks  # gate, up, down; attention and router
    again = DecompositionCache(loaded, 2**30, cache if stored else None)
    again(next(m for m in loaded.matrices if m.name == "1.up_proj.e1"))
    assert counted[-1] == (1 if stored else 2)  # only the experts from there on
    small = DecompositionCache(loaded, 2 * 8 * 40 * 24)
    small(next(m for m in loaded.matrices if m.name == "1.up_proj.e0"))
    assert counted[-1] == 2  # as many as the memory holds


SHARING = """
import sys
from pathlib import Path
import torch
from harness.models.decompositions import DiskCache, content_key, make_room, read_cached, store
from harness.spectral.decomposition import decompose

cache = DiskCache(Path(sys.argv[1]), 20_000)  # room for about five of eight: each removes what the other reads
for i in range(100):
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(i * int(sys.argv[2]) % 8))
    key, expected = content_key(w), decompose(w)
    found = read_cached(cache, key, w.device)
    if found is None:
        store(cache, key, expected)
        make_room(cache)
    else:
        assert torch.equal(found.vectors, expected.vectors) and torch.equal(found.sigma, expected.sigma)
"""


def test_several_processes_share_a_folder(tmp_path) -> None:
    workers = [
        subprocess.Popen([warm.python(), "-c", SHARING, str(tmp_path), step], stderr=subprocess.PIPE, text=True)
        for step in ("1", "3")
    ]
    assert [worker.communicate(timeout=300)[1] for worker in workers] == ["", ""]  # no failure and no warning
    assert all(name.endswith(".safetensors") for name in files(tmp_path))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000


def test_the_settings(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = RuntimeSettings()
    assert disk_cache(default.cache_gib, default.cache_dir) == DiskCache(
        tmp_path / "spectral-harness" / "decompositions", 10 * 2**30
    )
    assert disk_cache(0.5, str(tmp_path / "x")) == DiskCache(tmp_path / "x", 2**29)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache(0.5, "~/x") == DiskCache(tmp_path / "x", 2**29)
    assert disk_cache(0) is None
    for key in ("cache_gib", "decomposition_gib"):
        with pytest.raises(InputError, match=f"runtime.{key}: -1.* is wrong; it must be at least 0"):
            validated(StudySettings, {"runtime": {key: -1}})


def test_a_run_fills_the_cache_and_the_next_gets_the_same_numbers_from_it(tmp_path, counted) -> None:
    def run(name: str, *overrides: str) -> pd.DataFrame:
        settings = [
            "model=pretrained", f"model.name={checkpoint}", "target=block", "region.values=[0.3]", "task=text",
            f"tasks.text.data_files={text}", "tasks.text.split=train", f"output={tmp_path / name}", *overrides,
        ]
        assert main(["run", "--quiet", *settings]) == 0
        table = pd.read_parquet(tmp_path / name / "metrics").sort_values("cell_id", ignore_index=True)
        return table[["cell_id", "value", "delta", "realised_removal", "svd_method", "svd_reconstruction_error"]]

    checkpoint, text = save_checkpoint(tmp_path / "model"), text_file(tmp_path / "text.txt")
    cache = f"runtime.cache_dir={tmp_path / 'cache'}"
    first = run("first", cache)
    n = 3 * 7
    assert sum(counted) == n and len(files(tmp_path / "cache")) == n
    pd.testing.assert_frame_equal(run("second", cache), first, check_exact=True)
    assert sum(counted) == n
    pd.testing.assert_frame_equal(run("third", cache, "runtime.cache_gib=0"), first, check_exact=True)
    assert sum(counted) == 2 * n
