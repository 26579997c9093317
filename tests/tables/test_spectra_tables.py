"""The tables of `harness spectra`: written atomically, read back by pandas; the figures and the summary of them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from harness.tables import spectra_plots, spectra_schema, spectra_store
from harness.tables.schema import SchemaVersionError
from harness.tables.spectra_report import label, spectra_report, summarise
from harness.tables.spectra_store import read_spectra, spectrum_states, write_spectrum

ROOT = Path(__file__).parents[2]
SHAPES = {"q_proj": (16, 16), "down_proj": (16, 40)}


def matrix_row(block=0, layer_type="q_proj", init="trained", checkpoint=None, index=None, **changes):
    out, width = SHAPES[layer_type]
    measured = {column.name: 1.5 for column in spectra_schema.MATRICES if column.type == "float64"}
    row = spectra_schema.blank_matrix_row() | measured | {
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


def fill(folder, **changes):
    for row in [
        matrix_row(block, layer_type, init, checkpoint, index, **changes)
        for init, checkpoint, index in (("random", None, None), ("trained", "step9", 1), ("trained", "step10", 0))
        for block in (10, 2) for layer_type in ("down_proj", "q_proj")
    ]:
        write_spectrum(folder, row, values_of(row), vectors_of())


def test_round_trip_in_the_order_of_the_model(tmp_path):
    fill(tmp_path)
    matrices = read_spectra(tmp_path, "matrices")
    assert list(matrices.columns) == [column.name for column in spectra_schema.MATRICES]
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


def test_a_crash_between_tables_leaves_the_matrix_undone(tmp_path, monkeypatch):
    publish = spectra_store._publish

    def dies(folder, content, target):
        if target.parent.name == "matrices":
            raise OSError("disk full")
        publish(folder, content, target)

    monkeypatch.setattr(spectra_store, "_publish", dies)
    with pytest.raises(OSError, match="disk full"):
        write_spectrum(tmp_path, matrix_row(), values_of(matrix_row()))
    assert spectrum_states(tmp_path) == {} and read_spectra(tmp_path, "singular_values").empty


@pytest.mark.parametrize("change, message", [
    ({"rank": None}, "matrices: column rank must not be null"),
    ({"rank": "many"}, "matrices: column rank is not int64"),
    ({"colour": "red"}, r"unknown columns \['colour'\]"),
])  # fmt: skip
def test_rows_are_checked(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_spectrum(tmp_path, matrix_row() | change)
    with pytest.raises(ValueError, match="columns have lengths"):
        write_spectrum(tmp_path, matrix_row(), {"index": [0, 1], "sigma": [1.0], "position": ["above"]})


def test_other_versions_are_refused(tmp_path, monkeypatch):
    write_spectrum(tmp_path, matrix_row())
    monkeypatch.setattr(spectra_schema, "SPECTRA_SCHEMA_VERSION", 99)
    with pytest.raises(SchemaVersionError, match="written under schema version 'spectra 1'"):
        read_spectra(tmp_path, "matrices")


def test_docs_follow_the_schema():
    assert (ROOT / "docs/spectra_tables.md").read_text() == spectra_schema.spectra_markdown()


def test_schema_imports_without_torch_and_pyarrow():
    code = "import sys, harness.tables.spectra_store, harness.tables.spectra_report; " \
           "print([m for m in ('torch', 'pyarrow', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    path = spectra_report(tmp_path, said.append)
    drawn = sorted(file.name for file in path.parent.glob("*.png"))
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
    assert "no matrix has been measured" in spectra_report(tmp_path, lambda text: None).read_text()


def test_report_without_overlaps_and_of_zero_matrices(tmp_path):
    zero = {"noise": 0.0, "edge_lower": 0.0, "edge_upper": 0.0, "overlap_null_mean": None, "n_overlapping": None,
            "n_tokens": None, "alpha": None, "ks_mp": None}  # fmt: skip
    for block in range(6):
        row = matrix_row(block, **zero)
        write_spectrum(tmp_path, row, values_of(row) | {"sigma": np.zeros(16)})
    said = []
    path = spectra_report(tmp_path, said.append)
    assert sorted(file.name for file in path.parent.glob("*.png")) == ["outliers-trained.png", "spectrum-trained.png"]
    assert "overlapping" not in said[0] and "alpha" not in said[0]


def test_panels_are_spread_over_the_blocks():
    rows = pd.DataFrame([matrix_row(block, "q_proj") for block in range(31)])
    assert [line[0]["block"] for line in spectra_plots._panels(rows)] == [0, 10, 20, 30]
