"""Faults on one machine. After each a rerun completes, and its table is that of a clean run, value for value.

experiments/faults/faults.py runs every test marked `fault`, here and in tests/slurm, and writes the table.
"""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.engine import run as engine_run
from harness.errors import InputError
from harness.evaluation.scoring import Scorer
from harness.measurements import compose_settings
from harness.measurements.ablation import cell_run, measure
from harness.measurements.ablation.tables import cell_states, read_metrics
from harness.models.memory import is_out_of_memory
from harness.tasks.recall_probes import RecallProbesTask
from tests.checkpoints import save_checkpoint, text_file
from tests.processes import run_ranks, start_harness
from tests.studies import (
    LONG,
    N_LONG,
    N_SMALL,
    SMALL,
    assert_same_tables,
    config_of,
    n_rows,
    run_here,
    run_settings,
    settings,
    status_of,
    stop_half_done,
)

CELL = "0.up_proj: decile 5"


@pytest.mark.fault("SIGKILL of a run")
def test_killed_run(clean_long, tmp_path):
    folder, log = tmp_path / "study", tmp_path / "log"
    process = start_harness("run", "--quiet", *settings(LONG, folder), log=log)
    stop_half_done(lambda: process.pid, folder, 5, log.read_text)
    process.kill()
    process.wait(60)
    assert 5 <= n_rows(folder) < N_LONG
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "metrics").iterdir()}
    run_here(LONG, folder)
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "metrics").iterdir()}
    # what was done was not done again
    assert before.items() <= after.items()
    assert_same_tables(folder, clean_long)


@pytest.mark.fault("SIGKILL of a rank")
def test_killed_rank(clean_long, tmp_path):
    """The other rank is ended with it, as torchrun ends it."""
    folder = tmp_path / "study"
    program = f"""
import os
from pathlib import Path
from harness.measurements.ablation import cell_run
from tests.studies import n_rows, run_here
real = cell_run.CellRun.ablation
def ablation(*arguments):
    if os.environ["RANK"] == "1" and n_rows(Path({str(folder)!r})) >= 5: os.kill(os.getpid(), 9)
    return real(*arguments)
cell_run.CellRun.ablation = ablation
run_here({LONG!r}, Path({str(folder)!r}))
"""
    assert run_ranks(program, 2, tmp_path / "log").returncode != 0
    assert 5 <= n_rows(folder) < N_LONG
    run_here(LONG, folder)
    assert_same_tables(folder, clean_long)


@pytest.mark.fault("two runs of one study at once")
def test_two_runs_at_once(clean_small, tmp_path):
    folder = tmp_path / "study"
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    processes = [start_harness("run", "--quiet", *settings(SMALL, folder), log=log) for log in logs]
    for process, log in zip(processes, logs):
        assert process.wait(400) == 0, log.read_text()[-2000:]
    assert n_rows(folder) == N_SMALL
    assert_same_tables(folder, clean_small)


@contextmanager
def small_disk(folder: Path):
    """A file system of 500 KiB at `folder`; yields a function that enlarges it."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault("full disk while writing")
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk(clean_small, tmp_path):
    with small_disk(tmp_path / "disk") as enlarge:
        folder = tmp_path / "disk" / "study"
        config = config_of(SMALL, folder, f"model.recall.cache_dir={tmp_path}/trained")
        with pytest.raises(InputError, match="cannot write rows: .*No space left on device.* run the same command"):
            run_settings(config)
        assert 0 < n_rows(folder) < N_SMALL
        assert not list((folder / ".tmp").iterdir())
        enlarge()
        run_settings(config)
        assert_same_tables(folder, clean_small)


@pytest.mark.fault("a write that the system refuses")
def test_refused_write(clean_small, tmp_path, monkeypatch):
    """The kernel refuses to let a file grow, as at a quota, from the tenth cell on; the writer is the real one."""
    folder, written, real = tmp_path / "study", [], engine_run.write_unit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_unit(*arguments):
        written.append(arguments[2])
        if len(written) == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        real(*arguments)

    monkeypatch.setattr(engine_run, "write_unit", write_unit)
    try:
        with pytest.raises(InputError, match="cannot write rows: .*File too large"):
            run_here(SMALL, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert n_rows(folder) == 9 and not list((folder / ".tmp").iterdir())
    run_here(SMALL, folder)
    assert_same_tables(folder, clean_small)


@pytest.mark.fault("corrupt parquet parts")
@pytest.mark.parametrize("table", ["metrics", "examples"])
def test_corrupt_parts(clean_small, tmp_path, table):
    """One part cut short, one emptied, and one with a flipped byte in its middle, which only reading it all shows."""
    folder = tmp_path / "study"
    shutil.copytree(clean_small, folder)
    cut, emptied, flipped = sorted((folder / table).glob("*.parquet"))[:3]
    cut.write_bytes(cut.read_bytes()[:-100])
    emptied.write_bytes(b"")
    content = bytearray(flipped.read_bytes())
    content[len(content) // 4] ^= 0xFF
    flipped.write_bytes(content)
    run_here(SMALL, folder)  # finds the first two by their ends
    run_here(SMALL, folder)  # nothing seems to be missing, so everything is read
    assert_same_tables(folder, clean_small)
    assert len(list((folder / "corrupt").iterdir())) == 3


def _copied(folder, one, other):
    shutil.copy(one, other)


def _swapped_names(folder, one, other):
    os.rename(one, folder / "aside")
    os.rename(other, one)
    os.rename(folder / "aside", other)


def _named_as_failed(folder, one, other):
    os.rename(one, one.with_name(f"{one.stem}.error.parquet"))


def _of_another_table(folder, one, other):
    (table,) = {"metrics", "examples"} - {one.parent.name}
    shutil.copy(folder / table / one.name, one)


def _of_another_run(folder, one, other):
    """The part of another study under the same name: with the id of another run in its label."""
    content, run = one.read_bytes(), json.loads((folder / "manifest.json").read_text())["id"].encode()
    assert run in content
    one.write_bytes(content.replace(run, run[::-1]))


def _under_no_cell(folder, one, other):
    shutil.copy(one, one.with_name("0123456789abcdef01234567.parquet"))


@pytest.mark.fault("parts that are copied, renamed or of another study")
@pytest.mark.parametrize("table", ["metrics", "examples"])
@pytest.mark.parametrize("misplace", [
    _copied, _swapped_names, _named_as_failed, _of_another_table, _of_another_run, _under_no_cell,
])
def test_misplaced_parts(clean_small, tmp_path, misplace, table):
    folder = tmp_path / "study"
    shutil.copytree(clean_small, folder)
    misplace(folder, *sorted((folder / table).glob("*.parquet"))[:2])
    assert "is not used: " in status_of(folder)
    run_here(SMALL, folder)
    assert_same_tables(folder, clean_small)
    assert list((folder / "corrupt").iterdir())


@pytest.mark.fault("corrupt cache of the trained model")
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_corrupt_cache(clean_small, tmp_path, damage):
    shutil.copytree(clean_small.parent / "trained", tmp_path / "trained")
    (weights,) = (tmp_path / "trained").rglob("model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-7] ^= 0xFF
    weights.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    assert_same_tables(run_here(SMALL, tmp_path / "study"), clean_small)


@pytest.mark.fault("corrupt cache of decompositions")
def test_corrupt_decompositions(clean_small, tmp_path):
    cached = [*SMALL, f"runtime.cache_dir={tmp_path / 'decompositions'}"]
    run_here(cached, tmp_path / "first")
    files = [path for path in (tmp_path / "decompositions").rglob("*") if path.stat().st_size > 1000]
    assert len(files) == 6  # one per matrix
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    assert_same_tables(run_here(cached, tmp_path / "second"), clean_small)


@pytest.fixture
def trouble(monkeypatch):
    """trouble(label, act): while the ablation `label` is applied, act(input_ids) before the model's forward, whose
    output is multiplied with what it returns."""

    def install(label, act):
        now, real_ablated, real_load = [], cell_run.ablated, measure.load

        @contextmanager
        def ablated(loaded, ablation, *arguments):
            with real_ablated(loaded, ablation, *arguments) as realised:
                now.append(f"{ablation.target.label}: {ablation.region.label}")
                try:
                    yield realised
                finally:
                    now.clear()

        def load(*arguments):
            loaded = real_load(*arguments)

            def before(module, args, kwargs):
                module.factor = act(kwargs["input_ids"]) if now and now[0].startswith(label) else None

            loaded.model.register_forward_pre_hook(before, with_kwargs=True)
            loaded.blocks[-1].register_forward_hook(
                lambda block, args, output: None if loaded.model.factor is None else output * loaded.model.factor
            )
            return loaded

        monkeypatch.setattr(cell_run, "ablated", ablated)
        monkeypatch.setattr(measure, "load", load)

    yield install
    monkeypatch.undo()


def check_failed_then_rerun(folder: Path, clean: Path, overrides: list[str], monkeypatch, error: str) -> None:
    states = cell_states(folder)
    failed = [cell for cell, state in states.items() if state == "error"]
    assert len(states) == N_SMALL and len(failed) == 2  # the cell on both tasks
    rows = read_metrics(folder, failed)
    assert (rows["status"] == "error").all() and rows["value"].isna().all()
    assert rows["error"].str.contains(error).all() and (rows["target"] == "0.up_proj").all()
    assert error in status_of(folder) and "Traceback" in status_of(folder, failed=True)
    monkeypatch.undo()
    run_here(overrides, folder)
    assert_same_tables(folder, clean)


def fail(message: str):
    raise ValueError(message)


@pytest.mark.fault("a cell that raises")
def test_cell_that_raises(clean_small, tmp_path, trouble, monkeypatch):
    trouble(CELL, lambda input_ids: fail("a bug in this cell"))
    check_failed_then_rerun(run_here(SMALL, tmp_path / "study"), clean_small, SMALL, monkeypatch, "a bug in this cell")


@pytest.mark.fault("a cell that yields NaN")
def test_cell_that_yields_nan(clean_small, tmp_path, trouble, monkeypatch):
    trouble(CELL, lambda input_ids: float("nan"))
    check_failed_then_rerun(run_here(SMALL, tmp_path / "study"), clean_small, SMALL, monkeypatch, "is not finite")


@pytest.mark.parametrize("precision", ["exact", "adaptive"])
def test_a_metric_beyond_float64_is_a_row_of_its_own(tmp_path, precision):
    """Logits so large that a perplexity overflows: an error row for it alone, of the baseline too; the rest goes on."""
    folder = save_checkpoint(tmp_path / "loud")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 3000.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = text_file(tmp_path / "text.txt")
    overrides = ["model=pretrained", f"model.name={folder}", f"tasks.text.data_files={text}", "tasks.text.window=32",
                 "task=text", "target.layer_types=[up_proj]", "target.blocks=[1]", "region=decile",
                 "region.deciles=[1]", f"runtime.precision={precision}", f"output={tmp_path / 'study'}"]
    study = run_settings(compose_settings("ablation", overrides))
    table = read_metrics(study)
    assert set(table["target"]) == {"baseline", "control", "1.up_proj"}
    nll, perplexity = (table[table["metric"] == name] for name in ("nll", "token_perplexity"))
    assert (nll["status"] == "ok").all() and (nll["value"] > 709).all()
    assert (perplexity["status"] == "error").all() and perplexity["value"].isna().all()
    assert (perplexity["error"] == "token_perplexity is inf: not a finite number").all()
    edited = nll[nll["target"] == "1.up_proj"]
    assert np.isfinite(edited["delta"]).all()
    assert set(cell_states(study).values()) == {"error"}


# A batch is 4 sequences of 32 tokens; a quarter of it is one.
OF_FOUR = [*SMALL, "runtime.batch_tokens=128"]


def memory_for(tokens: int, error: Exception):
    """Memory for so many tokens at once."""
    def act(input_ids):
        if input_ids.numel() > tokens:
            raise error
    return act


# Device memory, host memory of Python, and what torch's allocator of host memory says.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


def test_words_for_out_of_memory():
    assert all(is_out_of_memory(error) for error in OUT_OF_MEMORY)
    assert not any(is_out_of_memory(e) for e in (ValueError("out of memory"), RuntimeError("shape '[2]' is invalid")))


@pytest.mark.fault("a cell without memory for its batch")
def test_out_of_memory_once(tmp_path, trouble):
    clean = run_here(OF_FOUR, tmp_path / "clean")
    trouble(CELL, memory_for(64, OUT_OF_MEMORY[2]))
    folder = run_here(OF_FOUR, tmp_path / "study")
    assert set(cell_states(folder).values()) == {"ok"}
    ours, theirs = read_metrics(folder), read_metrics(clean)
    used = ours["settings"].map(lambda text: json.loads(text).get("batch_tokens"))
    retried = used.notna()
    assert set(used[retried]) == {32}
    # every later cell has the smaller batch, too, because memory would run out again
    at = (ours["target"] == "0.up_proj") & ours["region"].str.startswith("decile 5")
    later = at | (ours["target"] == "0.down_proj") | ours["target"].str.startswith("1.")
    earlier = ours["target"].isin(["baseline", "control", "0.v_proj"])
    assert retried[later].all() and not retried[earlier].any() and later.any() and earlier.any()
    numbers = ["value", "stderr", "delta", "delta_stderr"]
    # another batch is another order of float32 sums
    np.testing.assert_allclose(ours.loc[retried, numbers], theirs.loc[retried, numbers], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(ours.loc[~retried, numbers], theirs.loc[~retried, numbers])


@pytest.mark.fault("a cell that generates text without memory for its batch")
def test_out_of_memory_while_generating(tmp_path, monkeypatch):
    overrides, shares = [*SMALL, "+tasks.probes={kind: recall_probes, n_sequences: 8}"], []
    clean, real = run_here(overrides, tmp_path / "clean"), RecallProbesTask.prepare

    def prepare(*arguments):
        task = real(*arguments)

        def measure_less(loaded, division, batch_share):
            shares.append(batch_share)
            if len(shares) == 5:
                raise OUT_OF_MEMORY[0]
            return task.measure(loaded, division, batch_share)

        return dataclasses.replace(task, measure=measure_less)

    monkeypatch.setattr(RecallProbesTask, "prepare", prepare)
    folder = run_here(overrides, tmp_path / "study")
    assert set(cell_states(folder).values()) == {"ok"}
    assert shares[:5] == [1.0] * 5 and set(shares[5:]) == {0.25} and len(shares) > 7
    ours, theirs = read_metrics(folder), read_metrics(clean)
    used = ours["settings"].map(lambda text: json.loads(text).get("generation_batch_share"))
    assert ours[used.notna()]["cell_id"].nunique() == len(shares) - 5 and set(used.dropna()) == {0.25}
    np.testing.assert_array_equal(ours["value"], theirs["value"])


@pytest.mark.fault("a cell without memory for any batch")
def test_out_of_memory_twice(clean_small, tmp_path, trouble, monkeypatch):
    trouble(CELL, memory_for(0, OUT_OF_MEMORY[0]))
    check_failed_then_rerun(run_here(SMALL, tmp_path / "study"), clean_small, SMALL, monkeypatch, "out of memory")


@pytest.mark.fault("no memory to keep the stream at the frontier")
def test_out_of_memory_at_the_frontier(clean_small, tmp_path, monkeypatch):
    real, tried = Scorer._run_to, []

    def run_to(self, block, batch, kept):
        tried.append(block)
        if len(tried) > 1:
            raise OUT_OF_MEMORY[0]
        return real(self, block, batch, kept)

    monkeypatch.setattr(Scorer, "_run_to", run_to)
    folder = tmp_path / "study"
    run_here(SMALL, folder)
    assert tried == [1, 1]  # of two tasks; it is not tried again
    assert_same_tables(folder, clean_small)
