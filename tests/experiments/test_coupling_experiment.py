"""The committed tables of experiments/coupling say what its page claims, and the page of tables is made of them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parents[2] / "experiments" / "coupling"


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"coupling_{name}", FOLDER / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_ways_to_a_jacobian_agree() -> None:
    rows = table("families").set_index("dtype")[["one_token_against_whole", "forward_products", "adjoint_products"]]
    assert (rows.loc["float32"] < 1e-6).all().all() and (rows.loc["float64"] < 1e-10).all().all()
    assert (table("real_models")["one_token_against_whole"] < 1e-6).all()
    krylov = table("krylov")
    clear = krylov[krylov["gap"] >= 1.005]
    assert len(clear) > len(krylov) / 2
    assert (clear["sigma_error"] < 1e-4).all() and (clear["smallest_cosine"] > 0.999).all()


def test_the_null_is_calibrated() -> None:
    rows = table("null_simulation")
    assert ((rows["analytic"] - rows["simulated"]).abs() < 4 * rows["stderr"] + 5e-4).all()
    lines = table("random_lines").groupby("model")[["lss", "lss_null"]].mean()
    assert (lines["lss"] / lines["lss_null"] - 1).abs().max() < 0.03


def test_the_page_of_tables_and_the_figures_are_made_of_the_csv_files(tmp_path) -> None:
    for path in FOLDER.glob("*.csv"):
        shutil.copy(path, tmp_path)
    module("tables").write_tables(tmp_path)
    assert (tmp_path / "tables.md").read_text() == (FOLDER / "tables.md").read_text()
    figures = module("figures")
    trials = pd.concat([pd.read_csv(path) for path in FOLDER.glob("trial-*.csv")])
    for name, rows, draw in (("training", table("training"), figures.training_figure),
                             ("ablations", table("ablations"), figures.ablation_figure),
                             ("ablations-stories15M", table("ablations-stories15M"), figures.ablation_figure),
                             ("trial", trials, figures.trial_figure)):
        draw(rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (FOLDER / f"{name}.png").is_file()
