"""The page of a report: one HTML file that opens offline, with sentences, charts, tables and failures.

A measurement hands in plain values (`Page`), and `write_page` makes the file. Texts of the run (names of models and
tasks, examples, tracebacks) are escaped, or reach the page as data. Data, and the library that draws the charts
(plotly.js, taken from the package plotly), are compressed inside the file. A content security policy forbids the page
to load anything from anywhere.
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.files import replacing
from harness.tables.failures import last_line
from harness.tables.text import is_missing

if TYPE_CHECKING:
    import pandas

ASSETS = Path(__file__).with_name("assets")
NO_CHARTS = "no charts on the page: they need plotly, pip install 'spectral-ablation-harness[plots]'"
MOST_FAILURES = 50
LEVEL = 4  # of gzip: level 9 takes five times as long and saves 3 %
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
P_VALUES = ("p", "q", "p_value", "p_holm")  # names of columns
Kind = Literal["text", "number", "p"]


@dataclass(frozen=True)
class Column:
    """A column of a table. kind: how values are shown and filtered. shown: False if only the details of a row show it.

    help: a sentence that appears over its name.
    """

    name: str
    kind: Kind = "number"
    shown: bool = True
    help: str = ""


@dataclass(frozen=True)
class Example:
    """An example whose score changed: its id, its text (None if unknown), and one score for each name of the table."""

    name: str
    text: str | None
    scores: Sequence[float | None]


@dataclass(frozen=True)
class PageTable:
    """A table that can be sorted and filtered.

    values: for each column its values, text, numbers or None. examples: row -> the examples that are shown if the row
    is opened. score_names: the names of their scores. about_examples: a sentence above them. no_examples: a sentence in
    rows without examples.
    """

    title: str
    columns: Sequence[Column]
    values: Sequence[Sequence[Any]]
    note: str = ""
    examples: Mapping[int, Sequence[Example]] = field(default_factory=dict)
    score_names: Sequence[str] = ()
    about_examples: str = ""
    no_examples: str = ""


@dataclass(frozen=True)
class View:
    """A view of a chart: traces and layout in the JSON of plotly. label: its name in the list of views."""

    label: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart with one or more views, of which the reader chooses one.

    chooses: what the views differ by. opens: the table of the page whose row is opened by a click on a point, and shown
    by the pointer; the row is the point's `customdata`.
    """

    title: str
    caption: str
    views: Sequence[View]
    chooses: str = "view"
    opens: PageTable | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page. pictures: PNG files with their captions."""

    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[PageTable] = ()
    pictures: Sequence[tuple[Path, str]] = ()


@dataclass(frozen=True)
class Page:
    """The page of a report.

    headline: the result in one sentence. origin: how and where it was measured. problems: lines that a reader must
    see. settings: names and values. failures: (what failed, its traceback).
    """

    title: str
    headline: str
    sections: Sequence[Section]
    origin: str = ""
    problems: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[tuple[str, str]] = ()


def can_chart() -> bool:
    """Return whether plotly is installed, whose plotly.js draws the charts."""
    return find_spec("plotly") is not None


def write_page(page: Page, path: Path) -> None:
    """Write the page completely or not at all. Without plotly it has no charts, and says so. Raises OSError."""
    charted = can_chart()
    has_charts = any(section.charts for section in page.sections)
    if has_charts and not charted:
        page = _without_charts(page)
    tables = [table for section in page.sections for table in section.tables]
    number = {id(table): i for i, table in enumerate(tables)}
    charts: list[tuple[Chart, int | None]] = []
    body = [_header(page)]
    for i, section in enumerate(page.sections):
        body += [f'<section id="section-{i}"><h2>{_text(section.title)}</h2>']
        body += [f"<p>{_text(sentence)}</p>" for sentence in section.sentences]
        for chart in section.charts:
            body.append(f'<h3>{_text(chart.title)}</h3><figure class="chart" id="chart-{len(charts)}">'
                        f"<figcaption>{_text(chart.caption)}</figcaption></figure>")
            charts.append((chart, number.get(id(chart.opens))))
        body += [_picture(file, caption) for file, caption in section.pictures]
        for table in section.tables:
            note = f'<p class="soft">{_text(table.note)}</p>' if table.note else ""
            body.append(f'<h3>{_text(table.title)}</h3>{note}<div id="table-{number[id(table)]}"></div>')
        body.append("</section>")
    body += [_failures(page.failures), _settings(page.settings)]
    scripts = [_compressed("data", _data(tables, charts))]
    if has_charts and charted:
        scripts.append(f'<script type="text/plain" id="library">{_library()}</script>')
    scripts.append(f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>")
    whole = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(page.title)}</title>"
        f"<style>{(ASSETS / 'page.css').read_text(encoding='utf-8')}</style></head>\n<body>\n"
        + "\n".join(body) + "\n" + "\n".join(scripts) + "\n</body></html>\n"
    )
    with replacing(path, durable=False) as temporary:
        temporary.write_text(whole, encoding="utf-8", errors="backslashreplace")


def chart_text(text: str) -> str:
    """Return a text that plotly shows as it is: its labels know some tags and entities."""
    return html.escape(text, quote=False)


def frame_table(
    title: str, rows: pandas.DataFrame, help: Mapping[str, str] | None = None, shown: Sequence[str] | None = None,
    **others: Any,
) -> PageTable:
    """Return a DataFrame as a table. Columns without any value are left out.

    help: column -> a sentence. shown: the columns that are not only in the details; by default all.
    """
    there = rows.dropna(axis="columns", how="all")
    names = [str(name) for name in there.columns]
    if shown is not None:
        names = [name for name in shown if name in names] + [name for name in names if name not in shown]
    columns, values = [], []
    for name in names:
        kind: Kind = "text" if there[name].dtype.kind not in "iuf" else "p" if name in P_VALUES else "number"
        if kind == "text" and all(isinstance(one, (int, float)) and not isinstance(one, bool)
                                  for one in there[name].dropna()):
            kind = "number"
        columns.append(Column(name, kind, shown is None or name in shown, (help or {}).get(name, "")))
        values.append(there[name].tolist())
    return PageTable(title, columns, values, **others)


# ---------------------------------------------------------------- the parts of the file


def _text(text: object) -> str:
    return html.escape(str(text))


def _header(page: Page) -> str:
    links = [f'<a href="#section-{i}">{_text(section.title)}</a>' for i, section in enumerate(page.sections)]
    links += ['<a href="#failures">failures</a>'] * bool(page.failures)
    links += ['<a href="#settings">settings and versions</a>'] * bool(page.settings)
    return "\n".join([
        f'<header><h1>{_text(page.title)}</h1><p class="headline">{_text(page.headline)}</p>',
        *(f'<p class="problem">{_text(problem)}</p>' for problem in page.problems),
        f'<p class="soft">{_text(page.origin)}</p>' if page.origin else "",
        '<div class="problem" id="trouble" hidden></div>',
        '<noscript><p class="problem">Charts and tables need JavaScript. The Markdown page beside this one has the'
        " numbers.</p></noscript></header>",
        f"<nav>{' '.join(links)}</nav><main>",
    ])


def _picture(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure class="picture"><img alt="{_text(caption)}" src="data:image/png;base64,{content}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>")


def _failures(failures: Sequence[tuple[str, str]]) -> str:
    if not failures:
        return ""
    lines = ['<section id="failures"><h2>Failures</h2>']
    for what, traceback in failures[:MOST_FAILURES]:
        summary = f"{_text(what)}: {_text(last_line(traceback))}"
        lines.append(f"<details><summary>{summary}</summary><pre>{_text(traceback)}</pre></details>")
    if len(failures) > MOST_FAILURES:
        lines.append(f"<p>And {len(failures) - MOST_FAILURES} more; harness status --failed shows all of them.</p>")
    return "\n".join([*lines, "</section>"])


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "</main>"
    rows = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in settings.items())
    return (f'<section id="settings"><h2>Settings and versions</h2><div class="scroll"><table>{rows}</table></div>'
            "</section></main>")


def _without_charts(page: Page) -> Page:
    from dataclasses import replace

    sections = [replace(section, charts=()) for section in page.sections]
    return replace(page, sections=sections, problems=[*page.problems, NO_CHARTS])


def _data(tables: Sequence[PageTable], charts: Sequence[tuple[Chart, int | None]]) -> str:
    """Return tables and charts as JSON. Equal texts of examples are there once."""
    texts: dict[str, int] = {}

    def text_number(text: str | None) -> int | None:
        return None if text is None else texts.setdefault(text, len(texts))

    content = {
        "tables": [{
            "columns": [vars(column) for column in table.columns],
            "n": len(table.values[0]) if len(table.values) else 0,
            "data": [_plain(list(values)) for values in table.values],
            "examples": {row: [[one.name, text_number(one.text), *map(_plain, one.scores)] for one in examples]
                         for row, examples in table.examples.items()},
            "score_names": table.score_names, "about_examples": table.about_examples,
            "no_examples": table.no_examples,
        } for table in tables],
        "charts": [{"views": [_plain(vars(view)) for view in chart.views], "chooses": chart.chooses, "table": opens}
                   for chart, opens in charts],
        "texts": list(texts),
    }  # fmt: skip
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


_AS_IT_IS = frozenset((str, bool, int, type(None)))


def _plain(value: Any) -> Any:
    """Return a value of a table for JSON: numbers with six digits, because the tables of the run have all of them."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [one if type(one) in _AS_IT_IS else
                (float(f"{one:.6g}") if isfinite(one) else None) if type(one) is float else _plain(one)
                for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return None if is_missing(value) else str(value)


def _compressed(name: str, content: str) -> str:
    packed = gzip.compress(content.encode(errors="surrogatepass"), LEVEL, mtime=0)
    return f'<script type="text/plain" id="{name}">{base64.b64encode(packed).decode()}</script>'


@functools.cache
def _library() -> str:
    """Return plotly.js, compressed and as base64. The Python package is not imported, because that takes long."""
    spec = find_spec("plotly")
    assert spec is not None and spec.origin is not None  # `can_chart` was asked before
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(script.read_bytes(), LEVEL, mtime=0)).decode()
