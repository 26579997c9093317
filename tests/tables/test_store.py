"""The store: round trips, states, damage, versions; read back by pandas and DuckDB, which know nothing of us."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.errors import InputError
from harness.measurements.ablation.tables import TABLES, cell_states, read_examples, read_metrics
from harness.tables import store, writer
from harness.tables.identity import Part
from harness.tables.parts import unit_bytes
from harness.tables.schema import SchemaVersionError
from harness.tables.store import failed_since, write_unit
from tests import warm
from tests.tables.synthetic import RUN, error_row, example_columns, metric_row, write_cell

ROOT = Path(__file__).resolve().parents[2]


def compact(folder, grace=0):
    return store.compact(folder, TABLES, grace)


def corrupt_parts(folder, deep=False):
    return store.corrupt_parts(folder, TABLES, deep)


def write(folder, cell, **columns):
    write_cell(folder, cell, [metric_row(cell, **columns)], example_columns(cell))


def test_round_trip_keeps_every_value_and_type(tmp_path):
    rows = [
        metric_row("a", "token_perplexity", value=1.5, n=3, higher_is_better=False, block=None, revision="ä|\n"),
        metric_row("a", "bits_per_byte", value=np.float32(0.25), n=np.int64(4), delta=float("nan")),
    ]
    write_cell(tmp_path, "a", rows, example_columns("a") | {"score": np.arange(5) / 3})
    table = pq.read_table(tmp_path / "metrics" / "a.parquet")
    assert table.schema.equals(TABLES.arrow_schema("metrics")), "types as in the schema, null columns included"
    got = table.to_pylist()
    assert {k: v for k, v in got[0].items()} == rows[0]
    assert got[1]["value"] == 0.25 and got[1]["n"] == 4 and got[1]["delta"] is None, "NaN is null"
    frame = read_metrics(tmp_path)
    assert list(frame.columns) == list(TABLES["metrics"].names())
    assert list(frame.metric) == ["token_perplexity", "bits_per_byte"], "the primary metric stays first"
    examples = read_examples(tmp_path)
    assert np.array_equal(examples.score.to_numpy(), np.arange(5) / 3) and set(examples.cell_id) == {"a"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".tmp", "examples", "metrics"]
    assert not list((tmp_path / ".tmp").iterdir())


def test_a_loose_part_with_the_rows_of_others_is_found_among_many_good_ones(tmp_path):
    for i in range(9):
        write(tmp_path, f"c{i}")
    path, good = tmp_path / "metrics" / "c4.parquet", {f"c{i}" for i in range(9)} - {"c4"}
    schema = TABLES.arrow_schema("metrics")
    for rows, reason in [([metric_row("c4"), metric_row("c5")], "its rows belong to c5"),
                         ([metric_row("c4", status="error")], "its rows have the status error"), ([], "of nothing")]:
        part = Part(path, TABLES, "metrics", RUN)  # its label is right
        path.write_bytes(unit_bytes(pa.Table.from_pylist(rows, schema=schema), part, True))
        with pytest.warns(store.SkippedParts, match=f"c4.parquet: .*{reason}"):
            assert set(read_metrics(tmp_path).cell_id) == good
        assert [one.path for one in corrupt_parts(tmp_path, deep=True)] == [path]
        compact(tmp_path)
        assert path.exists(), "a bad part is not merged"
        write(tmp_path, "c4")
        assert set(read_metrics(tmp_path).cell_id) == good | {"c4"}


def test_pandas_and_duckdb_read_the_folder(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    for i in range(6):
        # A column that is null everywhere in some files and not in others is where untyped writers fail.
        write(tmp_path, f"c{i}", block=None if i % 2 else i, error=None, revision=None if i % 3 else "main")
    write_cell(tmp_path, "bad", [error_row("bad")])
    sql = f"select cell_id, block, status from '{tmp_path}/metrics/*.parquet' order by cell_id"
    for _ in range(2):
        frame = pd.read_parquet(tmp_path / "metrics")
        assert len(frame) == 7 and frame.cell_id.is_unique and set(frame.columns) == set(TABLES["metrics"].names())
        assert duckdb.sql(sql).fetchall() == [
            ("bad", 0, "error"), ("c0", 0, "ok"), ("c1", None, "ok"), ("c2", 2, "ok"), ("c3", None, "ok"),
            ("c4", 4, "ok"), ("c5", None, "ok"),
        ]  # fmt: skip
        assert len(pd.read_parquet(tmp_path / "examples")) == 30
        compact(tmp_path, grace=0)


def test_states_of_ok_error_and_missing(tmp_path):
    assert cell_states(tmp_path / "nothing") == {}
    assert read_metrics(tmp_path / "nothing").empty and read_examples(tmp_path / "nothing").empty
    write(tmp_path, "good")
    write_cell(tmp_path, "bad", [metric_row("bad"), error_row("bad", metric="word_perplexity")])
    assert cell_states(tmp_path) == {"good": "ok", "bad": "error"}
    write(tmp_path, "bad")
    assert cell_states(tmp_path) == {"good": "ok", "bad": "ok"}
    assert pd.read_parquet(tmp_path / "metrics").status.tolist() == ["ok", "ok"], "no trace of the failure is left"
    write_cell(tmp_path, "good", [error_row("good")])
    assert cell_states(tmp_path)["good"] == "ok", "a failure does not replace a success"
    assert read_metrics(tmp_path).status.tolist() == ["ok", "ok"]


def test_done_wins_where_a_crash_left_both_files(tmp_path):
    write_cell(tmp_path, "a", [error_row("a")])
    failed = (tmp_path / "metrics" / "a.error.parquet").read_bytes()
    write(tmp_path, "a")
    (tmp_path / "metrics" / "a.error.parquet").write_bytes(failed)
    assert cell_states(tmp_path) == {"a": "ok"} and read_metrics(tmp_path).status.tolist() == ["ok"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("delta"), r"lacks columns \['delta'\]"),
        (lambda r: r.update(rho=1), r"unknown ones \['rho'\]"),
        (lambda r: r.update(target=None), "target must not be null"),
        (lambda r: r.update(cell_id="other"), "belongs to unit other"),
        (lambda r: r.update(n="many"), "n is not int64"),
        (lambda r: r.update(status="done"), "status is 'done'"),
        (lambda r: r.update(status="error"), "no error text"),
    ],
)
def test_bad_rows_are_refused_and_leave_nothing(tmp_path, change, message):
    row = metric_row("a")
    change(row)
    with pytest.raises(ValueError, match=message):
        write_cell(tmp_path, "a", [row], example_columns("a"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_bad_calls_are_refused(tmp_path):
    for cell in ("", "a.b", "../a", "merged-1", "a/b"):
        with pytest.raises(ValueError, match="unit id"):
            write_cell(tmp_path, cell, [metric_row(cell)])
    with pytest.raises(ValueError, match="no rows of metrics"):
        write_cell(tmp_path, "a", [])
    with pytest.raises(ValueError, match="lengths"):
        write_cell(tmp_path, "a", [metric_row("a")], example_columns("a") | {"weight": [1.0]})
    with pytest.raises(ValueError, match="no rows of metrics"):
        write_unit(tmp_path, TABLES, "a", {"examples": example_columns("a")}, RUN)
    with pytest.raises(KeyError, match="spectra: no table of ablation; there are metrics, examples"):
        write_unit(tmp_path, TABLES, "a", {"metrics": [metric_row("a")], "spectra": example_columns("a")}, RUN)
    with pytest.raises(ValueError, match=r"lacks columns \['weight'\]"):
        write_cell(tmp_path, "a", [metric_row("a")], {k: v for k, v in example_columns("a").items() if k != "weight"})
    assert not list(tmp_path.rglob("*.parquet"))


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path, "before")

    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer.os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, "a")
    monkeypatch.undo()
    assert cell_states(tmp_path, verify=True) == {"before": "ok"} and not list((tmp_path / ".tmp").iterdir())
    write(tmp_path, "a")
    assert cell_states(tmp_path, verify=True) == {"before": "ok", "a": "ok"}


DISK_OF_4_KB = """
import os, resource, signal, sys
from harness.measurements.ablation.tables import cell_states
from tests.tables.synthetic import example_columns, metric_row, write_cell
write_cell(sys.argv[1], "a", [metric_row("a")], example_columns("a"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for n, rows in ((5, 1), (5000, 1)):
    try:
        write_cell(sys.argv[1], "b", [metric_row("b")] * rows, example_columns("b", n))
    except OSError:
        print("refused")
print(os.listdir(sys.argv[1] + "/.tmp"), cell_states(sys.argv[1], verify=True))
"""


def test_failing_writes_are_errors_and_leave_no_part(tmp_path):
    """The system refuses the bytes (here by a limit on file size, as a full disk or a quota would)."""
    command = [warm.python(), "-c", DISK_OF_4_KB, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\nrefused\n[] {'a': 'ok'}\n"


def test_selected_examples(tmp_path):
    for cell in "abcd":
        write_cell(tmp_path, cell, [metric_row(cell)], example_columns(cell))
    other = example_columns("e") | {"task": "other"}
    write_cell(tmp_path, "e", [metric_row("e", task="other")], other)
    for _ in range(2):
        assert set(read_examples(tmp_path, cell_ids=["b", "d", "zz"]).cell_id) == {"b", "d"}
        assert set(read_examples(tmp_path, task="other").cell_id) == {"e"}
        assert read_examples(tmp_path, cell_ids=["a"], task="other").empty
        assert read_examples(tmp_path, cell_ids=[]).empty
        assert set(read_metrics(tmp_path, cell_ids=["a", "e"]).cell_id) == {"a", "e"}
        assert len(read_examples(tmp_path)) == 25
        compact(tmp_path, grace=0)


def damage_truncated(path):
    path.write_bytes(path.read_bytes()[:-50])


def damage_empty(path):
    path.write_bytes(b"")


def damage_garbage(path):
    path.write_bytes(os.urandom(3000))


@pytest.mark.parametrize("damage", [damage_truncated, damage_empty, damage_garbage])
@pytest.mark.parametrize("table", ["metrics", "examples"])
@pytest.mark.parametrize("merged", [False, True])
def test_damaged_part_is_reported_set_aside_and_refilled(tmp_path, damage, table, merged):
    for cell in "abc":
        write(tmp_path, cell)
    metrics, examples = read_metrics(tmp_path), read_examples(tmp_path)
    if merged:
        compact(tmp_path, grace=0)
    hit = sorted((tmp_path / table).glob("merged-*.parquet" if merged else "b.parquet"))[0]
    damage(hit)
    lost = {"a", "b", "c"} if merged else {"b"}
    assert [(p.path, set(p.units)) for p in corrupt_parts(tmp_path)] == [(hit, lost)]
    assert set(cell_states(tmp_path, verify=True)) == {"a", "b", "c"} - lost
    with pytest.warns(UserWarning, match="parquet: .*; skipped"):
        frame = read_metrics(tmp_path) if table == "metrics" else read_examples(tmp_path)
    assert set(frame.cell_id) == {"a", "b", "c"} - lost

    assert [p.path for p in store.quarantine(tmp_path, TABLES)] == [hit]
    assert not hit.exists() and len(list((tmp_path / "corrupt").iterdir())) == 1
    for verify in (False, True):
        assert set(cell_states(tmp_path, verify=verify)) == {"a", "b", "c"} - lost
    for cell in lost:
        write(tmp_path, cell)
    assert set(cell_states(tmp_path, verify=True)) == {"a", "b", "c"} and not corrupt_parts(tmp_path)
    pd.testing.assert_frame_equal(read_metrics(tmp_path), metrics)
    pd.testing.assert_frame_equal(read_examples(tmp_path), examples)
    assert len(pd.read_parquet(tmp_path / table)) == len(metrics if table == "metrics" else examples)


def test_rerun_sets_a_damaged_file_of_its_cell_aside(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "metrics" / "a.parquet").write_bytes(b"garbage")
    write(tmp_path, "a")
    assert [p.read_bytes() for p in (tmp_path / "corrupt").iterdir()] == [b"garbage"]
    assert cell_states(tmp_path, verify=True) == {"a": "ok"}


def test_flipped_bytes_in_a_page_are_found(tmp_path):
    write(tmp_path, "a")
    part = tmp_path / "examples" / "a.parquet"
    column = pq.ParquetFile(part).metadata.row_group(0).column(5)
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    part.write_bytes(content)
    assert corrupt_parts(tmp_path) == [] and [p.path for p in corrupt_parts(tmp_path, deep=True)] == [part]
    with pytest.warns(UserWarning, match="parquet: .*; skipped"):
        assert read_examples(tmp_path).empty


@pytest.mark.parametrize("merged", [False, True])
def test_other_schema_version_is_refused(tmp_path, merged):
    other = dataclasses.replace(TABLES, version=7)
    for cell in "ab":
        write_unit(tmp_path, other, cell, {"metrics": [metric_row(cell)], "examples": example_columns(cell)}, RUN)
    if merged:
        store.compact(tmp_path, other, grace=0)
    for call in (read_metrics, read_examples, cell_states, compact):
        with pytest.raises(SchemaVersionError, match=r"parquet: written under schema version 7, .*version 4; choose"):
            call(tmp_path)
    assert issubclass(SchemaVersionError, InputError)


@pytest.mark.parametrize("merged", [False, True])
def test_a_table_of_another_measurement_is_skipped(tmp_path, merged):
    """The columns may be the same, and the folder too: what a file holds is said by its metadata."""
    other = dataclasses.replace(TABLES, measurement="probes")
    for cell in "ab":
        write_unit(tmp_path, other, cell, {"metrics": [metric_row(cell)]}, RUN)
    if merged:
        store.compact(tmp_path, other, grace=0)
    with pytest.warns(UserWarning, match="it holds the table 'probes.metrics', not ablation.metrics.*skipped"):
        assert read_metrics(tmp_path).empty
    assert cell_states(tmp_path) == {} and compact(tmp_path) == {"metrics": 0, "examples": 0}
    assert len(store.read_table(tmp_path, other, "metrics")) == 2


def test_failures_since_a_moment(tmp_path):
    write_cell(tmp_path, "old", [error_row("old")])
    os.utime(tmp_path / "metrics" / "old.error.parquet", (1000, 1000))
    write_cell(tmp_path, "new", [error_row("new")])
    write(tmp_path, "done")
    assert failed_since(tmp_path, TABLES, 2000) == {"new"}
    assert failed_since(tmp_path, TABLES, 1000) == {"old", "new"}
    write(tmp_path, "new")
    assert failed_since(tmp_path, TABLES, 0) == {"old"}


def test_foreign_parquet_is_skipped(tmp_path):
    (tmp_path / "metrics").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "metrics" / "a.parquet")
    assert cell_states(tmp_path) == {}
    with pytest.warns(UserWarning, match="does not say to which run it belongs; skipped"):
        assert read_metrics(tmp_path).empty


ENDLESS_WRITER = """
import sys
from tests.tables.synthetic import example_columns, metric_row, write_cell
i = int(sys.argv[2])
print("ready", flush=True)
while True:
    cell = f"c{i:06d}"
    write_cell(sys.argv[1], cell, [metric_row(cell, value=float(i))], example_columns(cell, 2000))
    print(cell, flush=True)
    i += 1
"""


def test_kill_9_costs_at_most_the_cell_in_flight(tmp_path):
    rng, start, finished = random.Random(0), 0, set()
    for _ in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_WRITER, str(tmp_path), str(start)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert child.stdout.readline() == "ready\n"
        for _ in range(rng.randrange(2, 8)):
            finished.add(child.stdout.readline().strip())
        time.sleep(rng.random() * 0.03)
        child.send_signal(signal.SIGKILL)
        finished.update(child.stdout.read().split())
        child.wait()
        states = cell_states(tmp_path, verify=True)
        # Every cell that was reported is there; one more may have landed before it could be.
        assert finished <= states.keys() and len(states.keys() - finished) <= 1
        finished = set(states)
        frame = pd.read_parquet(tmp_path / "metrics")
        assert frame.cell_id.is_unique and set(frame.cell_id) == finished
        assert (frame.value == frame.cell_id.str[1:].astype(int)).all()
        counts = read_examples(tmp_path).groupby("cell_id").size()
        assert (counts == 2000).all() and finished <= set(counts.index), "a done cell has all its examples"
        start = len(finished)


def test_states_of_many_cells_parse_no_footer(tmp_path, monkeypatch):
    """A copy whose label is changed with it is a part of another cell, as far as the states are concerned."""
    write_cell(tmp_path, "0" * 16, [metric_row("0" * 16)])
    write_cell(tmp_path, "f" * 16, [error_row("f" * 16)])
    for unit, suffix in (("0" * 16, ".parquet"), ("f" * 16, ".error.parquet")):
        content = (tmp_path / "metrics" / f"{unit}{suffix}").read_bytes()
        for i in range(1, 1000):
            name = f"{i:015x}{unit[0]}"
            path = tmp_path / "metrics" / f"{name}{suffix}"
            path.write_bytes(content.replace(f'"holds": "{unit}"'.encode(), f'"holds": "{name}"'.encode()))
    parsed = []
    monkeypatch.setattr(pq, "read_metadata", parsed.append)
    states = cell_states(tmp_path)
    assert not parsed
    assert len(states) == 2000 and sum(state == "error" for state in states.values()) == 1000


def test_no_torch_and_no_pyarrow_until_they_are_needed():
    code = (
        "import sys, harness.tables.schema, harness.tables.store, harness.tables.provenance, harness.tables.text; "
        "bad = {'torch', 'pyarrow', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
