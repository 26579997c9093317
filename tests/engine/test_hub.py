"""Pushing to the hub: recorded calls, cards as the hub's library reads them, refusals in one line. Nothing is sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from harness.cli import main
from harness.measurements.ablation.tables import read_examples, read_metrics
from tests.studies import MODEL, N_SMALL


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What would be on the hub: a folder that takes the files that the hub's library would take, and the calls."""
    calls: list[tuple] = []

    class Api:
        def create_repo(self, repo_id, *, repo_type, private, exist_ok):
            calls.append((repo_id, repo_type, private, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message, allow_patterns=None):
            assert calls and commit_message
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            for name in filter_repo_objects(names, allow_patterns=allow_patterns):
                target = tmp_path / "hub" / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder_path) / name, target)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return tmp_path / "hub", calls


def test_a_study_becomes_a_data_set(hub, clean_small, tmp_path, capsys):
    """The rows of what is done, which the library of data sets reads by the names in the card."""
    there, calls = hub
    study = shutil.copytree(clean_small, tmp_path / "study")
    lost = sorted((study / "metrics").glob("*.parquet"))[0]
    lost.unlink()
    assert main(["push", str(study), "me/small", "--private"]) == 0
    assert capsys.readouterr().out == "https://huggingface.co/me/small\n"
    assert calls == [("me/small", "dataset", True, True)]
    found = there / "me" / "small"
    assert {path.name for path in found.iterdir()} == {"README.md", "manifest.json", "metrics.parquet",
                                                       "examples.parquet"}
    card = DatasetCard.load(found / "README.md")
    assert [one["config_name"] for one in card.data.to_dict()["configs"]] == ["metrics", "examples"]
    assert 'load_dataset("me/small", "metrics"' in card.content
    assert f"{N_SMALL} units: {N_SMALL - 1} done, 0 failed, 1 missing" in card.content
    metrics = load_dataset(str(found), "metrics", split="train", cache_dir=str(tmp_path / "cache")).to_pandas()
    assert len(metrics) == len(read_metrics(study)) and metrics["cell_id"].nunique() == N_SMALL - 1
    examples = pd.read_parquet(found / "examples.parquet")
    assert set(examples["cell_id"]) == set(metrics["cell_id"]) < set(read_examples(clean_small)["cell_id"])


def test_an_exported_cell_has_a_card_with_what_it_did(hub, clean_small, tmp_path, capsys):
    there, calls = hub
    rows = read_metrics(clean_small)
    row = rows[(rows["target"] == "1.up_proj") & (rows["task"] == "recall")].iloc[0]
    words = ["--study", str(clean_small), "--cell", row["cell_id"], f"output={tmp_path / 'ablated'}"]
    assert main(["export", *words, "--push-to-hub", "me/ablated"]) == 0
    assert capsys.readouterr().out.endswith("\nhttps://huggingface.co/me/ablated\n")
    assert calls == [("me/ablated", "model", False, True)]
    found = there / "me" / "ablated"
    assert {"README.md", "ablation.json", "config.json", "model.safetensors"} <= {path.name for path in found.iterdir()}
    card = ModelCard.load(found / "README.md")
    assert "spectral-ablation-harness" in card.data.tags and card.data.base_model is None
    assert (row["n_removed"], row["n_values"]) == (2, 16)
    same = rows[rows["cell_id"] == row["cell_id"]]
    for one in same.itertuples():
        assert f"| recall | {one.metric} | {one.baseline:.4g} | {one.value:.4g} | {one.delta:.4g} |" in card.content
    assert "`1.up_proj`" in card.content and "These are 2 of 16 values" in card.content


def test_a_model_that_was_not_measured_says_so(hub, tmp_path):
    words = [*MODEL, f"model.recall.cache_dir={tmp_path / 'trained'}", "target=all", "region=fraction",
             "region.kinds=[small]", "region.values=[0.5]", f"output={tmp_path / 'ablated'}"]
    assert main(["export", *words, "--push-to-hub=me/half"]) == 0
    assert "It was not measured" in (hub[0] / "me" / "half" / "README.md").read_text()


@pytest.mark.parametrize(("name", "words"), [
    ("half", "'half' does not say whose repository it is; give OWNER/NAME"),
    ("me/a b", "give OWNER/NAME"),
    ("me//half", "give OWNER/NAME"),
])  # fmt: skip
def test_a_wrong_name_is_one_line_before_anything_is_done(hub, clean_small, tmp_path, capsys, name, words):
    for command in (["push", str(clean_small), name], ["export", "--push-to-hub", name, f"output={tmp_path / 'out'}"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert words in err and err.count("\n") == 1 and out == ""
    assert not hub[1] and not (tmp_path / "out").exists()


def test_what_cannot_be_pushed_is_one_line(hub, clean_small, tmp_path, monkeypatch, capsys):
    def refused(*arguments, **more):
        raise LocalTokenNotFoundError("Token is required")

    def line(*command) -> str:
        assert main([*command]) == 2
        return capsys.readouterr().err

    empty = shutil.copytree(clean_small, tmp_path / "empty", ignore=shutil.ignore_patterns("*.parquet"))
    assert "nothing has been measured yet, so there is nothing to push" in line("push", str(empty), "me/small")
    assert "give --push-to-hub OWNER/NAME" in line("export", "--private", "output=ablated")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    assert "me/small: the hub refuses: Token is required; `hf auth login`" in line("push", str(clean_small), "me/small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nothing can be pushed while HF_HUB_OFFLINE is set" in line("push", str(clean_small), "me/small")
