"""Models as users have them: a hub name with a revision (from a local hub cache), a folder, a GGUF file."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from harness.errors import InputError
from harness.models.loading import describe_model, load, pick_device
from harness.models.settings import ModelSettings
from tests.checkpoints import save_checkpoint, text_file
from tests.gguf_files import SMOLLM2, beginning


@pytest.mark.assets
def test_gguf_file_is_the_model_that_transformers_makes_of_it(assets, tmp_path):
    from transformers import AutoModelForCausalLM

    beginning(assets / "models" / SMOLLM2, tmp_path / SMOLLM2, 2)
    config = ModelSettings(name=str(tmp_path), gguf_file=SMOLLM2)
    loaded = load(config)
    assert loaded.description.config.model_type == "llama" and len(loaded.blocks) == 2
    assert len(loaded.matrices) == 2 * 7
    ids = loaded.tokenizer("The quick brown fox", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=SMOLLM2, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, rtol=0, atol=0)


@pytest.mark.assets
def test_gguf_file_that_is_not_there(assets):
    with pytest.raises(InputError, match=rf"model.gguf_file.*none.gguf.*{SMOLLM2}"):
        describe_model(ModelSettings(name=str(assets / "models"), gguf_file="none.gguf"))


@pytest.fixture
def hub(tmp_path):
    """A hub cache that holds two revisions of org/tiny, as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for seed, revision in enumerate(("main", "step1000")):
        commit = f"{seed:040x}"
        save_checkpoint(repository / "snapshots" / commit, "gpt_neox", seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return tmp_path


def test_hub_name_and_revision(hub):
    text = text_file(hub / "text.txt", 200)
    environ = {**os.environ, "HF_HUB_CACHE": str(hub / "hub"), "HF_HUB_OFFLINE": "1"}
    values = {}
    words = ["run", "--quiet", "model=pretrained", "model.name=org/tiny", "target=all", "region=fraction",
             "region.kinds=[small]", "region.values=[0.1]", "region.controls=[]", "task=text",
             f"tasks.text.data_files={text}"]
    program = f"""
from harness.cli import main
for revision in ("main", "step1000"):
    if main([*{words!r}, f"model.revision={{revision}}", f"output={hub}/{{revision}}"]):
        raise SystemExit(1)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for revision in ("main", "step1000"):
        table = pd.read_parquet(hub / revision / "metrics")
        assert set(table.model) == {"org/tiny"} and set(table.revision) == {revision}
        baseline = table[(table.target == "baseline") & (table.metric == "token_perplexity")]
        values[revision] = (baseline.model_digest.item(), baseline.value.item())
    assert values["main"][0] == "0" * 40 and values["step1000"][0] == f"{1:040x}"
    assert values["main"][1] != values["step1000"][1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_dtype_auto_is_the_one_that_the_checkpoint_states(family, tmp_path):
    save_checkpoint(tmp_path / family, family, torch.bfloat16)
    config = ModelSettings(name=str(tmp_path / family), dtype="auto")
    assert describe_model(config).dtype == "bfloat16"
    assert {parameter.dtype for parameter in load(config).model.parameters()} == {torch.bfloat16}


def test_identity_follows_the_weights_and_not_the_folders_name(tmp_path):
    one = save_checkpoint(tmp_path / "one", "llama", seed=1)
    shutil.copytree(one, tmp_path / "copy")
    other = save_checkpoint(tmp_path / "other", "llama", seed=2)
    folders = (one, tmp_path / "copy", other)
    identities = [describe_model(ModelSettings(name=str(folder))).identity for folder in folders]
    assert identities[0] == identities[1] != identities[2]


def test_pickled_weights_are_not_read(tmp_path):
    """A .bin file may run code when it is unpickled; only safetensors and GGUF are opened."""
    folder = save_checkpoint(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save(Payload(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="model.name"):
        load(ModelSettings(name=str(folder)))
    assert not (tmp_path / "pwned").exists()


def test_code_of_the_checkpoint_does_not_run_unless_asked_for(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}})
    )
    (folder / "configuration_mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="model.name"):
        describe_model(ModelSettings(name=str(folder)))
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_launcher_has_its_own_gpu(two_gpus, monkeypatch, name):
    assert pick_device(name) == torch.device("cuda", 0)
    for rank, index in (("0", 0), ("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device(name) == torch.device("cuda", index)
        assert pick_device("cuda:0") == torch.device("cuda", 0)  # as it was asked for


def test_the_device_of_the_process_is_set_before_weights_are_loaded(two_gpus, monkeypatch, tmp_path):
    done = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", done.append)

    def stop(*arguments):
        done.append("weights")
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.models.loading.from_files", stop)
    with pytest.raises(KeyboardInterrupt):
        load(ModelSettings(name=str(save_checkpoint(tmp_path / "tiny")), device="cuda"))
    assert done == [torch.device("cuda", 1), "weights"]


def test_a_device_without_float64_is_refused_before_anything_is_loaded():
    line = "device: 'mps' is wrong; it has no float64, which decompositions need; use cpu"
    with pytest.raises(InputError, match=line):
        ModelSettings(name="some/model", device="mps")
    with pytest.raises(InputError, match=line):
        pick_device("mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_is_loaded_on_the_gpu_of_its_rank(monkeypatch, tmp_path):
    last = torch.cuda.device_count() - 1
    monkeypatch.setenv("LOCAL_RANK", str(last))
    loaded = load(ModelSettings(name=str(save_checkpoint(tmp_path / "tiny")), device="cuda"))
    assert loaded.device == torch.device("cuda", last) and torch.cuda.current_device() == last
