"""A LoRA adapter is merged into its base as peft merges it, in float32, and the result is rounded once."""

from __future__ import annotations

import json
import re

import pandas as pd
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from harness.cli import main
from harness.errors import InputError
from harness.models.loading import describe_model, load
from harness.models.settings import ModelSettings
from harness.models.sources import open_source
from tests.checkpoints import save_checkpoint, text_file, tokenizer

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "output.dense"]}
AUTO = {"llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}


def save_adapter(folder, base, model_type="llama", seed=7, **config):
    """An adapter with random weights, saved by peft."""
    auto = AUTO[model_type]
    config = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[model_type], **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(**config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter, model_type="llama", dtype=torch.float32):
    model = AUTO[model_type].from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


def rewritten(adapter, folder, config=None, tensors=None):
    """A copy of an adapter with other entries of its config, or other tensors."""
    folder.mkdir()
    old = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**old, **(config or {})}))
    stored = load_file(adapter / "adapter_model.safetensors")
    save_file({**stored, **(tensors or {})}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("model_type", TARGETS)
@pytest.mark.parametrize("config", [
    {},
    {"use_rslora": True, "rank_pattern": {"1.*": 2}, "alpha_pattern": {r".*\.1\..*": 9}},
], ids=["plain", "patterns"])  # fmt: skip
def test_every_weight_is_that_of_peft(model_type, config, tmp_path):
    base = save_checkpoint(tmp_path / "base", model_type)
    adapter = save_adapter(tmp_path / "adapter", base, model_type, **config)
    theirs = merged_by_peft(base, adapter, model_type)
    settings = ModelSettings(name=str(base), adapter=str(adapter), device="cpu")
    ours = load(settings)
    plain = load(ModelSettings(name=str(base), device="cpu")).model
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), weight), name
    source = open_source(settings, describe_model(settings))
    assert source.how == "streamed"
    changed = 0
    for matrix in source.matrices:
        streamed = source.read(matrix)
        assert torch.equal(streamed, matrix.read(theirs)), matrix.name
        changed += not torch.equal(streamed, matrix.read(plain))
    assert changed >= 6


def test_the_merged_weight_is_rounded_once(base, adapter):
    """Not the weight and then the sum: that would leave out of bfloat16 what is below half a unit of the weight."""
    settings = ModelSettings(name=str(base), adapter=str(adapter), device="cpu", dtype="bfloat16")
    exact = merged_by_peft(base, adapter)
    loaded, source = load(settings), open_source(settings, describe_model(settings))
    twice = merged_by_peft(base, adapter, dtype=torch.bfloat16)
    differs = 0
    for matrix in loaded.matrices:
        once = matrix.read(exact).to(torch.bfloat16)
        assert torch.equal(matrix.read(loaded.model), once) and torch.equal(source.read(matrix), once)
        differs += int((once != matrix.read(twice)).sum())
    assert differs > 100


def test_a_trained_head_and_biases_take_the_place_of_those_of_the_base(base, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    stored = load_file(adapter / "adapter_model.safetensors")
    head = next(name for name in stored if name.endswith("lm_head.weight"))
    adapter = rewritten(adapter, tmp_path / "other", tensors={head: stored[head] + 1})
    ours = load(ModelSettings(name=str(base), adapter=str(adapter), device="cpu")).model
    assert torch.equal(ours.lm_head.weight, stored[head] + 1)


def test_the_identity_changes_with_every_file(base, adapter, tmp_path):
    def identity(adapter, base=base):
        return describe_model(ModelSettings(name=str(base), adapter=adapter and str(adapter))).identity["digest"]

    stored = load_file(adapter / "adapter_model.safetensors")
    one = next(iter(stored))
    others = [
        None, adapter, rewritten(adapter, tmp_path / "alpha", {"lora_alpha": 6}),
        rewritten(adapter, tmp_path / "weights", tensors={one: stored[one] * 2}),
    ]
    found = [identity(other) for other in others]
    found.append(identity(adapter, save_checkpoint(tmp_path / "base", seed=1)))
    assert len(set(found)) == 5
    assert identity(rewritten(adapter, tmp_path / "same", {})) != found[0]


def test_the_adapter_names_its_base(base, adapter):
    settings = ModelSettings(name="", adapter=str(adapter))
    settings.require_name()
    assert settings.name == str(base) and settings.stem == adapter.name
    assert settings.label == f"{base} + {adapter}"


def test_bad_adapters_are_one_line(base, adapter, tmp_path):
    def refused(words, adapter, base=base):
        with pytest.raises(InputError) as caught:
            settings = ModelSettings(name=str(base), adapter=str(adapter))
            settings.require_name()
            describe_model(settings)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    number = iter(range(99))

    def made(**changes):
        return rewritten(adapter, tmp_path / str(next(number)), **changes)

    stored = load_file(adapter / "adapter_model.safetensors")
    first = next(name for name in stored if name.endswith("layers.0.mlp.down_proj.lora_A.weight"))
    refused("model.adapter: no adapter_config.json in", tmp_path)
    refused("is not a folder; give the folder of an adapter", "./none")
    refused("is an adapter of type IA3; only LORA", made(config={"peft_type": "IA3"}))
    refused("has use_dora, which is not merged here", made(config={"use_dora": True}))
    refused("was initialised by 'pissa', which changes", made(config={"init_lora_weights": "pissa"}))
    refused("has rank 3, and adapter_config.json says 4", made(config={"r": 4}))
    refused("changes model.layers.7.mlp.down_proj, which its base does not have",
            made(tensors={first.replace("layers.0", "layers.7"): stored[first].clone()}))
    refused("does not fit its base: for model.layers.0.mlp.down_proj it has 3x41 and 24x3, and the base has 24x40",
            made(tensors={first: torch.zeros(3, 41)}))
    refused("holds model.layers.0.self_attn.q_proj.magnitude, which cannot be merged here",
            made(tensors={"base_model.model.model.layers.0.self_attn.q_proj.magnitude": torch.zeros(3)}))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "adapter_config.json").write_text("{")
    refused("is no config of an adapter of peft", tmp_path / "text")
    gone = made(config={"base_model_name_or_path": "./gone"})
    refused("model.name: './gone' is not a folder", gone, "")
    refused("names this model as its base, and model.name may name a copy", gone, "")


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="gguf_file: 'x.gguf' is wrong; an adapter is merged into weights"):
        ModelSettings(name="a/b", adapter="c/d", gguf_file="x.gguf")
    found = [str(error) for error in ModelSettings(name="recall", adapter="c/d").unread()]
    assert re.match("adapter: 'c/d' is wrong; the embedded model", found[0])


def test_a_study_of_an_adapter_has_the_numbers_of_the_merged_model(base, adapter, tmp_path):
    """From the command line, where the adapter names its base."""
    merged_by_peft(base, adapter).save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    text = text_file(tmp_path / "text.txt", 200)
    ask = ["target=all", "region=fraction", "task=text", f"tasks.text.data_files={text}", "tasks.text.split=train",
           "tasks.text.window=16", "model.device=cpu"]
    found = []
    of_merged = ["model=pretrained", f"model.name={tmp_path / 'merged'}"]
    for words in (["model=adapter", f"model.adapter={adapter}"], of_merged):
        folder = tmp_path / str(len(found))
        assert main(["run", "--quiet", *words, *ask, f"output={folder}"]) == 0
        found.append(pd.read_parquet(folder / "metrics").sort_values(["region", "metric"]))
    assert found[0]["value"].tolist() == found[1]["value"].tolist() and len(found[0]) > 3
    assert found[0]["model"].unique().tolist() == [f"{base} + {adapter}"]
    assert found[0]["model_digest"].iloc[0] != found[1]["model_digest"].iloc[0]
