"""What the README and docs/ say: their links lead somewhere, the commands exist, the queries run."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.measurements import MEASUREMENTS, compose_settings
from harness.settings.compose import groups

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(measurement, settings) of the `harness` lines of a page's code blocks that take settings; continuation lines
    joined, comments, options and sweeps dropped."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    names = "run|plan|submit|search|spectra|components|coupling"
    found = re.findall(rf"^    (?:\S*python -m |\S*bin/)?harness ({names})( .*)?$", text, flags=re.MULTILINE)
    lines = []
    for command, line in found:
        if "<" in line or "$" in line or "..." in line:
            continue
        words = [word for word in shlex.split(line.split("  #")[0]) if not word.startswith("-")]
        measurement = command if command in MEASUREMENTS.names() else "ablation"
        if words and "=" not in words[0]:  # harness plan spectra ...
            measurement, *words = words
        settings = [word for word in words if "," not in word.partition("=")[2] or "[" in word]
        lines.append(({"run": "ablation"}.get(measurement, measurement), settings))
    return lines


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=str)
def test_settings_that_are_shown_compose(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for measurement, words in commands(page):
        # a file that the reader is to have
        for word in words:
            key, _, value = word.partition("=")
            if ".data_files" in key and not Path(value).exists():
                Path(value).resolve().parent.mkdir(parents=True, exist_ok=True)
                Path(value).touch()
            if key == "model" and value.endswith(".gguf"):
                Path(value).touch()
            elif key == "model" and value.startswith("path/"):
                Path(value).mkdir(parents=True, exist_ok=True)
            if key == "model.adapter":
                Path(value).mkdir(parents=True, exist_ok=True)
                about = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
                (Path(value) / "adapter_config.json").write_text(json.dumps(about))
        compose_settings(measurement, words)


def test_the_duckdb_line_runs(tmp_path, monkeypatch, capsys):
    duckdb = pytest.importorskip("duckdb")
    settings = ["model.recall.dim=16", "model.recall.steps=2", "model.recall.batch_size=4",
                "tasks.recall.n_sequences=8", f"model.recall.cache_dir={tmp_path}", "region=index",
                "target=all"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--quiet", *settings]) == 0
    (query,) = re.findall(r'duckdb -c "(.*)"', (ROOT / "README.md").read_text())
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 5 and {row[0] for row in rows} == {"baseline", "control", "all"}


def test_every_group_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for group in set(groups()) - {"cluster", "experiment"}:
        assert f"`{group}`" in text


def test_the_numbers_of_the_first_screen_are_those_of_the_tables():
    text = " ".join((ROOT / "README.md").read_text().partition("## Start")[0].split())
    recall = pd.read_csv(ROOT / "experiments" / "recall" / "summary.csv", keep_default_na=False, na_values=[""])
    recall = recall[(recall.feed_forward == "mlp") & (recall.n_triggers == 1) & (recall.step == 400)
                    & (recall.noise == 0.5)].set_index(["matrix", "rank"]).accuracy_clean_mean  # fmt: skip
    assert f"from {recall['none', 64]:.2f} to {recall['1.up_proj', 0]:.2f}" in text
    tables = [pd.read_csv(ROOT / "experiments" / "laser" / f"smollm2-{name}-verdict.csv").set_index(["task", "metric"])
              for name in ("full", "qa_wikidata")]
    facts, wikidata = tables[0].loc["factual", "accuracy"], tables[1].loc["qa_wikidata", "accuracy"]
    assert facts.verdict == "no more than its controls" and wikidata.verdict == "yes"
    shown = f"{100 * facts.baseline:.1f} to {100 * facts.value:.1f} % (p = {facts.p_holm:.0e}".replace("e-0", "e-")
    assert shown in text and f"(p = {facts.over_random_p:.2f})" in text
    assert f"{100 * wikidata.value:.1f} instead of {100 * wikidata.baseline:.1f} %" in text
    paid = [wikidata[f"wikitext_token_perplexity{end}"] for end in ("_baseline", "")]
    assert "from {:.1f} to {:.1f}".format(*paid) in text


def test_the_figure_of_the_first_screen_is_drawn_from_the_tables():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = runpy.run_path(str(ROOT / "experiments" / "main_result.py"))["draw"]()
    best, *controls = [container.lines[0].get_xdata()[0] for container in figure.axes[1].containers]
    pyplot.close(figure)
    row = pd.read_csv(ROOT / "experiments" / "laser" / "smollm2-full-verdict.csv").set_index(["task", "metric"])
    row = row.loc["factual", "accuracy"]
    assert [best, controls[0]] == pytest.approx([100 * row.delta, 100 * row.random_delta])
