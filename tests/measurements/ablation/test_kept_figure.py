"""The figure of what is kept (Figure 5 of LASER), and the experiment that draws it."""

from __future__ import annotations

import pandas as pd

from harness.measurements import compose_settings
from harness.measurements.ablation.gallery import draw
from harness.measurements.ablation.kept_figure import kept_cells, kept_figure
from harness.measurements.ablation.summary import measured
from tests.tables.synthetic import sized, study_rows, targets

SHARES = (0.01, 0.1, 0.5)


def study(**columns):
    rows = study_rows(targets("matrix", 2, ("up_proj", "down_proj")), sized(SHARES, controls=False))
    rows = [{**row, "region": f"{row['region']}, kept", "region_keep": True, **columns} for row in rows]
    baseline = [{**row, "target": "baseline", "target_kind": "baseline", "region": "none", "value": 20.0}
                for row in rows[:1]]
    return measured(pd.DataFrame(baseline + rows))[0]


def test_each_end_has_a_line_and_each_layer_type_a_panel(tmp_path):
    one = study()
    figure = kept_figure(one, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 1000
    assert [axes.get_title() for axes in figure.axes] == [
        "up_proj, median of 2 matrices", "down_proj, median of 2 matrices"]
    for axes, name in zip(figure.axes, ("up_proj", "down_proj")):
        lines = {line.get_label(): line for line in axes.lines}
        for kind, label in (("large", "the largest values are kept"), ("small", "the smallest values are kept")):
            cells = one.cells[(one.cells.layer_type == name) & (one.cells.region_kind == kind)]
            expected = cells.groupby(cells.fraction_stop - cells.fraction_start).value.median()
            assert list(lines[label].get_xdata()) == [1.0, 10.0, 50.0]
            assert list(lines[label].get_ydata()) == expected.tolist()
        assert set(lines["baseline"].get_ydata()) == {20.0}


def test_only_studies_that_keep_both_ends_have_it(tmp_path, monkeypatch):
    assert len(kept_cells(study())) == 24 and kept_cells(study(region_keep=False)).empty
    assert kept_cells(study(region_kind="large")).empty and kept_cells(study(region_by="energy")).empty
    drawn = draw([study()], 10, tmp_path).drawn["text", "token_perplexity"]
    assert [name for name, _ in drawn][-1] == "text-token_perplexity-kept.png" and "LASER" in drawn[-1][1]


def test_the_experiment_keeps_both_ends():
    settings = compose_settings("ablation", ["experiment=laser_figure5", "model.name=some/model"])
    assert settings.region.treatment.keep and settings.region.rule.kinds == ["large", "small"]
    assert list(settings.tasks) == ["factual"] and settings.target.layer_types == ["up_proj"]
