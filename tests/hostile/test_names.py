"""Names with tags, control characters and formulas: what is printed is escaped for its medium."""

from __future__ import annotations

import csv
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli import main
from harness.engine.manifest import checksum_of
from harness.engine.plan import run_id
from harness.measurements.ablation.report import report
from harness.measurements.ablation.tables import TABLES
from harness.tables.store import write_unit
from harness.tables.text import file_stem, markdown_table, markdown_text
from tests.hostile.folders import manifest_of, write_manifest
from tests.tables.synthetic import error_row, metric_row

NAMES = {
    "tag": "<script>alert(1)</script>", "image": "![x](http://example.org/y)", "link": "[x](javascript:1)",
    "row": "a | b |", "heading": "a\n# b", "emphasis": "**a**", "code": "`a`", "entity": "&lt;b&gt;",
    "clears the screen": "\x1b[2Ja", "bell": "a\a", "return": "a\rb", "C1": "a\x9b2J", "right to left": "a\u202eb",
    "separator": "a\u2028b", "formula": "=cmd()|'/c calc'!A1", "sum": "@SUM(1)", "plus": "+1", "minus": "-1+1",
    "tab": "\t=1", "mathtext": r"$\frac$", "dollar": "a$b", "path": "../../a", "absolute": "/etc/a", "dot": "..",
    "long": "n" * 300,
}  # fmt: skip
# Two that differ only in a character that no file name may have.
ALIKE = ("a/b", "a:b", "a b", "a_b")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A study with a task for each name, which is also the name of a metric, a target, a region and a model."""
    folder = tmp_path_factory.mktemp("names") / "study"
    units = [f"u{i}" for i in range(len(NAMES))]
    manifest = {**manifest_of(units), "parts": list(NAMES.values()), "units": [[u, i] for i, u in enumerate(units)],
                "title": "\x1b[2Jmodel\n<b>"}
    write_manifest(folder, {**manifest, "checksum": checksum_of(manifest)})
    for unit, name in zip(units, NAMES.values()):
        row = metric_row(unit, name, task=name, target=name, region=name, model=name, delta=0.1, baseline=1.0)
        failed = error_row(unit, task=name, target=name) | {"error": f"Error: {name}"}
        write_unit(folder, TABLES, unit, {"metrics": [failed if name == NAMES["bell"] else row]}, run_id(units))
    said: list[str] = []
    report(folder, said.append)
    return folder, "\n".join(said)


def cannot_command(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_what_is_printed_cannot_command_a_terminal(reported, capsys):
    folder, said = reported
    assert cannot_command(said)
    assert main(["status", str(folder), "--failed"]) == 0
    printed = capsys.readouterr().out
    assert cannot_command(printed) and len(re.findall(r"^  .*: done", printed, re.MULTILINE)) == len(NAMES)


@pytest.mark.parametrize("name", [key for key in NAMES if key != "bell"])
def test_names_in_the_page_are_text(reported, name):
    page = (reported[0] / "report" / "report.md").read_text()
    assert cannot_command(page) and not re.search(r"<script|(?<!\\)\]\((http|javascript)|^# b|(?<!\\)\*\*a", page, re.M)
    assert f"## {markdown_text(NAMES[name])}: " in page
    for line in page.splitlines():
        if line.startswith("| ") and "baseline" not in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 11), line


def test_no_cell_of_the_csv_is_a_formula(reported):
    with (reported[0] / "report" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(NAMES)
    for row in rows:
        for column in ("task", "metric", "target", "region", "label"):
            assert not row[column].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert {row["task"].removeprefix("'") for row in rows} == set(NAMES.values())
    assert {row["value"] for row in rows} == {"20", ""}, "numbers are as they were"


def test_every_figure_is_inside_the_report_and_named_on_the_page(reported):
    folder = reported[0] / "report"
    files = {path.name for path in folder.glob("*.png")}
    assert len(files) == 8 and not list(folder.parent.parent.glob("*.png"))
    assert set(re.findall(r"\]\(([^)]*\.png)\)", (folder / "report.md").read_text())) == files


def test_alike_names_have_figures_of_their_own(tmp_path):
    units = [f"u{i}" for i in range(len(ALIKE))]
    write_manifest(tmp_path, manifest_of(units))
    for unit, name in zip(units, ALIKE):
        row = metric_row(unit, task=name, target_kind="type")
        write_unit(tmp_path, TABLES, unit, {"metrics": [row]}, run_id(units))
    report(tmp_path, [].append)
    names = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert names == [f"a{escape}b-token_perplexity-regions.png" for escape in ("_", "~20", "~2f", "~3a")]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=6)), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_stems(pairs):
    stems = [file_stem(*pair) for pair in pairs]
    assert len(set(stems)) == 2 and all(re.fullmatch(r"[A-Za-z0-9_.~-]+", stem) for stem in stems)


@pytest.mark.parametrize(("one", "other"), [
    (("a-b", "c"), ("a", "b-c")), (("a/b",), ("a_b",)), (("a",), ("a ",)), (("ä",), ("a",)), (("~20",), (" ",)),
    (("x" * 300,), ("x" * 301,)), (("\ud800",), ("\ud801",)),
])  # fmt: skip
def test_names_that_once_met(one, other):
    assert file_stem(*one) != file_stem(*other) and max(len(file_stem(*names)) for names in (one, other)) <= 200


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_is_one_cell_of_a_table(text):
    lines = markdown_table([{text: text}]).splitlines()
    assert len(lines) == 3 and all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 2 for line in lines)
