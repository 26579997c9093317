"""experiments/small_values: the published numbers are found in the tables of runs with tiny weights."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from harness.cli import main
from harness.measurements import compose_settings, find
from harness.measurements.comparison.expected import read_expected
from tests.checkpoints import save_checkpoint, text_file
from tests.studies import ROOT

FOLDER = ROOT / "experiments" / "small_values"
PUBLISHED = FOLDER / "published"
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
                 "target.layer_types=[o_proj]", "region.deciles=[10]", "region.controls=[]",
                 f"+tasks.gsm8k.data_files.test={questions}", "tasks.gsm8k.num_fewshot=0",
                 f"tasks.humaneval.data_files={functions}", "tasks.humaneval.execute=true",
                 "tasks.humaneval.max_new_tokens=2", f"output={output}"]) == 0
    found = compared(output, "gsm8k_humaneval.csv")
    here = found[(found.target == "baseline") | found.layer_type.eq("o_proj") & found.region.str.contains("decile 10")]
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


# ---------------------------------------------------------------- the experiment's own runs and tables


def test_every_run_composes_and_no_calibration_is_a_task(tmp_path) -> None:
    for name in ("data/tinystories/validation_first_stories.txt", "data/tinystories/tinystories_1000_train.jsonl",
                 "data/wikitext-2-raw/test.jsonl", "data/wikitext-2-raw/validation.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sys.modules["run_of_small_values"] = module = type(sys)("run_of_small_values")
    vars(module).update(runpy.run_path(str(FOLDER / "run.py"), run_name="run_of_small_values"))
    jobs = module.jobs(tmp_path, tmp_path / "random")
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        words = ["task=[]", *job.settings] if job.command == "run" else [*job.settings]
        settings = compose_settings("ablation" if job.command == "run" else "spectra",
                                    ["model=pretrained", "model.name=x", *words])
        if job.command == "run":
            treatment = settings.region.treatment
            assert treatment.metric == ("activations" if "activations" in job.name else "weight")
            files = {task.data_files for task in settings.tasks.values()}
            assert files and treatment.calibration.data_files not in files
    del sys.modules["run_of_small_values"]


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(FOLDER))
    try:
        import tables as module
    finally:
        sys.path.remove(str(FOLDER))
    yield module
    del sys.modules["tables"]


def test_rank_correlation_is_scipys(tables) -> None:
    draws = np.random.default_rng(0)
    for values in (draws.normal(size=(42, 2)), draws.integers(0, 5, (30, 2)).astype(float)):
        assert tables.rank_correlation(values) == pytest.approx(spearmanr(*values.T).statistic, abs=1e-12)
    value, low, high = tables.bootstrap(np.repeat(np.arange(20.0)[:, None], 2, 1), tables.rank_correlation)
    assert value == pytest.approx(1) and low == pytest.approx(1) == high
    value, low, high = tables.bootstrap(draws.normal(size=(42, 2)), tables.rank_correlation)
    assert low < value < high and high - low > 0.3


def test_an_exception_is_found_where_it_was_put(tables) -> None:
    """Deciles that harm less and less, but for the last, in scores with much noise that all cells share."""
    draws = np.random.default_rng(1)
    shared, damage = draws.normal(size=24) * 5, {7: 0.4, 8: 0.3, 9: 0.1, 10: 0.35}

    class Made:
        def scores(self, cell_id):
            noise = np.random.default_rng(int(cell_id)).normal(size=24) * 0.02
            return tables.ExampleScores(shared + 1 + damage[int(cell_id)] + noise, np.ones(24), clusters=np.arange(24))

        def deciles(self):
            return pd.DataFrame({"task": "t", "target": "down_proj", "layer_type": "down_proj", "decile": list(damage),
                                 "delta": list(damage.values()), "cell_id": [str(d) for d in damage],
                                 "p_value": [float(d <= 0) for d in damage.values()]})

    one = tables.exceptions("made", Made()).iloc[0]
    assert one.exception and one.harms_more_than == "8 9" and one.inversions == 1
    assert one.significant == "10>9"
    assert one.difference_10_9 == pytest.approx(0.25, abs=0.03) and one.p_10_9 < 1e-6
    damage[10] = 0.05
    one = tables.exceptions("made", Made()).iloc[0]
    assert not one.exception and one.harms_more_than == "" and one.inversions == 0
    damage |= {9: -0.4, 10: -0.1}  # it helps less than decile 9, which is no harm
    one = tables.exceptions("made", Made()).iloc[0]
    assert not one.exception and one.harms_more_than == "9" and one.p_some < 0.05
