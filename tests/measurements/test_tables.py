"""The tables of every measurement: documented, sound as a set, and readable without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.measurements import MEASUREMENTS
from harness.tables.schema import PROVENANCE, tables_markdown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", MEASUREMENTS.names())
def test_documentation_of_the_columns_is_up_to_date(name):
    page = (ROOT / "docs" / "tables.md").read_text()
    lacking = [line for line in tables_markdown(MEASUREMENTS[name].tables).splitlines() if line not in page]
    assert not lacking and tables_markdown(MEASUREMENTS[name].tables) in page, (
        f"docs/tables.md wants what harness.tables.schema.tables_markdown makes of the tables of {name}"
    )


@pytest.mark.parametrize("name", MEASUREMENTS.names())
def test_tables_are_sound(name):
    tables = MEASUREMENTS[name].tables
    assert tables.measurement == name and len(set(tables.names())) == len(tables.names())
    for table in tables.tables:
        assert all(column.doc.endswith(".") for column in table.columns)
        assert len(set(table.names())) == len(table.columns)
        assert [column.required for column in table.columns if column.name == tables.key] == [True]
    primary = {column.name: column for column in tables.primary.columns}
    assert primary["status"].required and not primary["error"].required
    assert set(tables.label) <= primary.keys()
    assert {column.name for column in PROVENANCE} <= primary.keys()


@pytest.mark.parametrize("name", MEASUREMENTS.names())
def test_tables_and_reports_import_without_torch_and_pyarrow(name):
    package = MEASUREMENTS[name].package
    code = f"import sys, {package}.tables, {package}.report; " \
           "print([m for m in ('torch', 'transformers', 'pyarrow', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
