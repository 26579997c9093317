"""Table sets: what they are, how they are documented, and that any set of tables goes through the store."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from harness.tables import store
from harness.tables.schema import Column, SchemaVersionError, Table, TableSet, required, tables_markdown

PROBES = TableSet(
    "probes", 3,
    (
        Table("answers", "one row per probe", (
            required("probe_id", "string", "The probe."), required("status", "string", "`ok` or `error`."),
            Column("error", "string", "Why."), Column("score", "float64", "The score, of `a|b`."),
        )),
        Table("steps", "one row per step", (
            required("probe_id", "string", "The probe."), required("step", "int64", "The step."),
        )),
        Table("notes", "one row per note", (
            required("probe_id", "string", "The probe."), Column("right", "bool", "Whether it is right."),
        )),
    ),
    key="probe_id", label=("score",),
)  # fmt: skip


def answer(probe, **changes):
    return PROBES["answers"].blank() | {"probe_id": probe, "status": "ok", "score": 0.5} | changes


def steps(probe, n=3):
    return {"probe_id": probe, "step": list(range(n))}


def test_tables_of_a_set():
    assert PROBES.names() == ("answers", "steps", "notes")
    assert PROBES.primary is PROBES["answers"] and [table.name for table in PROBES.others] == ["steps", "notes"]
    assert PROBES["answers"].names() == ("probe_id", "status", "error", "score")
    assert PROBES["steps"].blank() == {"probe_id": None, "step": None}
    with pytest.raises(KeyError, match="metrics: no table of probes; there are answers, steps, notes"):
        PROBES["metrics"]


def test_arrow_schema_carries_types_version_and_name():
    schema = PROBES.arrow_schema("answers")
    assert schema.types == [pa.string(), pa.string(), pa.string(), pa.float64()]
    assert [field.nullable for field in schema] == [False, False, True, True]
    assert schema.metadata == {b"harness.schema_version": b"3", b"harness.table": b"probes.answers"}
    PROBES.check_version("here", 3)
    for other in (None, 2, "3"):
        with pytest.raises(SchemaVersionError, match=f"here: written under schema version {other}, .* version 3"):
            PROBES.check_version("here", other)


def test_documentation_of_a_set():
    text = tables_markdown(PROBES)
    assert text.startswith("## probes: schema version 3\n\n### `answers`: one row per probe\n")
    assert "| `step`* | int64 | The step. |\n" in text and "| `right` | bool | Whether it is right. |\n" in text
    assert "of `a\\|b`." in text


def test_any_set_of_tables_goes_through_the_store(tmp_path):
    """Tables that some units have and others have not; failures; damage to one table; compaction."""
    store.write_unit(tmp_path, PROBES, "a", {"answers": [answer("a")], "steps": steps("a")}, "run")
    store.write_unit(tmp_path, PROBES, "b", {
        "answers": {"probe_id": "b", "status": "ok", "error": None, "score": [1.0, 2.0]}, "steps": steps("b", 1),
        "notes": [{"probe_id": "b", "right": True}, {"probe_id": "b", "right": None}],
    }, "run")  # fmt: skip
    store.write_unit(tmp_path, PROBES, "c", {"answers": [answer("c", status="error", error="boom", score=None)]}, "run")
    for _ in range(2):
        assert store.unit_states(tmp_path, PROBES, verify=True) == {"a": "ok", "b": "ok", "c": "error"}
        assert store.read_table(tmp_path, PROBES, "answers").score.tolist()[:3] == [0.5, 1.0, 2.0]
        assert store.read_table(tmp_path, PROBES, "steps").probe_id.tolist() == ["a"] * 3 + ["b"]
        notes = store.read_table(tmp_path, PROBES, "notes", ["a", "b"])
        assert notes.probe_id.tolist() == ["b", "b"] and notes.right.tolist() == [True, None]
        store.compact(tmp_path, PROBES, grace=0)
    assert len(list((tmp_path / "answers").glob("merged-*"))) == len(list((tmp_path / "steps").glob("merged-*"))) == 1
    assert (tmp_path / "notes" / "b.parquet").is_file(), "one file alone is not merged"
    (tmp_path / "notes" / "b.parquet").write_bytes(b"cut")
    before = store.read_table(tmp_path, PROBES, "answers")
    assert [part.units for part in store.quarantine(tmp_path, PROBES)] == [("b",)]
    assert store.unit_states(tmp_path, PROBES) == {"a": "ok", "c": "error"}
    store.write_unit(tmp_path, PROBES, "b", {
        "answers": [answer("b", score=1.0), answer("b", score=2.0)], "steps": steps("b", 1),
        "notes": [{"probe_id": "b", "right": False}],
    }, "run")  # fmt: skip
    assert store.unit_states(tmp_path, PROBES) == {"a": "ok", "b": "ok", "c": "error"}
    pd.testing.assert_frame_equal(store.read_table(tmp_path, PROBES, "answers"), before)
    assert store.read_table(tmp_path, PROBES, "notes").right.tolist() == [False]


def test_a_crash_between_tables_leaves_the_unit_undone(tmp_path, monkeypatch):
    """The primary table is written last, wherever it stands among the rows."""
    from harness.tables import writer

    published, publish = [], writer._publish

    def dies(folder, tables, table, *rest):
        if table == "answers":
            raise OSError("disk full")
        publish(folder, tables, table, *rest)
        published.append(table)

    monkeypatch.setattr(writer, "_publish", dies)
    notes = [{"probe_id": "a", "right": True}]
    with pytest.raises(OSError, match="disk full"):
        rows = {"answers": [answer("a")], "notes": notes, "steps": steps("a")}
        store.write_unit(tmp_path, PROBES, "a", rows, "run")
    assert published == ["steps", "notes"] and store.unit_states(tmp_path, PROBES, verify=True) == {}
