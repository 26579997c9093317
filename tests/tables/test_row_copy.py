"""The copy of the rows in the footer of a loose file: equal to the pages, and not used if the file was changed."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.measurements.ablation.tables import TABLES, read_metrics
from harness.tables import rows as rows_module
from harness.tables.identity import Part
from harness.tables.parts import unit_bytes
from harness.tables.row_copy import MOST_ROWS, Copies
from harness.tables.rows import read_loose
from tests.tables.synthetic import RUN, error_row, metric_row, write_cell

SCHEMA = TABLES.arrow_schema("metrics")
ODD = [
    metric_row("a", value=0.1 + 0.2, stderr=-0.0, delta=5e-324, delta_stderr=math.inf, p_value=None, n=2**62,
               higher_is_better=True, revision='ä\n"\\ \U0001f600 harness.rows 0123'),
    metric_row("a", value=5.0, stderr=1.7976931348623157e308, block=None, higher_is_better=None, n=-1),
]


def part_of(folder, rows: list[dict], cell: str = "a") -> Part:
    part = Part(folder / f"{cell}.parquet", TABLES, "metrics", RUN)
    part.path.write_bytes(unit_bytes(pa.Table.from_pylist(rows, schema=SCHEMA), part, few_rows=True))
    return part


def test_the_copy_is_what_the_pages_hold(tmp_path, monkeypatch):
    part = part_of(tmp_path, ODD)
    of_pages = pq.ParquetFile(part.path).read()
    with monkeypatch.context() as only:
        only.setattr(rows_module, "_decoded", lambda *_: pytest.fail("the pages were read"))
        found, bad = read_loose([part])
    assert not bad and found.equals(of_pages) and found.schema.equals(SCHEMA)
    assert math.copysign(1, found["stderr"][0].as_py()) == -1, "equal does not tell -0.0 from 0.0"
    nan = pa.Table.from_pylist(ODD, schema=SCHEMA).set_column(
        SCHEMA.get_field_index("value"), SCHEMA.field("value"), pa.array([math.nan, None]))
    part.path.write_bytes(unit_bytes(nan, part, few_rows=True))
    values = read_loose([part])[0]["value"].to_pylist()
    assert math.isnan(values[0]) and values[1] is None


def test_no_byte_of_a_file_can_change_without_the_copy_being_left_unused(tmp_path):
    content = part_of(tmp_path, ODD[:1]).path.read_bytes()
    assert Copies(SCHEMA).add(content) == 1
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        assert Copies(SCHEMA).add(bytes(changed)) == 0, at
    for cut in (0, 3, 8, 100, len(content) - 1):
        assert Copies(SCHEMA).add(content[:cut]) == 0


def test_a_file_that_another_program_wrote_with_its_metadata_has_its_new_numbers(tmp_path):
    write_cell(tmp_path, "a", ODD)
    path = tmp_path / "metrics" / "a.parquet"
    table = pq.read_table(path)
    changed = table.set_column(SCHEMA.get_field_index("value"), SCHEMA.field("value"), pa.array([7.5, 8.5]))
    metadata = pq.read_metadata(path).metadata
    with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False, write_statistics=False,
                          store_schema=False, write_page_checksum=True) as writer:  # as the harness does
        writer.write_table(changed)
        writer.add_key_value_metadata(metadata)
    assert b"harness.rows" in pq.read_metadata(path).metadata
    assert read_metrics(tmp_path)["value"].tolist() == [7.5, 8.5]


def test_a_copy_of_other_columns_is_not_used(tmp_path):
    content = part_of(tmp_path, ODD[:1]).path.read_bytes()
    renamed = pa.schema([field.with_name("other") if field.name == "value" else field for field in SCHEMA])
    retyped = pa.schema([field.with_type(pa.float64()) if field.name == "n" else field for field in SCHEMA])
    for schema in (renamed, retyped, pa.schema(list(SCHEMA)[::-1]), pa.schema(list(SCHEMA)[:-1])):
        assert Copies(schema).add(content) == 0


def test_files_with_and_without_a_copy_are_read_together(tmp_path):
    many = [metric_row("m", f"metric {i}") for i in range(MOST_ROWS + 1)]
    write_cell(tmp_path, "a", ODD)
    write_cell(tmp_path, "e", [error_row("e")])
    write_cell(tmp_path, "m", many)
    assert b"harness.rows" not in (pq.read_metadata(tmp_path / "metrics" / "m.parquet").metadata or {})
    found = read_metrics(tmp_path)
    assert found["cell_id"].tolist() == ["a", "a", "e", *["m"] * len(many)]
    assert found["metric"].tolist()[3:] == [row["metric"] for row in many]
