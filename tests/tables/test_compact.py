"""Compaction beside readers and writers: at every moment each finished cell is in the folder exactly once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from harness.measurements.ablation.tables import TABLES, cell_states, read_examples, read_metrics
from harness.tables import compact as compaction
from harness.tables.store import corrupt_parts, withdraw
from tests import warm
from tests.tables.synthetic import RUN, error_row, example_columns, metric_row, write_cell

ROOT = Path(__file__).resolve().parents[2]


def compact(folder, grace=2.0):
    return compaction.compact(folder, TABLES, grace)


def write(folder, cell):
    rows = [metric_row(cell), metric_row(cell, "bits_per_byte", value=1.0)]
    write_cell(folder, cell, rows, example_columns(cell))


def no_exchange(one, other):
    raise OSError(errno.EINVAL, "as NFS says")


@pytest.fixture(params=["exchange", "two renames"])
def way_of_swapping(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(compaction, "_exchange", no_exchange)
    return request.param


def parts(folder, table="metrics"):
    return sorted(path.name for path in (folder / table).glob("*.parquet"))


def test_compact_keeps_every_row(tmp_path, way_of_swapping):
    for i in range(70):
        write(tmp_path, f"c{i:03d}")
    write_cell(tmp_path, "bad", [error_row("bad")])
    before = read_metrics(tmp_path), read_examples(tmp_path), cell_states(tmp_path)
    assert compact(tmp_path, grace=0) == {"metrics": 70, "examples": 70}
    after = read_metrics(tmp_path), read_examples(tmp_path), cell_states(tmp_path)
    pd.testing.assert_frame_equal(before[0], after[0])
    pd.testing.assert_frame_equal(before[1], after[1])
    assert before[2] == after[2] == cell_states(tmp_path, verify=True)
    assert len(parts(tmp_path)) == 2 and len(parts(tmp_path, "examples")) == 1
    merged = pq.ParquetFile(next((tmp_path / "metrics").glob("merged-*")))
    assert merged.schema_arrow.equals(TABLES.arrow_schema("metrics"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".compact.lock", ".lock", ".tmp", "examples", "metrics"]

    # A second round: nothing new, then new cells and the retried failure; the first part stays as it is.
    assert compact(tmp_path, grace=0) == {"metrics": 0, "examples": 0}
    write(tmp_path, "bad")
    write(tmp_path, "new")
    first = parts(tmp_path)
    assert compact(tmp_path, grace=0) == {"metrics": 2, "examples": 2}
    assert len(parts(tmp_path)) == 2 and set(parts(tmp_path)) & set(first)
    frame = pd.read_parquet(tmp_path / "metrics")
    assert len(frame) == 2 * 72 and (frame.status == "ok").all() and not frame.duplicated(["cell_id", "metric"]).any()


def test_merged_cell_is_not_written_twice(tmp_path):
    for cell in "abc":
        write(tmp_path, cell)
    compact(tmp_path, grace=0)
    write(tmp_path, "a")
    write_cell(tmp_path, "b", [error_row("b")])
    assert len(parts(tmp_path)) == len(parts(tmp_path, "examples")) == 1
    assert len(pd.read_parquet(tmp_path / "metrics")) == 6 and set(cell_states(tmp_path).values()) == {"ok"}


@pytest.mark.parametrize("withdrawn", ["ab", "abcd"])
def test_withdrawn_cells_leave_a_merged_part_and_are_measured_again(tmp_path, withdrawn):
    for cell in "abc":
        write(tmp_path, cell)
    compact(tmp_path, grace=0)
    write(tmp_path, "d")  # a loose one
    withdraw(tmp_path, TABLES, withdrawn, RUN, "the weights had changed")
    expected = {cell: "error" if cell in withdrawn else "ok" for cell in "abcd"}
    assert cell_states(tmp_path) == cell_states(tmp_path, verify=True) == expected
    rows = read_metrics(tmp_path)
    assert set(rows["cell_id"]) == set("abcd")
    assert (rows.loc[rows["status"] == "error", "error"] == "the weights had changed").all()
    assert set(read_examples(tmp_path)["cell_id"]) == set("abcd") - set(withdrawn)
    assert not corrupt_parts(tmp_path, TABLES, deep=True)
    write_cell(tmp_path, "a", [metric_row("a", value=7.0)], example_columns("a"))
    write(tmp_path, "c")  # is not written twice
    rows = read_metrics(tmp_path).set_index("cell_id")
    assert rows.loc["a", "value"] == 7.0 and cell_states(tmp_path)["a"] == "ok"
    compact(tmp_path, grace=0)
    rows = pd.read_parquet(tmp_path / "metrics")
    assert rows.loc[rows["cell_id"] == "a", "value"].tolist() == [7.0] and (rows["cell_id"] == "c").sum() == 2


def test_damaged_cell_stays_loose(tmp_path):
    for cell in "abcd":
        write(tmp_path, cell)
    (tmp_path / "metrics" / "a.parquet").write_bytes(b"")
    assert compact(tmp_path, grace=0)["metrics"] == 3
    assert set(cell_states(tmp_path, verify=True)) == set("bcd")
    write(tmp_path, "a")
    assert set(pd.read_parquet(tmp_path / "metrics").cell_id) == set("abcd")


def test_full_disk_while_merging_changes_nothing(tmp_path, monkeypatch):
    for cell in "abc":
        write(tmp_path, cell)
    before = parts(tmp_path)

    def full(path, lines):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compaction, "_write_text", full)
    with pytest.raises(OSError, match="No space"):
        compact(tmp_path, grace=0)
    monkeypatch.undo()
    assert parts(tmp_path) == before and not (tmp_path / ".metrics.next").exists()
    assert compact(tmp_path, grace=0) == {"metrics": 3, "examples": 3}


def test_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        compact(tmp_path / "nothing")


STEPS = ["mkdir", "merge", "units", "link", "list", "swap", "half a swap", "swapped", "cleaning"]

DYING = """
import os, shutil, signal, sys
from pathlib import Path
from harness.measurements.ablation.tables import TABLES
from harness.tables import compact as c
folder, step = Path(sys.argv[1]), sys.argv[2]

def dies(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def on_metrics(function, path_of=lambda args: args[0]):
    def wrapped(*args, **kwargs):
        if "metrics" in str(path_of(args)):
            dies()
        return function(*args, **kwargs)
    return wrapped

def no_exchange(one, other):
    raise OSError(22, "as NFS says")

if step == "mkdir":
    c._merge = on_metrics(c._merge)
elif step == "merge":
    c.units_file = on_metrics(c.units_file)
elif step == "units":
    c._link = on_metrics(c._link)
elif step == "link":
    c._write_text = on_metrics(c._write_text, lambda args: str(args[0]) if args[0].name == ".merged" else "")
elif step == "list":
    c.swap = on_metrics(c.swap)
elif step == "swap":
    real = c._exchange
    c._exchange = lambda a, b: (real(a, b), dies() if "metrics" in str(a) else None)
elif step == "half a swap":
    c._exchange = no_exchange
    rename = os.rename
    def half(a, b):
        rename(a, b)
        if "metrics" in str(a):
            dies()
    c.os.rename = half
elif step == "swapped":
    real = c.swap
    c.swap = lambda *a: (real(*a), dies() if "metrics" in str(a[0]) else None)
elif step == "cleaning":
    real = shutil.rmtree
    def rmtree(path, **k):
        if "metrics.old" in str(path) and Path(path).exists():
            os.unlink(sorted(Path(path).glob("*.parquet"))[0])
            dies()
        real(path, **k)
    c.shutil.rmtree = rmtree
c.compact(folder, TABLES, grace=0)
"""


@pytest.mark.parametrize("step", STEPS)
def test_kill_9_at_every_step(tmp_path, step):
    cells = [f"c{i}" for i in range(6)]
    for cell in cells:
        write(tmp_path, cell)
    write_cell(tmp_path, "bad", [error_row("bad")])
    done = subprocess.run([warm.python(), "-c", DYING, str(tmp_path), step], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    expected = dict.fromkeys(cells, "ok") | {"bad": "error"}
    assert cell_states(tmp_path, verify=True) == expected
    assert len(read_metrics(tmp_path)) == 13 and len(read_examples(tmp_path)) == 30
    write(tmp_path, "after")
    write(tmp_path, "bad")
    for _ in range(2):
        frame = pd.read_parquet(tmp_path / "metrics")
        assert len(frame) == 16 and not frame.duplicated(["cell_id", "metric"]).any()
        assert cell_states(tmp_path, verify=True) == expected | {"bad": "ok", "after": "ok"}
        assert len(pd.read_parquet(tmp_path / "examples")) == 40
        compact(tmp_path, grace=0)
    assert len(parts(tmp_path)) <= 2
    assert not [p.name for p in tmp_path.iterdir() if p.name.endswith((".next", ".old"))]


WRITER = """
import sys
from tests.tables.synthetic import RUN, error_row, example_columns, metric_row, write_cell
folder, name, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for i in range(first, last):
    cell = f"{name}{i:04d}"
    if i % 7 == 0:
        write_cell(folder, cell, [error_row(cell)])
    write_cell(folder, cell, [metric_row(cell), metric_row(cell, "bits_per_byte")], example_columns(cell))
    print(cell, flush=True)
"""


def test_readers_and_writers_beside_compactions(tmp_path, way_of_swapping):
    """Two writing processes; compactions without pause; third-party listings and our own readers in between."""
    for i in range(30):
        write(tmp_path, f"z{i:04d}")
    writers = [
        subprocess.Popen(
            [warm.python(), "-c", WRITER, str(tmp_path), name, "0", "100"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for name in "xy"
    ]  # fmt: skip
    finished = {f"z{i:04d}" for i in range(30)}
    collectors = [
        threading.Thread(target=lambda w=w: [finished.add(line.strip()) for line in w.stdout]) for w in writers
    ]
    stop, rounds, problems = threading.Event(), [], []

    def compacting():
        while not stop.is_set():
            try:
                rounds.append(sum(compact(tmp_path, grace=0.2).values()))
            except Exception as problem:  # noqa: BLE001 - shown by the assertion below
                problems.append(repr(problem))
                return

    threads = [*collectors, threading.Thread(target=compacting)]
    for thread in threads:
        thread.start()
    listed = ours = 0
    while any(writer.poll() is None for writer in writers):
        known = set(finished)
        try:
            # What pandas and DuckDB do: list the folder, then open each file of the listing.
            files = [name for name in os.listdir(tmp_path / "metrics") if name.endswith(".parquet")]
            rows = [
                (cell, metric)
                for name in files
                if not name.endswith(".error.parquet")
                for cell, metric in zip(
                    *pq.ParquetFile(tmp_path / "metrics" / name).read(["cell_id", "metric"]).to_pydict().values()
                )
            ]
            assert len(rows) == len(set(rows)), "a row was seen twice"
            assert {(c, m) for c in known for m in ("token_perplexity", "bits_per_byte")} <= set(rows), (
                "a row is missing"
            )
            listed += 1
        except FileNotFoundError:
            pass  # loud, never wrong
        known = set(finished)
        frame = read_metrics(tmp_path)
        assert not frame.duplicated(["cell_id", "metric"]).any()
        assert known <= set(frame.cell_id[frame.status == "ok"])
        known = set(finished)
        states = cell_states(tmp_path)
        assert all(states.get(cell) == "ok" for cell in known)
        ours += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0] and not problems
    assert ours > 3 and listed > 1 and len(rounds) > 2 and sum(rounds) > 100, (ours, listed, rounds)
    everything = {f"z{i:04d}" for i in range(30)} | {f"{name}{i:04d}" for name in "xy" for i in range(100)}
    assert cell_states(tmp_path, verify=True) == dict.fromkeys(everything, "ok")
    frame = pd.read_parquet(tmp_path / "metrics")
    assert len(frame) == 2 * 230 and not frame.duplicated(["cell_id", "metric"]).any()
    assert len(pd.read_parquet(tmp_path / "examples")) == 5 * 230


def test_a_failure_that_is_retried_while_states_are_read(tmp_path, monkeypatch):
    """The success replaces the failure between the listing and the look at its label."""
    from harness.tables import reader

    write_cell(tmp_path, "c", [error_row("c")])
    problem, looked = reader.problem, []

    def retried_meanwhile(part):
        looked.append(part.path.name)
        write(tmp_path, "c")
        return problem(part)

    monkeypatch.setattr(reader, "problem", retried_meanwhile)
    assert cell_states(tmp_path) == {"c": "error"} and looked == ["c.error.parquet"], "as it was listed"
    assert cell_states(tmp_path) == {"c": "ok"}
    assert compact(tmp_path, grace=0) == {"metrics": 0, "examples": 0}


def test_without_locks_no_row_is_lost(tmp_path, monkeypatch):
    """A cell that lands in the retired folder after the swap is moved over before the folder is deleted."""
    for cell in "abc":
        write(tmp_path, cell)
    real = compaction.swap

    def swap(live, successor, retired):
        real(live, successor, retired)
        if live.name == "metrics":
            write(tmp_path / "elsewhere", "late")
            os.rename(tmp_path / "elsewhere" / "metrics" / "late.parquet", retired / "late.parquet")

    monkeypatch.setattr(compaction, "swap", swap)
    compact(tmp_path, grace=0)
    assert set(cell_states(tmp_path)) == {"a", "b", "c", "late"}
