"""experiments/base_and_tuned and the pairs for a cluster: each command runs on tiny models."""

from __future__ import annotations

import json
import re
import runpy

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from harness.cli import main
from harness.measurements import ABLATION, compose_settings, source_of
from harness.settings.configs import config_folder
from harness.settings.sweep import check_sweep
from tests.checkpoints import save_checkpoint, text_file
from tests.studies import ROOT

PAIRS = {"pair_llama": "llama", "pair_qwen": "qwen2", "pair_gemma": "gemma3_text", "pair_olmo": "olmo2"}


def test_every_pair_is_run():
    assert {path.stem for path in (config_folder() / "experiment").glob("pair*.yaml")} == set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_composed_as_it_is_named(name):
    settings = compose_settings("ablation", [f"experiment={name}"])
    assert "/" in settings.model.name and "/" in settings.reference.name and settings.model.dtype == "bfloat16"
    assert settings.region.treatment.of in ("change", "reference") and len(settings.tasks) >= 3
    text = (config_folder() / "experiment" / f"{name}.yaml").read_text()
    assert "Asked: (1)" in text  # the expected questions
    assert f"`{name}`" in (ROOT / "experiments/base_and_tuned/README.md").read_text()


def test_the_stages_of_olmo_are_an_outer_axis():
    """The command in the file composes one study for each stage."""
    text = (config_folder() / "experiment" / "pair_olmo.yaml").read_text()
    words = re.search(r"harness run -m (.+)", text).group(1).split()
    key, stages = words[1].split("=")
    assert words[0] == "experiment=pair_olmo" and key == "model.name"
    assert [stage.rpartition("-")[2] for stage in stages.split(",")] == ["SFT", "DPO", "Instruct"]
    check_sweep(source_of(ABLATION), words)
    found = [compose_settings(ABLATION, [words[0], f"model.name={stage}"]) for stage in stages.split(",")]
    assert {one.reference.name for one in found} == {"allenai/OLMo-2-1124-7B"}
    assert len({one.model.name for one in found}) == 3


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair(name, tmp_path):
    tuned, base = (save_checkpoint(tmp_path / str(seed), PAIRS[name], seed=seed) for seed in (0, 1))
    text = text_file(tmp_path / "text.txt", 100)
    fewer = ["region.intervals=['0:1','0:4']"] if name == "pair_qwen" else ["region.deciles=[1,10]"]
    assert main([
        "run", "--quiet", f"experiment={name}", f"model.name={tuned}", f"reference.name={base}", "model.device=cpu",
        "task=text", f"tasks.text.data_files={text}", "tasks.text.split=train", "tasks.text.window=16",
        "tasks.text.limit=2", "target.blocks=[1]", *fewer, f"output={tmp_path / 'out'}",
    ]) == 0
    rows = pd.read_parquet(tmp_path / "out" / "metrics")
    assert set(rows["status"]) == {"ok"} and set(rows["dtype"]) == {"bfloat16"}
    assert {"matrices of the reference", "reference"} <= set(rows["region"])
    files = [config_folder() / "experiment" / f"{name}.yaml"]
    chosen = [one["override /reference"] for one in yaml.safe_load(files[0].read_text())["defaults"]
              if "override /reference" in one]
    assert "/" in yaml.safe_load((config_folder() / "reference" / f"{chosen[0]}.yaml").read_text())["name"]


def test_tuning_is_of_the_label_words_and_is_not_repeated(tmp_path, capsys):
    script = runpy.run_path(str(ROOT / "experiments/base_and_tuned/tune.py"))
    base = save_checkpoint(tmp_path / "models" / "stories15M")
    (tmp_path / "data/sst2").mkdir(parents=True)
    words = ["cat", "dog", "bird", "tree"] * 9
    rows = [{"sentence": f"the {word} sat ", "label": i % 2} for i, word in enumerate(words)]
    for part in ("train", "validation"):
        (tmp_path / "data/sst2" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script["main"].__globals__.update(STEPS={"full": 2, "lora": 2}, BATCH={"full": 3, "lora": 3})
    for what in ("data", "full", "lora", "full"):
        script["main"](tmp_path, tmp_path / "out", what)
    assert "full is there" in capsys.readouterr().out
    asked = [json.loads(line) for line in (tmp_path / "out/sst2.jsonl").read_text().splitlines()]
    assert asked[1]["inputs"] == "the dog sat\nThis was" and asked[1]["targets"] == ["good"]
    before, full, merged = (load_file(folder / "model.safetensors") for folder in
                            (base, tmp_path / "out/full", tmp_path / "out/lora_merged"))
    for tuned in (full, merged):
        moved = {name for name in before if not before[name].equal(tuned[name])}
        assert any("down_proj" in name for name in moved) and not any("embed" in name for name in moved)
    assert (tmp_path / "out/lora/adapter_model.safetensors").is_file()
