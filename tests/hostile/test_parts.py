"""Parts that are copied, renamed, alien or spoiled: never reported as another cell, quarantined by the next run."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.cli import main
from harness.engine.manifest import MANIFEST, require_own
from harness.engine.plan import run_id
from harness.engine.run import usable_states
from harness.errors import InputError
from harness.measurements import ABLATION
from harness.measurements.ablation import report
from harness.measurements.ablation.tables import TABLES, read_examples, read_metrics
from harness.tables import compact as compaction
from harness.tables import store
from harness.tables.identity import units_file
from tests.hostile.folders import UNITS, complaint, make_study, write_one

RUN = run_id(UNITS)
STATES = {"aaaa": "ok", "bbbb": "ok", "cccc": "ok", "dddd": "error"}
# Values by which rows of the study are told from those of others: unit -> value in its row.
OTHER = 99.0


def copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(exist_ok=True)
    shutil.copy(source, destination)


def rewrite(path: Path, change) -> None:
    """Write the part again with other rows or columns, but under the label that it has."""
    metadata, changed = pq.read_metadata(path).metadata, change(pq.ParquetFile(path).read())
    with pq.ParquetWriter(path, changed.schema, store_schema=False) as writer:
        writer.add_key_value_metadata(metadata)
        writer.write_table(changed)


def other_study(tmp_path: Path) -> Path:
    return make_study(tmp_path / "other", (*UNITS[:3], "eeee"), value=OTHER)


def of_other(table: str, name: str):
    return lambda f, tmp: copy(other_study(tmp) / table / name, f / table / name)


def merged_of_other(f: Path, tmp: Path) -> None:
    other = other_study(tmp)
    store.compact(other, TABLES, grace=0)
    for path in (other / "metrics").glob("*merged*"):
        copy(path, f / "metrics" / path.name)


def null_column(name):
    def change(table):
        i = table.schema.get_field_index(name)
        type = table.schema.types[i]
        return table.set_column(i, pa.field(name, type), pa.nulls(len(table), type))

    return change


def a_of(folder: Path) -> Path:
    return folder / "metrics" / "aaaa.parquet"


def b_of(folder: Path) -> Path:
    return folder / "metrics" / "bbbb.parquet"


# what is done to the folder of the study -> the states that are left without it, and the reason that is given
CASES = {
    "a copy under the name of a missing unit": (
        lambda f, _: b_of(f).unlink() or copy(a_of(f), b_of(f)),
        {"bbbb"}, "it holds 'aaaa', done, not bbbb, done"),
    "a copy over another unit": (
        lambda f, _: copy(a_of(f), b_of(f)), {"bbbb"}, "it holds 'aaaa', done"),
    "a renamed part": (
        lambda f, _: os.rename(a_of(f), b_of(f)), {"aaaa", "bbbb"},
        "it holds 'aaaa', done"),
    "a copy under the name of no unit": (
        lambda f, _: copy(a_of(f), f / "metrics/zzzz.parquet"), set(), "it holds 'aaaa', done"),
    "a copy with a name for people": (
        lambda f, _: copy(a_of(f), f / "metrics/aaaa (copy).parquet"), set(), "it holds 'aaaa', done"),
    "a part of another study": (of_other("metrics", "aaaa.parquet"), {"aaaa"}, "it belongs to the run"),
    "a part of another study for a unit that this has not": (
        of_other("metrics", "eeee.parquet"), set(), "it belongs to the run"),
    "examples of another study": (of_other("examples", "aaaa.parquet"), {"aaaa"}, "it belongs to the run"),
    "a part of another table": (
        lambda f, _: copy(f / "examples/aaaa.parquet", a_of(f)), {"aaaa"},
        "it holds the table 'ablation.examples', not ablation.metrics"),
    "a part of another table among the examples": (
        lambda f, _: copy(a_of(f), f / "examples/aaaa.parquet"), {"aaaa"},
        "it holds the table 'ablation.metrics', not ablation.examples"),
    "a failure named as a success": (
        lambda f, _: os.rename(f / "metrics/dddd.error.parquet", f / "metrics/dddd.parquet"), {"dddd"},
        "it holds 'dddd', failed, not dddd, done"),
    "a success named as a failure": (
        lambda f, _: os.rename(a_of(f), f / "metrics/aaaa.error.parquet"), {"aaaa"},
        "it holds 'aaaa', done, not aaaa, failed"),
    "a success named as merged": (
        lambda f, _: os.rename(a_of(f), f / "metrics/merged-aaaa.parquet"), {"aaaa"},
        "it holds 'aaaa', done, not merged-aaaa, merged"),
    "a merged part of another study": (merged_of_other, set(), "it belongs to the run"),
    "a part of no harness": (
        lambda f, _: pd.DataFrame({"cell_id": ["aaaa"]}).to_parquet(a_of(f)), {"aaaa"},
        "it does not say to which run it belongs"),
    "an empty part": (lambda f, _: a_of(f).write_bytes(b""), {"aaaa"}, "truncated"),
    "a part with a footer that is none": (
        lambda f, _: a_of(f).write_bytes(b"PAR1" + b"x" * 60 + b"\x20\0\0\0PAR1"), {"aaaa"},
        "Couldn't deserialize"),
    "a footer longer than the file": (
        lambda f, _: a_of(f).write_bytes(b"PAR1xxxx\xff\xff\xff\xffPAR1"), {"aaaa"}, "truncated"),
    "a text": (lambda f, _: a_of(f).write_text("hello, this is no parquet"), {"aaaa"}, "truncated"),
    "a folder": (
        lambda f, _: a_of(f).unlink() or a_of(f).mkdir(), {"aaaa"}, "truncated"),
    "a pipe": (
        lambda f, _: a_of(f).unlink() or os.mkfifo(a_of(f)), {"aaaa"}, "truncated"),
    "a link to nothing": (
        lambda f, _: a_of(f).unlink() or a_of(f).symlink_to("nowhere"), {"aaaa"},
        "truncated"),
    "a link in a circle": (
        lambda f, _: a_of(f).unlink() or a_of(f).symlink_to("aaaa.parquet"),
        {"aaaa"}, "truncated"),
}  # fmt: skip
# The same for parts whose label is right, and whose rows or columns are not: only reading them shows it.
DEEP = {
    "rows of another unit": (
        lambda t: t.set_column(t.schema.get_field_index("cell_id"), t.schema.field("cell_id"), pa.array(["bbbb"])),
        "its rows belong to bbbb, not to aaaa"),
    "a failed row in a part that is done": (
        lambda t: t.set_column(t.schema.get_field_index("status"), t.schema.field("status"), pa.array(["error"])),
        "its rows have the status error, which is not that of a done part"),
    "no rows": (lambda t: t.slice(0, 0), "its rows have the status of nothing"),
    "a column too many": (lambda t: t.append_column("extra", pa.array([1])), "its columns are not those .*: extra"),
    "a column too few": (lambda t: t.drop_columns(["delta"]), "its columns are not those of the table: delta"),
    "columns in another order": (lambda t: t.select(t.column_names[::-1]), "its columns are not those .*: their order"),
    "a column of another type": (
        lambda t: t.set_column(t.schema.get_field_index("n"), "n", pa.array(["many"])), "its columns .*: n"),
    "a required column that is null": (null_column("target"), "its columns are not those of the table: target"),
    "a null id": (null_column("cell_id"), "its columns are not those of the table: cell_id"),
}  # fmt: skip


def rows_are_own(folder: Path, units: set[str]) -> None:
    """What is read belongs to these units, each once, and has no value of another study."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, examples = read_metrics(folder), read_examples(folder)
    assert set(found.cell_id) == units and found.cell_id.is_unique and OTHER not in set(found.value)
    assert (found.status == ["error" if unit == "dddd" else "ok" for unit in found.cell_id]).all()
    assert not examples.duplicated(["cell_id", "example_id"]).any()


@pytest.mark.parametrize("case", CASES)
def test_a_part_that_is_not_what_its_place_says(tmp_path, capsys, case):
    spoil, lost, reason = CASES[case]
    folder = make_study(tmp_path / "study")
    spoil(folder, tmp_path)
    in_examples = "examples" in case
    own = set(UNITS) - lost
    rows_are_own(folder, set(UNITS) if in_examples else own)

    assert main(["status", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"done {len(own - {'dddd'})}" in printed and f"missing {len(lost)}" in printed
    assert f"is not used: {reason}" in printed
    if not in_examples:
        assert main(["report", str(folder)]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
        assert len(told) == 1 and told[0].startswith("harness: ") and reason in told[0]
    assert main(["compact", str(folder)]) == 0
    rows_are_own(folder, set(UNITS) if in_examples else own)

    # the start of a run
    assert usable_states(ABLATION, folder) == {unit: STATES[unit] for unit in own}
    assert len(list((folder / "corrupt").iterdir())) >= 1
    for unit in lost:
        write_one(folder, unit, RUN)
    assert store.unit_states(folder, TABLES, verify=True) == STATES
    assert not store.corrupt_parts(folder, TABLES, deep=True)
    rows_are_own(folder, set(UNITS))
    assert set(read_examples(folder).cell_id) == set(UNITS)


@pytest.mark.parametrize("merged", [False, True], ids=["loose", "merged"])
@pytest.mark.parametrize("case", DEEP)
def test_a_part_whose_rows_are_not_those_of_its_label(tmp_path, case, merged):
    change, reason = DEEP[case]
    if merged and case in ("rows of another unit", "a column too many", "a column of another type", "no rows"):
        pytest.skip("this change is of the one row of a loose part")
    folder = make_study(tmp_path / "study")
    part, lost = folder / "metrics" / "aaaa.parquet", {"aaaa"}
    if merged:
        store.compact(folder, TABLES, grace=0)
        (part,), lost = (folder / "metrics").glob("merged-*.parquet"), {"aaaa", "bbbb", "cccc"}
        if case == "a failed row in a part that is done":
            change, reason = (lambda t: t.set_column(t.schema.get_field_index("status"), t.schema.field("status"),
                                                     pa.array(["ok", "error", "ok"]))), "its rows have the status"
    rewrite(part, change)
    with pytest.warns(store.SkippedParts, match=f"{part.name}: {reason}.*; skipped"):
        assert set(read_metrics(folder).cell_id) == set(UNITS) - lost
    rows_are_own(folder, set(UNITS) - lost)
    assert usable_states(ABLATION, folder, deep=True) == {unit: STATES[unit] for unit in UNITS if unit not in lost}
    for unit in lost:
        write_one(folder, unit, RUN)
    rows_are_own(folder, set(UNITS))


LISTS = {
    "units that are not in the part": lambda path: path.write_text(path.read_text() + "\nzzzz\ndddd"),
    "units missing from the list": lambda path: path.write_text("aaaa"),
    "no list": lambda path: path.unlink(),
    "an empty list": lambda path: path.write_text(""),
    "a list of paths": lambda path: path.write_text("../../aaaa\n/etc/passwd"),
    "bytes that are no text": lambda path: path.write_bytes(b"\xff\xfe\0aaaa"),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_units_that_does_not_fit_its_part(tmp_path, case):
    """The part itself then says which units it holds."""
    folder = make_study(tmp_path / "study")
    store.compact(folder, TABLES, grace=0)
    for table in TABLES.names():
        (part,) = (folder / table).glob("merged-*.parquet")
        LISTS[case](units_file(part))
    assert store.unit_states(folder, TABLES, verify=True) == STATES
    rows_are_own(folder, set(UNITS))
    write_one(folder, "aaaa", RUN, value=OTHER)  # it is merged, so it is not written again
    rows_are_own(folder, set(UNITS))
    assert usable_states(ABLATION, folder) == STATES and not (folder / "corrupt").exists()


@pytest.mark.parametrize("case", ["a list of paths", "bytes that are no text", "a folder", "no list"])
def test_a_list_of_a_merged_part_that_is_damaged(tmp_path, case):
    """Its units cannot be known: those of the primary table count as missing. No file outside is touched."""
    folder = make_study(tmp_path / "study")
    store.compact(folder, TABLES, grace=0)
    (part,) = (folder / "metrics").glob("merged-*.parquet")
    LISTS[case](units_file(part))
    part.write_bytes(b"")
    assert usable_states(ABLATION, folder) == {"dddd": "error"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study"]


PLACES = {".redo": "work", "corrupt": "work", ".tmp": "work", "report": "report", ".lock": "compact",
          "metrics": "status"}


@pytest.mark.parametrize("name", PLACES)
def test_a_file_in_the_place_of_a_folder(tmp_path, capsys, name):
    folder = make_study(tmp_path / "study")
    path = folder / name
    if PLACES[name] == "work":
        (folder / "metrics" / "aaaa.parquet").write_bytes(b"")
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.mkdir() if name == ".lock" else path.write_text("a file")
    if PLACES[name] == "work":
        with pytest.raises((InputError, OSError)) as raised:
            if name == ".redo":
                (folder / "examples" / "bbbb.parquet").write_bytes(b"")
            usable_states(ABLATION, folder)
            write_one(folder, "aaaa", RUN)
        assert str(path) in str(raised.value)
        return
    for command in ("status", "report", "compact") if name == "metrics" else (PLACES[name],):
        assert str(path) in complaint(capsys, command, str(folder))


@pytest.mark.parametrize("command", ["report", "compact"])
def test_a_disk_without_room(tmp_path, capsys, monkeypatch, command):
    folder = make_study(tmp_path / "study")

    def full(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(compaction, "_write_text", full)
    monkeypatch.setattr(report, "write_text", full)
    line = complaint(capsys, command, str(folder))
    assert "No space left on device; make room on the disk" in line and str(folder) in line
    monkeypatch.undo()
    assert main([command, str(folder)]) == 0
    rows_are_own(folder, set(UNITS))


@pytest.mark.parametrize("command", ["report", "compact"])
def test_a_folder_that_may_only_be_read(tmp_path, capsys, monkeypatch, command):
    """The system refuses every new file; tests run as root, for whom permissions are not enough."""
    folder = make_study(tmp_path / "study")
    real = os.mkdir

    def refused(path, *rest, **more):
        if str(tmp_path) in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refused)
    assert "Read-only file system; the file system is read-only" in complaint(capsys, command, str(folder))


def test_a_folder_without_its_manifest_is_not_taken_over(tmp_path):
    folder = make_study(tmp_path / "study")
    (folder / MANIFEST).unlink()
    own, other = (SimpleNamespace(folder=folder, id=one, settings={}) for one in (RUN, "0123456789ab"))
    assert require_own(ABLATION, own) is False
    with pytest.raises(InputError, match=f"has no manifest.json, .* belongs to the run '{RUN}', not to 0123"):
        require_own(ABLATION, other)
    for path in [*folder.glob("metrics/*.parquet"), *folder.glob("examples/*.parquet")]:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="belongs to an unknown run"):
        require_own(ABLATION, own)
    for table in TABLES.names():
        shutil.rmtree(folder / table)
    (folder / "data").mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(folder / "data" / "mine.parquet")
    assert require_own(ABLATION, other) is False, "a file of the user is in nobody's way"
