"""Print the page of all tables, for the command `python -m harness.measurements > docs/tables.md`."""

from harness.measurements import tables_page

print(tables_page(), end="")
