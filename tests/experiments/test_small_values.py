"""experiments/small_values: the published numbers are found in the tables of runs with tiny weights."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from harness.cli import main
from harness.measurements import find
from harness.measurements.comparison.expected import read_expected
from tests.checkpoints import save_checkpoint, text_file
from tests.studies import ROOT

PUBLISHED = ROOT / "experiments" / "small_values" / "published"
FILES = sorted(PUBLISHED.glob("*.csv"))
RULER = ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")


def compared(folder: Path, name: str) -> pd.DataFrame:
    assert main(["compare", str(folder), "--expected", str(PUBLISHED / name)]) == 0
    return pd.read_csv(folder / "report" / "expected.csv")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Five blocks, so that 0 and 4 are there, and room for a list of words."""
    folder = tmp_path_factory.mktemp("model")
    return str(save_checkpoint(folder, num_hidden_layers=5, max_position_embeddings=4096))


def test_every_file_is_read_and_every_number_has_its_source() -> None:
    assert {path.stem for path in FILES} == {
        "gsm8k_humaneval", "ruler", "bookcorpus", "spectra_llama", "spectra_bert", "spectra_pythia"
    }  # fmt: skip
    for path in FILES:
        kind = "spectra" if path.stem.startswith("spectra") else "ablation"
        assert len(read_expected(path, find(kind).tables)) > 0
        assert pd.read_csv(path).source.str.startswith("arXiv 2410.17770 v3, ").all()


def test_the_sums_of_table_3_are_those_of_its_columns() -> None:
    rows = pd.read_csv(PUBLISHED / "spectra_llama.csv").query("over != 'mean'")
    total = rows[rows.over == "sum"].set_index(["block", "column"]).expected
    parts = rows[rows.over.isna()].groupby(["block", "column"]).expected.sum()
    assert len(total) == 14 and (parts.loc[total.index] == total).all()


def test_deciles_count_from_the_largest_value_here() -> None:
    for name in ("gsm8k_humaneval", "ruler", "bookcorpus"):
        rows = pd.read_csv(PUBLISHED / f"{name}.csv").query("target != 'baseline'")
        ours = rows.region.str.extract(r"decile (\d+)").astype(int)[0]
        theirs = rows.note_paper.str.extract(r"the paper's decile (\d+)").astype(int)[0]
        assert (ours + theirs == 11).all()
        assert set(zip(ours, rows.region)) <= {(n, f"decile {n} ({(n - 1) / 10:.1f}-{n / 10:.1f})") for n in ours}


def test_bookcorpus(model, tmp_path) -> None:
    text = text_file(tmp_path / "text.txt")
    output = tmp_path / "study"
    assert main(["run", "--quiet", "experiment=small_values_bookcorpus", f"model.name={model}", "model.dtype=float32",
                 f"tasks.bookcorpus.data_files={text}", "tasks.bookcorpus.window=32", "target.blocks=[0,4]",
                 f"output={output}"]) == 0
    found = compared(output, "bookcorpus.csv")
    here = found[found.block.isin([0, 4]) | (found.target == "baseline")]
    assert (here.status == "measured").all() and len(here) == 11
    assert (found.drop(here.index).status == "not measured").all()


def test_ruler(model, tmp_path) -> None:
    few = [f"tasks.{task}.{key}" for task in RULER
           for key in (f"length={4096 if task == 'cwe' else 400}", "n_examples=1", "max_new_tokens=1")]
    output = tmp_path / "study"
    assert main(["run", "--quiet", "experiment=small_values_ruler", f"model.name={model}", "model.dtype=float32", *few,
                 f"output={output}"]) == 0
    found = compared(output, "ruler.csv")
    assert (found.status == "measured").all() and len(found) == 50


def test_gsm8k_and_humaneval(model, tmp_path) -> None:
    questions, functions = tmp_path / "questions.jsonl", tmp_path / "functions.jsonl"
    questions.write_text(json.dumps({"question": "the cat", "answer": "#### 3"}) + "\n")
    functions.write_text(json.dumps({"prompt": "def f():\n", "test": "def check(f):\n    f()", "entry_point": "f"}))
    output = tmp_path / "study"
    assert main(["run", "--quiet", "experiment=small_values_llama", f"model.name={model}", "model.dtype=float32",
                 "target.layer_types=[o_proj]", "region.deciles=[10]", "region.controls=[]", f"+tasks.gsm8k.data_files.test={questions}",
                 "tasks.gsm8k.num_fewshot=0", f"tasks.humaneval.data_files={functions}", "tasks.humaneval.execute=true",
                 "tasks.humaneval.max_new_tokens=2", f"output={output}"]) == 0
    found = compared(output, "gsm8k_humaneval.csv")
    here = found[found.layer_type.eq("o_proj") & found.region.str.startswith("decile 10") | (found.target == "baseline")]
    assert (here.status == "measured").all() and len(here) == 4


def test_outliers(model, tmp_path) -> None:
    output = tmp_path / "spectra"
    assert main(["spectra", "--quiet", "model=pretrained", f"model.name={model}", "estimator=usvt", "vectors=false",
                 f"output={output}"]) == 0
    found = compared(output, "spectra_llama.csv")
    here = found[found.block.isin([0, 4]) | (found.over == "mean")]
    assert (here.status == "measured").all() and len(here) == 34
    for name in ("spectra_bert.csv", "spectra_pythia.csv"):
        assert (compared(output, name).status == "measured").all()
