"""The report: numbers as text, order of cells, figures (their contents, and that nothing in them overlaps)."""

from __future__ import annotations

import itertools
import re
import shutil
import struct

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg

from harness.cli import main
from harness.measurements.ablation import gallery, heat_map, summary
from harness.measurements.ablation import region_figure as region_figure_module
from harness.measurements.ablation import report as report_module
from harness.measurements.ablation.gallery import MAX_FIGURES
from harness.measurements.ablation.heat_map import MAX_PANELS, heat_map_figure
from harness.measurements.ablation.region_figure import region_figure
from harness.measurements.ablation.report import report, terminal_summary
from harness.measurements.ablation.series import joined, region_kinds
from harness.measurements.ablation.summary import measured, region_order, target_order
from harness.measurements.ablation.tables import read_metrics
from harness.tables.drawing import DPI, FigureSettings, drawn_as
from harness.tables.figure_record import RECORD
from harness.tables.labels import region_words
from harness.tables.text import plus_minus
from tests.tables.synthetic import (
    deciles,
    error_row,
    metric_row,
    sized,
    study_rows,
    targets,
    write_cell,
    write_rows,
)


def frame(rows):
    return pd.DataFrame(rows)


def run_report(folder, **options):
    said = []
    path = report(folder, write=said.append, **options)
    return path, "\n".join(said)


def test_best_is_the_better_direction():
    regions = sized((0.1,))
    for metric, higher in (("accuracy", True), ("token_perplexity", False)):
        one = measured(frame(study_rows(targets("type", 4), regions, ((metric, higher),))))[0]
        deltas = one.ranked["delta"].tolist()
        assert deltas == sorted(deltas, reverse=higher) and len(deltas) == 7 * 4
        assert "none" not in set(one.ranked["region_kind"])


def test_primary_metric_is_the_first_written(tmp_path):
    for cell in ("z", "a"):
        write_cell(tmp_path, cell, [metric_row(cell, "word_perplexity"), metric_row(cell, "accuracy")])
    found = measured(read_metrics(tmp_path))
    assert [(one.metric, one.primary) for one in found] == [("word_perplexity", True), ("accuracy", False)]


def test_order_of_targets_and_regions():
    rows = frame(study_rows(targets("matrix", 12)[::-1], sized((0.1, 0.05))[::-1]))
    cells = measured(rows)[0].cells
    order = target_order(cells)
    assert order[:8] == [f"0.{t}" for t in "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()] + [
        "1.q_proj"
    ]
    assert order.index("2.q_proj") < order.index("10.q_proj"), "numbers, not letters"
    assert region_order(cells) == [
        "large 0.05", "large 0.1", "bulk 0.05", "bulk 0.1", "small 0.1", "small 0.05",
        "none", "random (small 0.05) seed 0", "random (small 0.1) seed 0",
    ]  # fmt: skip
    labels = [region["region"] for region in deciles()]
    assert region_order(measured(frame(study_rows(targets("all", 1), deciles()[::-1])))[0].cells) == labels


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("n_blocks", [2, 12])
def test_terminal_text_fits(width, n_blocks):
    metrics = frame(study_rows(targets("matrix", n_blocks), sized((0.1,))))
    text = terminal_summary(metrics, width=width)
    assert max(map(len, text.splitlines())) <= width
    one = measured(metrics)[0]
    for row in one.ranked.head(3).itertuples():
        assert plus_minus(row.value, row.stderr) in text and row.target in text


def test_small_study_is_printed_whole():
    metrics = frame(study_rows(targets("all", 2), deciles()))
    text = terminal_summary(metrics, width=100)
    assert all(region_words(region["region"]) in text for region in deciles()) and "baseline 20.00 ± 0.40" in text
    assert "10 ablations, 1 baseline, 0 failed" in text


def test_a_report_says_where_windows_begin_with_bos(tmp_path):
    rows = study_rows(targets("all", 2), deciles())
    write_rows(tmp_path, rows)
    path, said = run_report(tmp_path, figures=False)
    assert "BOS" not in said and "BOS" not in path.read_text()
    with_bos = tmp_path / "with"
    write_rows(with_bos, [{**row, "protocol": '{"bos": true, "prefix_token": 1, "window": 128}'} for row in rows])
    path, said = run_report(with_bos, figures=False)
    for text in (said, path.read_text()):
        assert text.count("every window begins with BOS, token 1 (tasks.text.bos)") == 1


def test_report_files(tmp_path):
    rows = study_rows(targets("matrix", 3), sized((0.1,)), (("accuracy", True), ("margin", True)), task="ioi")
    write_rows(tmp_path, rows)
    path, said = run_report(tmp_path)
    text = path.read_text()
    pngs = sorted(p.name for p in path.parent.glob("*.png"))
    assert pngs == ["ioi-accuracy-blocks.png", "ioi-accuracy-regions.png"]
    assert all(f"]({name})" in text for name in pngs) and "2 figures" in said
    assert "Without a figure: ioi margin. In Python, `harness.open(folder).plot(task, metric)` draws one." in text
    for name in pngs:
        content = (path.parent / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", content[16:24])) > 300
    table = [
        line.split(" | ") for line in text.splitlines() if re.match(r"\| 2.up_proj \| [0-9]", line)
    ]
    cells = {row["region"]: row for row in rows if row["target"] == "2.up_proj" and row["metric"] == "accuracy"}
    assert table[0][1] == plus_minus(cells["large 0.1"]["value"], cells["large 0.1"]["stderr"])
    csv = pd.read_csv(path.parent / "metrics.csv")
    assert len(csv) == len(rows) and csv.value.sum() == pytest.approx(sum(row["value"] for row in rows), rel=1e-12)
    # adjusted among the ablations of one metric, the control "remove nothing" and the baseline left out
    for metric, of_metric in csv[csv.target_kind == "matrix"].groupby("metric"):
        expected = scipy.stats.false_discovery_control(of_metric.p_value)
        np.testing.assert_allclose(of_metric.q_value, expected, rtol=1e-12, err_msg=metric)
    assert csv[csv.target_kind != "matrix"].q_value.isna().all() and (csv.q_value > csv.p_value).any()
    # a second report replaces the first, figures that are no longer drawn included
    run_report(tmp_path, figures=False)
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "metrics.csv", "report.md"]


@pytest.mark.parametrize("n", [0, 1, 2, 7, 500])
def test_q_values_are_scipys_to_the_last_bit(n):
    random = np.random.default_rng(n)
    p = np.concatenate([random.uniform(size=n), np.repeat(random.uniform(size=n // 3), 2), [0.0, 1.0, 1e-300][: n]])
    cells = pd.DataFrame({"p_value": [*random.permutation(p), *([None] * (n > 2))]}, dtype=object)
    q = summary._with_q_value(cells)["q_value"]
    expected = scipy.stats.false_discovery_control(cells["p_value"].dropna().astype(float)) if n else []
    assert q.dropna().tolist() == list(expected) and q.isna().sum() == (n > 2)


def test_a_report_of_deciles_says_which_is_the_largest(tmp_path):
    said = "arXiv 2410.17770 counts from the smallest"
    write_cell(tmp_path / "tenth", "a", [metric_row("a", region_by="decile", region_kind="decile",
                                                    region="decile 10 (0.9-1.0)")])
    text = run_report(tmp_path / "tenth")[0].read_text()
    assert f"Decile 1 is the largest tenth; {said}: its decile d is decile 11 - d here." in text
    assert re.search(rf"!\[[^\]]*{said}", text)
    write_cell(tmp_path / "other", "a", [metric_row("a", region_kind="small", region_by="fraction")])
    assert said not in run_report(tmp_path / "other")[0].read_text()


def test_deltas_per_removed_norm_and_output_energy(tmp_path):
    write_cell(tmp_path, "a", [metric_row("a", delta=0.6, norm_removed=3.0, output_norm_removed=2.0)])
    write_cell(tmp_path, "b", [metric_row("b", target="1.q_proj", block=1, delta=0.6, norm_removed=0.0)])
    path = run_report(tmp_path)[0]
    rows = pd.read_csv(path.parent / "metrics.csv").set_index("cell_id")
    assert rows.delta_per_norm["a"] == pytest.approx(0.2) and rows.delta_per_output_energy["a"] == pytest.approx(0.15)
    assert rows.loc["b", ["delta_per_norm", "delta_per_output_energy"]].isna().all()
    assert "| delta / norm |" in path.read_text() and "| 0.2 |" in path.read_text()


def test_a_report_says_what_is_done_where_and_how_sure(tmp_path):
    rows = study_rows(targets("matrix", 5), sized((0.1,)), (("accuracy", True),), task="ioi")
    for row in rows:
        if row["region"] == "none" and row["target"] != "baseline":
            row |= {"target": "control", "target_kind": "control", "n_matrices": 35, "delta": 0.0}
        if row["delta"] is not None:  # many cells are equally good
            row["delta"] = min(0.0, round(row["delta"], 1))
    cells = [row for row in rows if row["target_kind"] == "matrix"]
    write_rows(tmp_path, rows)
    path, said = run_report(tmp_path)
    page = path.read_text()
    assert "random, same count as bottom 10 %" in page
    for text in (said, page):
        assert "anity check passed: 35 matrices decomposed, nothing removed, 0 change" in text
    best = max(row["delta"] for row in cells)
    more = sum(row["delta"] == best for row in cells) - 5
    assert more > 1 and f"best 5 of {len(cells)} ({more} more ablations tie with the last of them):" in said
    assert f"q is p adjusted for the {len(cells)} ablations of this metric (Benjamini-Hochberg)" in said
    one = next(row for row in measured(frame(rows))[0].ranked.to_dict("records"))
    assert f"`{one['cell_id'][:10]}`" in page


def test_the_csv_has_the_order_of_the_study_and_both_intervals(tmp_path, monkeypatch):
    rows = study_rows(targets("type", 1), [*deciles(), *sized((0.33,))])
    rows = [row | {"fraction_start": 0.34} if row["region"].startswith("large 0.33") else row for row in rows]
    write_rows(tmp_path, sorted(rows, key=lambda row: hash(row["cell_id"])))
    place = {row["cell_id"]: i for i, row in enumerate(rows)}
    monkeypatch.setattr(report_module, "in_order", lambda folder, found, key: found.iloc[
        found[key].map(place).argsort()])
    csv = pd.read_csv(run_report(tmp_path, figures=False)[0].parent / "metrics.csv")
    assert csv.cell_id.tolist() == [row["cell_id"] for row in rows]
    top = csv[csv.region == "large 0.33"]
    assert set(top.label) == {"top 33 %"} and set(top.nominal_stop) == {0.33} and set(top.fraction_start) == {0.34}
    assert csv.nominal_start[csv.region == "decile 2 (0.1-0.2)"].unique().tolist() == [0.1]
    assert csv[csv.region_kind == "random"].nominal_start.isna().all()


def test_limit_of_figures_is_said(tmp_path):
    rows = [r for t in range(10) for r in study_rows(targets("type", 1), deciles()[:2], task=f"task{t}")]
    write_rows(tmp_path, rows)
    path, _ = run_report(tmp_path)
    assert len(list(path.parent.glob("*.png"))) == MAX_FIGURES
    assert "Without a figure: task8 token_perplexity, task9 token_perplexity." in path.read_text()


@pytest.fixture
def stubs(monkeypatch) -> list[str]:
    """The names of the files that are drawn from now on. They are stubs, because drawing is slow."""
    drawn: list[str] = []

    def stub(one, path):
        drawn.append(path.name)
        path.write_bytes(b"\x89PNG")
        return ["large 0.1"]

    for name in ("region_figure", "heat_map_figure"):
        monkeypatch.setattr(gallery, name, stub)
    return drawn


def test_figures_are_drawn_once_until_what_they_show_changes(tmp_path, stubs):
    rows = study_rows(targets("matrix", 3), sized((0.1,)), (("accuracy", True), ("margin", True)), task="ioi")
    both = ["ioi-accuracy-regions.png", "ioi-accuracy-blocks.png"]

    def again() -> list[str]:
        shutil.rmtree(tmp_path / "metrics", ignore_errors=True)
        write_rows(tmp_path, rows)
        stubs.clear()
        pages.append(run_report(tmp_path)[0].read_text())
        assert sorted(p.name for p in (tmp_path / "report").glob("*.png")) == sorted(both)
        return list(stubs)

    pages: list[str] = []
    assert again() == both and again() == [] and again() == []
    for png in both:
        (tmp_path / "report" / png).unlink()
        assert again() == both
    for broken in (b"", b"[]", b'{"a": 1}', b'{"a": [["b"]]}', b"\xff"):
        (tmp_path / "report" / RECORD).write_bytes(broken)
        assert again() == both
    (tmp_path / "report" / "ioi-other-regions.png").touch()
    assert again() == [] and len(set(pages)) == 1
    for target in ("2.up_proj", "baseline"):  # another value of a cell, and of the baseline
        for row in rows:
            row["value"] -= 0.25 * (row["target"] == target and row["metric"] == "accuracy")
        assert again() == both, target
    for row in rows:  # what no figure shows
        row["seconds"] = 17.0
        row["value"] += row["metric"] == "margin"
    assert again() == []


def test_figures_in_other_formats_and_widths(tmp_path, capsys):
    write_rows(tmp_path, study_rows(targets("type", 1), deciles()))
    with drawn_as(FigureSettings("pdf", "column")):
        path, _ = run_report(tmp_path)
    (pdf,) = path.parent.glob("*.pdf")
    (box,) = re.findall(rb"/MediaBox \[ 0 0 ([0-9.]+) ([0-9.]+) \]", pdf.read_bytes())
    assert float(box[0]) == 3.5 * 72  # one column
    width, height = struct.unpack(">II", pdf.with_suffix(".png").read_bytes()[16:24])
    assert width == 3.5 * DPI
    run_report(tmp_path)  # the format is another: drawn again, and no figure of the earlier report stays
    assert not list(path.parent.glob("*.pdf"))
    assert struct.unpack(">II", pdf.with_suffix(".png").read_bytes()[16:24])[0] > width
    for wrong, said in (("figures.format=gif", "one of png, pdf, svg is right"), ("figures.size=3", "can be set"),
                        ("report.figures=some", "report.figures=all or none can be set")):
        assert main(["report", str(tmp_path), wrong]) == 2
        assert said in capsys.readouterr().err


def test_drawing_that_is_interrupted_leaves_no_figure_that_counts(tmp_path, stubs, monkeypatch):
    write_rows(tmp_path, study_rows(targets("matrix", 3), sized((0.1,))))
    path, _ = run_report(tmp_path)

    def interrupted(one, path):
        path.write_bytes(b"half a figure")
        raise KeyboardInterrupt

    (png,) = path.parent.glob("*-regions.png")
    png.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(gallery, "region_figure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_report(tmp_path)
    run_report(tmp_path)
    assert png.read_bytes() == b"\x89PNG"


def test_without_matplotlib_a_report_has_no_figures_and_says_so(tmp_path, monkeypatch):
    write_rows(tmp_path, study_rows(targets("matrix", 3), sized((0.1,))))
    monkeypatch.setattr(report_module, "can_draw", lambda: False)
    path, said = run_report(tmp_path)
    for text in (said, path.read_text()):
        assert "no figures: they need matplotlib, pip install 'spectral-ablation-harness" in text
    assert "0 figures" in said and not list(path.parent.glob("*.png"))


def test_nothing_measured_yet(tmp_path):
    assert run_report(tmp_path) == (None, f"{tmp_path}: no cell has been measured yet")
    assert not list(tmp_path.iterdir())


def test_partial_studies(tmp_path):
    baseline = study_rows([], [])
    write_rows(tmp_path / "baseline", baseline)
    path, said = run_report(tmp_path / "baseline")
    assert "baseline 20.00 ± 0.40" in said and "0 figures" in said

    write_cell(tmp_path / "failed", "a", [error_row("a")])
    path, said = run_report(tmp_path / "failed")
    assert "1 cell failed; the first: RuntimeError: boom" in said and "RuntimeError: boom" in path.read_text()

    write_cell(tmp_path / "one", "a", [metric_row("a", region_kind="small", region_by="fraction")])
    path, said = run_report(tmp_path / "one")  # no baseline, no delta
    assert "20.00 ± 0.50" in said and [p.name for p in path.parent.glob("*.png")] == [
        "text-token_perplexity-regions.png"
    ]

    write_rows(tmp_path / "mixed", study_rows(targets("matrix", 2), sized((0.1,))))
    write_cell(tmp_path / "mixed", "bad", [error_row("bad", target="1.up_proj", layer_type="up_proj", block=1)])
    (tmp_path / "mixed" / "metrics" / "cut.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match="truncated or not a parquet file; skipped"):
        path, said = run_report(tmp_path / "mixed")
    assert "71 ablations, 1 baseline" in said and "1 failed" in said and "1 damaged file, such as" in said


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a figure function and returns the figure, saved too."""
    figures, save = [], heat_map.save_figure

    def save_and_keep(figure, path):
        save(figure, path)
        figures.append(figure)

    for module in (heat_map, region_figure_module):
        monkeypatch.setattr(module, "save_figure", save_and_keep)

    def draw(function, rows, which=0):
        function(measured(frame(rows))[which], tmp_path / "figure.png")
        FigureCanvasAgg(figures[-1]).draw()
        return figures[-1]

    return draw


SHAPES = {
    "types": study_rows(targets("type", 1), deciles()),
    "matrices": study_rows(targets("matrix", 12), sized((0.1,))),
    "matrices of two blocks": study_rows(targets("matrix", 2), sized((0.1, 0.5))),
    "matrices of many blocks": study_rows(targets("matrix", 40), sized((0.01, 0.1))),
    "four blocks": study_rows(targets("matrix", 4), sized((0.1,))),
    "blocks": study_rows(targets("block", 24), sized((0.1,))),
    "all": study_rows(targets("all", 1), deciles(), (("accuracy", True),)),
    "many sizes": study_rows(targets("type", 1), sized((0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9))),
    "one cell": study_rows(targets("matrix", 1, ("q_proj",)), sized((0.1,), controls=False)[:1]),
}


def overlaps(artists, figure):
    boxes = [a.get_tightbbox(figure.canvas.get_renderer()) for a in artists if a.get_visible() and a.get_text()]
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("shape", SHAPES)
def test_region_figure(drawn, shape):
    rows = SHAPES[shape]
    figure = drawn(region_figure, rows)
    cells = measured(frame(rows))[0].cells
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        if axes.get_xticklabels() and axes.get_xticklabels()[0].get_rotation() == 0:
            assert not overlaps(axes.get_xticklabels(), figure), shape
        assert not overlaps(axes.get_yticklabels(), figure), shape
        box = axes.get_tightbbox(figure.canvas.get_renderer())
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, "cut off"
    start = 0.0 if cells["higher_is_better"].iloc[0] else 1.0
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [set(line.get_ydata()) for line in dashed] == [{start}], "the baseline"
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert all(not box.overlaps(axes.get_window_extent()) for axes in figure.axes), "legend outside"
        texts = [text.get_text() for text in legend.get_texts()]
        assert len(texts) == len(set(texts)) and texts[-1] == "baseline"
    assert figure.legends


@pytest.mark.parametrize("higher", [True, False])
def test_region_figure_shows_each_effect_and_its_paired_interval(drawn, higher):
    metric = "accuracy" if higher else "token_perplexity"
    rows = study_rows(targets("type", 1), deciles(), ((metric, higher),))
    axes = drawn(region_figure, rows).axes[0]
    assert "paired 95 % intervals" in axes.figure.get_suptitle() and "64 examples" in axes.figure.get_suptitle()
    for name in ("q_proj", "down_proj"):
        line = next(line for line in axes.lines if line.get_label() == name)
        wanted = [row for row in rows if row["layer_type"] == name]
        effect = [row["delta"] if higher else row["value"] / row["baseline"] for row in wanted]
        assert np.allclose(line.get_ydata(), effect)
        bars = [segment for c in axes.collections for segment in c.get_segments() if len(segment) == 2]
        for row, middle in zip(wanted, effect):
            if higher:
                half = scipy.stats.t.ppf(0.975, row["n"] - 1) * row["delta_stderr"]
                ends = middle - half, middle + half
            else:
                statistic = -scipy.stats.t.ppf(row["p_value"] / 2, row["n"] - 1)
                half = scipy.stats.t.ppf(0.975, row["n"] - 1) * abs(np.log(middle)) / statistic
                ends = middle * np.exp(-half), middle * np.exp(half)
            assert any(np.allclose(segment[:, 1], ends) for segment in bars)


def test_lines_join_only_regions_in_an_order():
    def groups(regions):
        cells = frame(study_rows(targets("type", 1, ("q_proj",)), regions))
        return joined(region_kinds(cells), region_order(measured(cells)[0].cells))

    assert groups(deciles()) == [[region["region"] for region in deciles()]]
    assert groups(sized((0.1,))) == []  # large, bulk, small and the controls
    assert groups(sized((0.1, 0.2))) == [[f"{kind} {size}" for size in sizes] for kind, sizes in (
        ("large", (0.1, 0.2)), ("bulk", (0.1, 0.2)), ("small", (0.2, 0.1)))]


def test_exploding_perplexity_is_drawn_on_a_log_axis(drawn):
    rows = study_rows(targets("type", 1), deciles(), spread=3)
    assert max(row["value"] for row in rows) > 100
    assert drawn(region_figure, rows).axes[0].get_yscale() == "log"
    assert drawn(region_figure, SHAPES["all"]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("higher", [True, False])
def test_heat_map(drawn, higher):
    rows = study_rows(targets("matrix", 5), sized((0.1,)), (("metric", higher),))
    rows = [row for row in rows if (row["block"], row["layer_type"], row["region"]) != (2, "v_proj", "bulk 0.1")]
    figure = drawn(heat_map_figure, rows)
    panels = {axes.get_title().replace("\n", " ").replace("\xa0", " "): axes for axes in figure.axes if axes.images}
    assert list(panels) == [
        "top 10 %", "middle 10 %", "bottom 10 %", "nothing removed", "random, same count as bottom 10 %",
    ]  # fmt: skip
    image = panels["middle 10 %"].images[0]
    grid = np.ma.filled(image.get_array().astype(float), np.nan)
    assert grid.shape == (5, 7) and np.isnan(grid[2, 2]) and np.isnan(grid).sum() == 1
    for row in rows:
        if row["region"] == "bulk 0.1":
            column = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split().index(row["layer_type"])
            assert grid[row["block"], column] == row["delta"]
    norm = image.norm
    assert norm.vmin == -norm.vmax and norm(0.0) == 0.5
    worse = image.cmap(norm(-norm.vmax if higher else norm.vmax))
    better = image.cmap(norm(norm.vmax if higher else -norm.vmax))
    assert worse[0] > worse[2] and better[2] > better[0], "red is worse, blue is better"
    assert any("delta" in axes.get_ylabel() for axes in figure.axes), "the colour bar says what it shows"


def test_heat_map_of_many_regions_takes_the_strongest(drawn, tmp_path):
    rows = study_rows(targets("matrix", 30), deciles() + sized((0.1,)))
    names = heat_map_figure(measured(frame(rows))[0], tmp_path / "x.png")
    assert len(names) == MAX_PANELS and "decile 1 (0.0-0.1)" in names
    figure = drawn(heat_map_figure, rows)
    assert f"({MAX_PANELS} of 15 regions)" in figure.get_suptitle()
    for axes in figure.axes:
        assert not overlaps(axes.get_yticklabels(), figure)
    # equal deltas everywhere (a study of the control alone) have no scale of their own
    flat = [row | {"delta": 0.0} for row in study_rows(targets("matrix", 2), sized((0.1,))[-1:])]
    assert drawn(heat_map_figure, flat)
