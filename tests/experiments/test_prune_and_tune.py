"""experiments/prune_and_tune and its settings of BERT-base for a GPU: each command runs on a tiny encoder."""

from __future__ import annotations

import json
import runpy
import sys

import pandas as pd
import pytest

from harness.cli import main
from harness.measurements import compose_settings
from harness.settings.configs import config_folder
from tests.encoders import save
from tests.studies import ROOT

TASKS = {
    "boolq": ("question", "passage", 880), "rte": ("sentence1", "sentence2", 233), "sst2": ("sentence", None, 6300),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of each task: folders with train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for task, (first, second, _) in TASKS.items():
        (folder / task).mkdir()
        for part in ("train", "validation"):
            rows = [{first: f"the {'big' if i % 2 else 'small'} cat sat", **({second: "it ran"} if second else {}),
                     "label": i % 2} for i in range(8)]  # fmt: skip
            (folder / task / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_every_task_of_bert_is_run():
    found = {path.stem for path in (config_folder() / "experiment").glob("prune_and_tune*.yaml")}
    assert found == {f"prune_and_tune_{task}" for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_the_settings_of_bert(task):
    settings = compose_settings("tuning", [f"experiment=prune_and_tune_{task}"])
    first, second, steps = TASKS[task]
    assert settings.model.name == "google-bert/bert-base-uncased" and settings.tune.steps == steps
    assert len(settings.region.rule.regions()) == 10 and len(settings.tune.order) == 3 and len(settings.tune.seeds) == 6
    asked = settings.tasks[task]
    assert (asked.text_column, asked.pair_column, asked.split) == (first, second, "validation") and asked.dataset


def test_a_task_of_bert_is_run(encoder, data, tmp_path):
    fewer = ["tune.steps=1", "tune.batch_size=2", "tune.seeds=[0,1]", "tune.bf16=false", "region.deciles=[10]",
             "tune.order=[tune,tune_prune]"]  # fmt: skip
    assert main([
        "tune", "--quiet", "experiment=prune_and_tune_boolq", f"model.name={encoder}", "model.device=cpu",
        f"tasks.boolq.data_files={data / 'boolq/validation.jsonl'}", f"tune.data_files={data / 'boolq/train.jsonl'}",
        *fewer, "cache_gib=0", f"output={tmp_path / 'out'}",
    ]) == 0  # fmt: skip
    rows = pd.read_parquet(tmp_path / "out" / "results")
    assert len(rows.query("metric == 'accuracy'")) == 4 and set(rows["task"]) == {"boolq"}


def test_the_experiment_goes_on_and_keeps_its_tables(encoder, data, tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "experiments/prune_and_tune/prune_and_tune.py"))
    assert sorted(script["DECILES"]) == list(range(1, 11))
    tiny = ["threads=1", "cache_gib=0", "region.deciles=[10]"]
    of_task = {"sst2": [], "rte": ["tune.steps=1", "tune.batch_size=2"]}
    studies = {"rte": ["tune.seeds=[0,1]"], "rte-seeds": ["tune.seeds=[2,3]"]}
    script["main"].__globals__.update(HERE=tmp_path, COMMON=tiny, OF_TASK=of_task, STUDIES=studies)
    words = ["prune_and_tune.py", "--model", str(encoder), "--data", str(data), "--results", str(tmp_path / "out")]
    for more, seeds in ((["--studies", "rte"], 2), (["--studies", "rte-seeds"], 4), (["--report"], 4)):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        script["main"]()
        assert len(pd.read_csv(tmp_path / "rte.csv").query("metric == 'accuracy'")) == 3 * seeds
        assert set(pd.read_csv(tmp_path / "rte-effects.csv")["n_seeds"]) == {seeds}
    assert (tmp_path / "rte.png").stat().st_size > 5_000 and not (tmp_path / "sst2.csv").exists()
