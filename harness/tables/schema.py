"""The description of a table, which is its columns with their types and meanings, and of the tables of a measurement.

pyarrow is imported only when an Arrow schema is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.errors import InputError

if TYPE_CHECKING:
    import pyarrow

UNIT_ID = re.compile(r"[A-Za-z0-9_\-]+")  # what the id of a unit may be, because files are named after it
VERSION_KEY = b"harness.schema_version"
TABLE_KEY = b"harness.table"


class SchemaVersionError(InputError):
    """A parquet file was written under another schema version, or by another program."""


@dataclass(frozen=True)
class Column:
    """One column.

    type: "string", "float64", "int64" or "bool". doc: its meaning, for the documentation. required: it is never null.
    """

    name: str
    type: str
    doc: str
    required: bool = False


def required(name: str, type: str, doc: str) -> Column:
    """Return a column that is never null."""
    return Column(name, type, doc, required=True)


@dataclass(frozen=True)
class Table:
    """One table. title: what one of its rows is, for the documentation."""

    name: str
    title: str
    columns: tuple[Column, ...]

    def names(self) -> tuple[str, ...]:
        """Return the names of the columns, in order."""
        return self._names

    def keyed(self, described: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return columns of this table together with those of `described`, which says what they are of, that it has."""
        names = self.names()
        return {**{name: value for name, value in described.items() if name in names}, **columns}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def blank(self) -> dict[str, None]:
        """Return a row in which every column is null, to be filled in."""
        return dict.fromkeys(self.names())


@dataclass(frozen=True)
class TableSet:
    """The tables that a measurement writes.

    measurement: its name.
    version: the version of the schema. A folder of another version is refused, so that versions are never mixed.
    tables: the first is the primary table, which has the columns `status` ("ok" or "error") and `error`. A unit is done
        when its rows are in the primary table; its rows of the other tables are written before.
    key: the column with the id of the unit, in every table.
    label: the columns of the primary table that tell a reader which unit a row belongs to.
    """

    measurement: str
    version: int
    tables: tuple[Table, ...]
    key: str
    label: tuple[str, ...] = ()

    @property
    def primary(self) -> Table:
        """The table that says which units are done."""
        return self.tables[0]

    @property
    def others(self) -> tuple[Table, ...]:
        """All tables but the primary one."""
        return self.tables[1:]

    def __getitem__(self, name: str) -> Table:
        """Return the table of a name. Raises KeyError."""
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(f"{name}: no table of {self.measurement}; there are {', '.join(self.names())}")

    def names(self) -> tuple[str, ...]:
        """Return the names of the tables, the primary one first."""
        return tuple(table.name for table in self.tables)

    def arrow_schema(self, name: str) -> pyarrow.Schema:
        """Return the schema of one table for pyarrow, whose metadata holds the version and the name of the table."""
        return self._arrow_schemas[self[name].name]

    @cached_property
    def _arrow_schemas(self) -> dict[str, pyarrow.Schema]:
        import pyarrow as pa

        types = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
        return {
            table.name: pa.schema(
                [pa.field(c.name, types[c.type], nullable=not c.required) for c in table.columns],
                metadata={VERSION_KEY: str(self.version).encode(), TABLE_KEY: self.qualified(table.name).encode()},
            )
            for table in self.tables
        }

    def qualified(self, name: str) -> str:
        """Return the name of a table together with that of its measurement."""
        return f"{self.measurement}.{name}"

    def check_version(self, path: object, found: object) -> None:
        """Raise SchemaVersionError unless `found`, which the parquet file at `path` says, is the version of these."""
        if found != self.version:
            raise SchemaVersionError(
                f"{path}: written under schema version {found}, this harness reads version {self.version}; "
                "choose a new output folder, or use the harness version that wrote this one"
            )


# Columns that say where and when a unit was measured. The engine fills them in.
PROVENANCE = (
    Column("started_at", "string", "When the process started, UTC, ISO 8601."),
    Column("hostname", "string", "Machine that measured it."),
    Column("harness_version", "string", "Version of this package."),
    Column("git_commit", "string", "Commit of the checkout, `+dirty` with local changes; null when installed."),
    Column("torch_version", "string", "Version of torch."),
    Column("transformers_version", "string", "Version of transformers."),
    Column("python_version", "string", "Version of Python."),
)


def tables_markdown(tables: TableSet) -> str:
    """Return a description of all tables and columns of a measurement in Markdown, as a chapter for docs/."""
    lines = [f"## {tables.measurement}: schema version {tables.version}"]
    for table in tables.tables:
        lines += ["", f"### `{table.name}`: {table.title}", "", "| column | type | meaning |", "|---|---|---|"]
        for c in table.columns:
            doc = c.doc.replace("|", "\\|")
            lines.append(f"| `{c.name}`{'*' if c.required else ''} | {c.type} | {doc} |")
    return "\n".join(lines) + "\n"
