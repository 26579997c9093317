"""The tables of `harness spectra`: written atomically, read back by pandas; the figures and the summary of them."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from harness.engine.manifest import KEYS, MANIFEST, MANIFEST_VERSION, checksum_of
from harness.measurements.spectra import change_figures, figures
from harness.measurements.spectra import report as report_module
from harness.measurements.spectra.report import label, report, summarise
from harness.measurements.spectra.tables import TABLES, read_spectra
from harness.tables import writer
from harness.tables.drawing import reports_with
from harness.tables.schema import SchemaVersionError
from harness.tables.store import quarantine, unit_states, write_unit
from tests.pages import page_data

MATRICES = TABLES["matrices"].columns
RUN = "0123456789ab"
SHAPES = {"q_proj": (16, 16), "down_proj": (16, 40)}


def matrix_row(block=0, layer_type="q_proj", init="trained", checkpoint=None, index=None, **changes):
    out, width = SHAPES[layer_type]
    measured = {column.name: 1.5 for column in MATRICES if column.type == "float64"}
    row = TABLES["matrices"].blank() | measured | {
        "spectrum_id": f"{init}-{checkpoint}-{block}-{layer_type}", "model": "some/model", "checkpoint": checkpoint,
        "checkpoint_index": index, "init": init, "matrix": f"{block}.{layer_type}", "block": block, "status": "ok",
        "layer_type": layer_type, "n_out": out, "n_in": width, "rank": 16, "estimator": "usvt", "tracy_widom": False,
        "noise": 0.1, "edge_lower": 0.1 * (math.sqrt(width) - 4), "edge_upper": 0.1 * (math.sqrt(width) + 4),
        "n_above": 2, "n_below": int(width > out), "n_tokens": 100, "overlap_null_mean": 0.5, "n_overlapping": 3,
        "overlap_null_std": 0.05, "model_type": "llama", "dtype": "float32",
    }  # fmt: skip
    return row | changes


def values_of(row):
    sigma = np.linspace(1.2 * row["edge_upper"], 0.9 * row["edge_lower"], 16)
    position = np.where(sigma > row["edge_upper"], "above", np.where(sigma < row["edge_lower"], "below", "inside"))
    return {"index": list(range(16)), "sigma": sigma, "position": position.tolist()}


def vectors_of():
    n = 32
    known = [0.5] * 16 + [None] * 16
    return {
        "side": ["input"] * 16 + ["output"] * 16, "index": [*range(16), *range(16)], "porter_thomas_p": np.full(n, 0.5),
        "porter_thomas_p15": np.full(n, np.nan), "inverse_participation": np.full(n, 0.1),
        "largest_component": np.full(n, 0.4), "overlap": known, "overlap_direction": [2] * 16 + [None] * 16,
    }  # fmt: skip


def write_spectrum(folder, row, values=None, vectors=None):
    """Write a matrix; of the other tables only what is theirs is given."""
    rows = {"matrices": [row]}
    for table, columns in (("singular_values", values), ("vectors", vectors)):
        if columns is not None:
            names = TABLES[table].names()
            rows[table] = {name: value for name, value in row.items() if name in names} | columns
    write_unit(folder, TABLES, row["spectrum_id"], rows, RUN)


def spectrum_states(folder):
    return unit_states(folder, TABLES, verify=True)


def fill(folder, **changes):
    """Twelve matrices, written backwards, and the manifest that has them in the order of the model."""
    rows = [
        matrix_row(block, layer_type, init, checkpoint, index, **changes)
        for init, checkpoint, index in (("random", None, None), ("trained", "step9", 1), ("trained", "step10", 0))
        for block in (10, 2) for layer_type in ("down_proj", "q_proj")
    ]
    for row in rows:
        write_spectrum(folder, row, values_of(row), vectors_of())
    units = [[row["spectrum_id"], 0] for row in reversed(rows)]
    manifest = dict.fromkeys(KEYS, "") | {"manifest_version": MANIFEST_VERSION, "kind": "spectra", "id": RUN,
                                          "settings": {}, "parts": ["weights"], "units": units}
    manifest["checksum"] = checksum_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip_in_the_order_of_the_model(tmp_path):
    fill(tmp_path)
    matrices = read_spectra(tmp_path, "matrices")
    assert list(matrices.columns) == list(TABLES["matrices"].names())
    assert matrices["matrix"].tolist() == ["2.q_proj", "2.down_proj", "10.q_proj", "10.down_proj"] * 3
    assert [label(row) for _, row in matrices.iterrows()] == ["step10"] * 4 + ["step9"] * 4 + ["random"] * 4
    values = read_spectra(tmp_path, "singular_values")
    assert len(values) == 12 * 16 and values["spectrum_id"].unique().tolist() == matrices["spectrum_id"].tolist()
    first = values[values["spectrum_id"] == matrices["spectrum_id"][0]]
    assert first["sigma"].tolist() == values_of(matrix_row())["sigma"].tolist()
    vectors = read_spectra(tmp_path, "vectors")
    assert vectors["overlap"].isna().sum() == 12 * 16 and vectors["porter_thomas_p15"].isna().all()
    part = pq.read_table(next((tmp_path / "vectors").glob("*.parquet")))
    assert part["porter_thomas_p15"].null_count == 32  # null, and not NaN, for readers other than pandas
    assert not list((tmp_path / ".tmp").iterdir())


def test_failures_are_rows_that_a_success_replaces(tmp_path):
    failed = matrix_row(status="error", error="Traceback\nValueError: NaN")
    write_spectrum(tmp_path, failed)
    assert spectrum_states(tmp_path) == {failed["spectrum_id"]: "error"}
    assert read_spectra(tmp_path, "matrices")["error"].tolist() == ["Traceback\nValueError: NaN"]
    write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()), vectors_of())
    assert spectrum_states(tmp_path) == {failed["spectrum_id"]: "ok"}
    write_spectrum(tmp_path, failed)
    assert read_spectra(tmp_path, "matrices")["status"].tolist() == ["ok"]


def test_truncated_files_count_as_missing(tmp_path):
    write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()))
    (part,) = (tmp_path / "matrices").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    assert spectrum_states(tmp_path) == {}


def test_truncated_values_count_as_missing(tmp_path):
    """So do matrices whose values or vectors were damaged: no table lacks what another one has."""
    for table in ("singular_values", "vectors"):
        write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()), vectors_of())
        (part,) = (tmp_path / table).iterdir()
        part.write_bytes(part.read_bytes()[:100])
        assert spectrum_states(tmp_path) == {}
        quarantine(tmp_path, TABLES)
        assert unit_states(tmp_path, TABLES) == {} and read_spectra(tmp_path, table).empty
    write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()), vectors_of())
    assert set(spectrum_states(tmp_path).values()) == {"ok"}


def test_a_crash_between_tables_leaves_the_matrix_undone(tmp_path, monkeypatch):
    published, publish = [], writer._publish

    def dies(folder, tables, table, *rest):
        if table == "matrices":
            raise OSError("disk full")
        publish(folder, tables, table, *rest)
        published.append(table)

    monkeypatch.setattr(writer, "_publish", dies)
    with pytest.raises(OSError, match="disk full"):
        write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()))
    assert published == ["singular_values"]
    assert spectrum_states(tmp_path) == {} and read_spectra(tmp_path, "singular_values").empty


@pytest.mark.parametrize("change, message", [
    ({"rank": None}, "column rank must not be null"),
    ({"rank": "many"}, "column rank is not int64"),
    ({"colour": "red"}, r"a row of matrices .* has unknown ones \['colour'\]"),
])  # fmt: skip
def test_rows_are_checked(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_spectrum(tmp_path, matrix_row() | change)
    with pytest.raises(ValueError, match="columns of singular_values have lengths"):
        write_spectrum(tmp_path, matrix_row(), {"index": [0, 1], "sigma": [1.0], "position": ["above"]})


def test_other_versions_are_refused(tmp_path):
    row = matrix_row()
    write_unit(tmp_path, dataclasses.replace(TABLES, version=99), row["spectrum_id"], {"matrices": [row]}, RUN)
    with pytest.raises(SchemaVersionError, match="written under schema version 99, this harness reads version 1"):
        read_spectra(tmp_path, "matrices")
    with pytest.raises(SchemaVersionError, match="written under schema version 99"):
        report(tmp_path, lambda text: None)


def test_summary_adds_up(tmp_path):
    fill(tmp_path)
    summary = summarise(read_spectra(tmp_path, "matrices"))
    assert summary["weights"].tolist() == ["step10"] * 3 + ["step9"] * 3 + ["random"] * 3
    whole = summary[(summary["weights"] == "step9") & (summary["layer type"] == "all")].iloc[0]
    assert (whole["matrices"], whole["above"], whole["below"], whole["overlapping"]) == (4, 8, 2, 12)
    assert whole["outside %"] == pytest.approx(100 * 10 / 64)


def test_report_writes_tables_and_figures(tmp_path):
    fill(tmp_path)
    failed = matrix_row(3, status="error", error="Traceback\nValueError: not finite")
    write_spectrum(tmp_path, failed)
    said = []
    path = report(tmp_path, said.append)
    drawn = sorted(file.name for file in path.parent.glob("*.png"))
    content = page_data(path.parent / "index.html")
    assert content["charts"] and (path.parent / "index.html").read_text().count("data:image/png") == len(drawn)
    sets = ("random", "step10", "step9")
    expected = [f"{kind}-{weights}.png" for kind in ("outliers", "overlap", "spectrum") for weights in sets]
    assert drawn == ["checkpoints-training.png", *expected]
    text = path.read_text()
    assert all(f"({name})" in text for name in drawn)
    for output in (text, "\n".join(said)):
        assert "failed: trained 3.q_proj: ValueError: not finite" in output and "12 matrices" in output
    table = pd.read_csv(path.parent / "matrices.csv")
    assert len(table) == 12 and table["edge_upper"][1] == float(f"{0.1 * (math.sqrt(40) + 4):.6g}")
    assert pd.read_csv(path.parent / "summary.csv")["above"].tolist() == [4, 4, 8] * 3


def test_report_of_failures_only(tmp_path):
    write_spectrum(tmp_path, matrix_row(status="error", error="ValueError: not finite"))
    assert "no matrix has been measured" in report(tmp_path, lambda text: None).read_text()


def test_report_without_overlaps_and_of_zero_matrices(tmp_path):
    zero = {"noise": 0.0, "edge_lower": 0.0, "edge_upper": 0.0, "overlap_null_mean": None, "n_overlapping": None,
            "n_tokens": None, "alpha": None, "ks_mp": None}  # fmt: skip
    for block in range(6):
        row = matrix_row(block, **zero)
        write_spectrum(tmp_path, row, values_of(row) | {"sigma": np.zeros(16)})
    said = []
    path = report(tmp_path, said.append)
    assert sorted(file.name for file in path.parent.glob("*.png")) == ["outliers-trained.png", "spectrum-trained.png"]
    assert "overlapping" not in said[0] and "alpha" not in said[0]


def test_the_figure_of_changes_shows_both_sides_whole(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(change_figures, "save_figure", lambda figure, path: drawn.append(figure))
    tenths = [{"side": side, "control": "real", "decile": i, "energy_ratio": ratio, "energy_ratio_stderr": 0.1}
              for side, ratio in (("output", 1.0), ("input", 3.0)) for i in (1, 2)]
    summary = [{"control": "real", "matrices": 2, "intruders output": 1, "intruders input": 2}]
    change_figures.change_figure(tenths, summary, tmp_path / "x.png", "a title")
    for panel in drawn[0].axes[:2]:
        low, high = panel.get_ylim()
        assert low < 0.9 and high > 3.1


def test_panels_are_spread_over_the_blocks():
    rows = pd.DataFrame([matrix_row(block, "q_proj") for block in range(31)])
    assert [line[0]["block"] for line in figures._panels(rows)] == [0, 10, 20, 30]


def test_figures_of_before_do_not_stay_where_none_are_wanted(tmp_path):
    fill(tmp_path)
    path = report(tmp_path, lambda text: None)
    assert list(path.parent.glob("*.png"))
    with reports_with("none"):
        report(tmp_path, lambda text: None)
    assert not list(path.parent.glob("*.png")) and not (path.parent / "figures.json").exists()
    assert "report.figures=none" in path.read_text()
    report(tmp_path, lambda text: None)
    assert list(path.parent.glob("*.png"))


def test_without_matplotlib_a_report_has_no_figures_and_says_so(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr(report_module, "can_draw", lambda: False)
    said = []
    path = report(tmp_path, said.append)
    for text in (path.read_text(), "\n".join(said)):
        assert "no figures: they need matplotlib, pip install 'spectral-ablation-harness" in text
    assert not list(path.parent.glob("*.png")) and "0 figures" in said[-1]
