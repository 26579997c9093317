"""The page of a report: effects and their intervals, examples, and what a real browser makes of it."""

from __future__ import annotations

import base64
import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest

from harness.engine.manifest import MANIFEST_VERSION, checksum_of
from harness.evaluation.requests import DirectTask, ExampleScores, Request, ScoredTask, continuation_request
from harness.evaluation.statistics import mean_stderr, paired
from harness.files import write_json
from harness.measurements.ablation import page as ablation_page
from harness.measurements.ablation.effects import effects
from harness.measurements.ablation.report import report
from harness.measurements.ablation.summary import measured
from harness.measurements.ablation.tables import TABLES, read_examples, read_metrics
from harness.measurements.ablation.texts import FILE, read_texts, write_texts
from harness.tables import page as page_module
from harness.tables.identity import MANIFEST
from harness.tables.store import compact
from tests.browser import browser, chromium
from tests.tables.synthetic import RUN, error_row, example_columns, metric_row, sized, study_rows, targets, write_cell

HOSTILE = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script></script>&amp;%{x}$a$"


# ---------------------------------------------------------------- effects


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(8), [1, 2, 3, 4, 5, 6, 9, 10])])
def test_the_interval_of_a_ratio_is_that_of_the_paired_log_likelihoods(clusters):
    from scipy.stats import t

    random = np.random.default_rng(0)
    before, change = random.normal(3, 0.5, 40), random.normal(0.4, 0.3, 40)
    scores = [ExampleScores(one, np.ones(40), "exp", False, clusters=clusters) for one in (before, before + change)]
    found = paired(scores[1], scores[0])
    values = [float(np.exp(one.score.mean())) for one in scores]
    stderr, n, freedom = mean_stderr(change, clusters)
    row = metric_row("a", value=values[1], baseline=values[0], delta=found.delta, delta_stderr=found.stderr,
                     p_value=found.p_value, n=40, n_clusters=n, delta_freedom=freedom)
    one = effects(measured(pd.DataFrame([row]))[0])
    half = t.ppf(0.975, freedom) * stderr
    expected = np.exp([change.mean(), change.mean() - half, change.mean() + half])
    assert one.ratio and np.allclose(one.rows.iloc[0], expected, rtol=1e-10)


def test_effects_of_other_metrics_adaptive_rows_and_single_clusters():
    def of(**columns):
        row = metric_row("a", "accuracy", value=0.5, baseline=0.6, delta=-0.1, delta_stderr=0.02, p_value=0.01, n=10,
                         higher_is_better=True) | columns
        found = effects(measured(pd.DataFrame([row]))[0])
        assert not found.ratio
        return found.rows.iloc[0].tolist()

    assert np.allclose(of(), [-0.1, -0.1 - 2.262157 * 0.02, -0.1 + 2.262157 * 0.02], atol=1e-7)
    assert of(precision="adaptive", ci_low=-0.3, ci_high=0.1) == [-0.1, -0.3, 0.1]
    assert of(delta_low=-0.15, delta_high=-0.04) == [-0.1, -0.15, -0.04]
    assert np.isnan(of(n_clusters=1)[1])


# ---------------------------------------------------------------- texts


class Letters:
    """A tokenizer whose token 0 is "a"."""

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def test_texts_of_examples(tmp_path):
    choices = [continuation_request([0, 1, 2], [end, 4]) for end in (3, 5)]
    filled = Request(np.array([0, 1, 2]), np.array([1]), np.array([7]))
    tasks = {
        "one": ScoredTask("one", {}, [choices[0]], ["x"], lambda scores: {}),
        "choice": ScoredTask("choice", {}, choices, ["y"], lambda scores: {}, example_of=np.array([0, 0])),
        "long": ScoredTask("long", {}, [continuation_request([0] * 70, [1] * 50)], ["0"], lambda scores: {}),
        "masked": ScoredTask("masked", {}, [filled], ["m"], lambda scores: {}),
        "direct": DirectTask("direct", {}, ["d"], lambda *_: {}, [[2, 1, 0]]),
    }
    write_json(tmp_path / MANIFEST, {"id": RUN})
    write_texts(tmp_path, RUN, tasks, Letters())
    assert read_texts(tmp_path) == {
        "one": {"x": "abc → de"}, "choice": {"y": "abc → 1) de | 2) fe"}, "masked": {"m": "abc"},
        "direct": {"d": "cba"}, "long": {"0": f"…{'a' * 60} → {'b' * 40}…"},
    }  # fmt: skip
    write_json(tmp_path / MANIFEST, {"id": "another study"})
    assert read_texts(tmp_path) == {}
    (tmp_path / FILE).write_bytes(b"\xff")
    assert read_texts(tmp_path) == {}


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study with the names of an enemy, a failed cell, and examples whose texts are kept."""
    folder = tmp_path_factory.mktemp("study")
    whole = {"manifest_version": MANIFEST_VERSION, "kind": "ablation", "id": RUN, "working_directory": "/", "title": "",
             "settings": {"model": {"name": HOSTILE}}, "parts": ["text"], "units": [["baseline", 0]]}
    write_json(folder / MANIFEST, {**whole, "checksum": checksum_of(whole)})
    rows = study_rows(targets("matrix", 3), sized((0.1,)), (("token_perplexity", False), ("nll", False)), task=HOSTILE)
    by_cell: dict[str, list] = {}
    for i, row in enumerate(rows):
        cell = "baseline" if row["target"] == "baseline" else f"c{i % (len(rows) // 2):04d}"
        by_cell.setdefault(cell, []).append(row | {"cell_id": cell, "model": HOSTILE, "n": 5})
    for cell, of_cell in list(by_cell.items())[:60]:
        columns = example_columns(cell) | {"task": HOSTILE}
        columns["score"] = [score + (i == 3) * (cell != "baseline") for i, score in enumerate(columns["score"])]
        write_cell(folder, cell, of_cell, columns)
    write_cell(folder, "bad", [error_row("bad", model=HOSTILE) | {"task": HOSTILE, "error": f"Trace\n{HOSTILE}"}])
    write_json(folder / FILE, {"study_id": RUN, "tasks": {HOSTILE: {f"e{i}": f"text {i} {HOSTILE}" for i in range(5)}}})
    report(folder, write=lambda text: None, figures=False)
    return folder / "report" / "index.html"


def test_a_report_is_the_same_from_loose_and_merged_files_and_notices_a_new_number(tmp_path, monkeypatch):
    """The examples of all tasks are read at once, and each task shows those of its own cells."""
    read = []
    monkeypatch.setattr(ablation_page, "read_examples", lambda *said: read.append(said) or read_examples(*said))
    for task in ("one", "other"):
        for row in study_rows(targets("matrix", 2), sized((0.1,)), task=task):
            columns = example_columns(row["cell_id"]) | {"task": task}
            columns["example_id"] = [f"{task} {i}" for i in range(5)]
            columns["score"] = [score + (row["target"] != "baseline") * (i + 1) for i, score in
                                enumerate(columns["score"])]
            write_cell(tmp_path, row["cell_id"], [row | {"n": 5}], columns)

    def reported() -> dict[str, bytes]:
        report(tmp_path, write=lambda text: None, figures=False)
        return {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}

    loose = reported()
    assert len(read) == 1
    table = page_data(loose["index.html"])["tables"][0]
    shown = [column["name"] for column in table["columns"]]
    tasks = table["data"][shown.index("task")]
    assert set(tasks) == {"one", "other"} and len(table["examples"]) == len(tasks)
    for row, examples in table["examples"].items():
        assert [name for name, *_ in examples] == [f"{tasks[int(row)]} {i}" for i in (4, 3, 2, 1, 0)]
    row = read_metrics(tmp_path, ["one-3-1"]).iloc[0].replace({np.nan: None}).to_dict()
    path = tmp_path / "metrics" / "one-3-1.parquet"
    before = os.stat(path)
    path.unlink()
    new = float("9" + repr(row["value"])[1:])  # as many digits, so that its file is as long
    write_cell(tmp_path, "one-3-1", [row | {"value": new}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    changed = reported()
    assert f",{new!r}," in changed["metrics.csv"].decode() and f"| {new:.2f} " in changed["report.md"].decode()
    values = page_data(changed["index.html"])["tables"][0]["data"][shown.index("value")]
    assert values.count(float(f"{new:.6g}")) == 1
    assert compact(tmp_path, TABLES, grace=0)["metrics"] == len(tasks) + 2
    assert reported() == changed


def page_data(page: bytes) -> dict:
    """The data in a page."""
    packed = page.split(b'id="data">')[1].split(b"</script>")[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_without_plotly_the_page_has_its_tables_and_says_so(study, monkeypatch):
    monkeypatch.setattr(page_module, "can_chart", lambda: False)
    report(study.parents[1], write=lambda text: None, figures=False)
    text = study.read_text()
    assert page_module.NO_CHARTS in text.replace("&#x27;", "'") and 'id="library"' not in text
    assert 'id="table-0"' in text
    monkeypatch.undo()
    report(study.parents[1], write=lambda text: None, figures=False)
    assert 'id="library"' in study.read_text()


def test_no_text_of_the_run_is_markup(study):
    text = study.read_text()
    body = text[text.index("<body>") :]
    assert "<img src=x" not in body and "window.pwned=1</script>" not in body and "&lt;img src=x" in body


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    pytest.importorskip("websocket", reason="no websocket-client: pip install websocket-client")
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def shown(tab, column: str) -> list[str]:
    """The texts of a column of the first table, as the browser shows them."""
    return tab.run(f"""(() => {{
        const heads = [...document.querySelectorAll('#table-0 thead tr:first-child th')];
        const at = heads.findIndex((one) => one.textContent.replace(/ [▲▼]$/, '') === {column!r});
        return [...document.querySelectorAll('#table-0 tbody tr.row')].map((row) => row.children[at].textContent);
    }})()""")


def press(tab, column: str) -> None:
    tab.run(f"""[...document.querySelectorAll('#table-0 thead button')]
        .find((one) => one.textContent.replace(/ [▲▼]$/, '') === {column!r}).click()""")


def enter(tab, label: str, value: str, event: str = "input") -> None:
    tab.run(f"""(() => {{ const one = document.querySelector('#table-0 [aria-label="{label}"]');
        one.value = {value!r}; one.dispatchEvent(new Event('{event}')); }})()""")


def test_the_page_in_a_browser(study, tab):
    tab.open(study)
    n = tab.run("document.querySelectorAll('.chart').length")
    assert n == 2
    for i in range(n):
        tab.run(f"document.getElementById('chart-{i}').scrollIntoView()")
        tab.wait(f"document.getElementById('chart-{i}').dataset.drawn === 'true'")
        assert tab.run(f"document.querySelectorAll('#chart-{i} svg').length") > 0
    # another view is drawn, and no name of the run became an element, an attribute or a script
    tab.run("(() => { const one = document.querySelector('#chart-0 select'); one.value = '1';"
            " one.dispatchEvent(new Event('change')); })()")
    # sorting, in both directions
    press(tab, "delta")
    up = [float(one) for one in shown(tab, "delta")]
    press(tab, "delta")
    down = [float(one) for one in shown(tab, "delta")]
    assert up == sorted(up) and down == sorted(down, reverse=True) and down[0] > up[0]
    # filtering by number, by a choice and by words
    enter(tab, "filter delta", ">= 1")
    assert min(float(one) for one in shown(tab, "delta")) >= 1
    enter(tab, "search in all columns", "bottom 2.")
    assert set(shown(tab, "region")) <= {"bottom 10 %", "random, same count as bottom 10 %"}
    tab.run("[...document.querySelectorAll('#table-0 .bar button')].find((one) => one.textContent === 'reset').click()")
    # a cell opens with its details and examples
    assert len(shown(tab, "delta")) == 50
    tab.run("document.querySelector('#table-0 button.open').click()")
    detail = tab.run("document.querySelector('#table-0 tr.detail').textContent")
    assert "cell id" in detail and "text 3 <img src=x" in detail and "nll: delta" in detail
    first = tab.run("[...document.querySelector('#table-0 tr.detail tbody tr').children].map((one) => one.textContent)")
    assert [first[0], *first[2:]] == ["e3", "3", "4", "1"]
    # a click in a chart opens the same
    tab.run("document.querySelector('#chart-0 .plot').emit('plotly_click', {points: [{customdata: 7}]})")
    assert tab.run("document.querySelectorAll('#table-0 tr.detail').length") == 1
    assert "boom" in tab.run("document.body.textContent") or "Trace" in tab.run("document.body.textContent")
    assert tab.run("window.pwned === undefined && document.querySelectorAll('[onerror]').length") == 0
    assert tab.problems == [] and tab.run("document.getElementById('trouble').hidden")
    assert all(one.startswith(("file:", "data:", "blob:")) for one in tab.requested)
    # the narrow page is no wider than its window
    tab.open(study, width=390)
    assert tab.run("document.documentElement.scrollWidth") <= 390 and tab.problems == []


def test_20_000_cells_stay_usable(tab, tmp_path):
    from harness.tables.page import Page, Section, frame_table, write_page

    rows = pd.DataFrame({"target": [f"{i // 70}.q_proj" for i in range(20_000)],
                         "delta": np.random.default_rng(0).normal(size=20_000)})
    section = Section("rows", tables=[frame_table("rows", rows)])
    write_page(Page("large", "20,000 rows.", [section]), tmp_path / "a.html")
    tab.open(tmp_path / "a.html")
    press(tab, "delta")
    assert shown(tab, "delta")[0] == f"{float(f'{rows.delta.min():.4g}'):g}"
    enter(tab, "filter target", "285.q_proj")
    count = tab.run("document.querySelector('#table-0 .count').textContent")
    assert count == "1 to 50 of 50 (20000 without filters)" and tab.problems == []
    assert tab.run("document.querySelectorAll('#table-0 tbody tr').length") == 50
