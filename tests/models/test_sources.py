"""Matrices streamed from checkpoints are bit for bit those of the loaded model."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.errors import InputError
from harness.models.loading import describe_model, load
from harness.models.settings import ModelSettings
from harness.models.sources import initialised, open_source
from tests.checkpoints import save_checkpoint
from tests.models.tiny import TINY, tiny_model

STORED_OTHERWISE = {"mixtral", "qwen3_moe", "olmoe", "gemma3"}  # experts in separate tensors; other prefixes


def hub_cache(folder, seeds):
    """Tiny models as revisions of some/model, under their seeds."""
    repo = folder / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    for revision, seed in seeds.items():
        commit = revision.encode().hex().ljust(40, "0")
        save_checkpoint(repo / "snapshots" / commit, "llama", seed=seed)
        (repo / "refs" / revision).write_text(commit)


def config_of(folder, **settings) -> ModelSettings:
    return ModelSettings(name=str(folder), device="cpu", **settings)


def assert_same(source, loaded):
    assert source.matrices == loaded.matrices
    for matrix in loaded.matrices:
        ours, theirs = source.read(matrix), matrix.read(loaded.model)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), matrix.name


@pytest.mark.parametrize("model_type", sorted(set(TINY) - {"recall"}))
def test_streamed_is_loaded(model_type, tmp_path):
    config = config_of(save_checkpoint(tmp_path / "model", model_type))
    description = describe_model(config)
    source = open_source(config, description)
    assert source.how == ("loaded" if model_type in STORED_OTHERWISE else "streamed")
    assert_same(source, load(config, description))


def test_dtype_is_the_models(tmp_path):
    folder = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    for dtype in ("auto", "float32", "float16"):
        config = config_of(folder, dtype=dtype)
        source = open_source(config, describe_model(config))
        assert_same(source, load(config))
        stored = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        assert source.read(source.matrices[0]).dtype == stored


def test_shards_and_a_bare_model(tmp_path):
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.base_model.save_pretrained(tmp_path / "bare")  # no "transformer." before the names
    for folder in ("shards", "bare"):
        shutil.copytree(save_checkpoint(tmp_path / f"whole-{folder}", "gpt2"), tmp_path / f"t-{folder}")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / f"t-{folder}" / name, tmp_path / folder / name)
        config = config_of(tmp_path / folder)
        source = open_source(config, describe_model(config))
        assert source.how == "streamed"
        for matrix in source.matrices:
            assert torch.equal(source.read(matrix), matrix.read(model))


def test_other_weight_files_beside_are_not_read(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "consolidated.safetensors")
    config = config_of(folder)
    source = open_source(config, describe_model(config))
    assert torch.equal(source.read(source.matrices[0]), tensors[source.matrices[0].parameter])


def test_a_damaged_file_is_one_line(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    config = config_of(folder)
    description = describe_model(config)
    source = open_source(config, description)
    (folder / "model.safetensors").write_bytes(b"\x10" * 50)
    with pytest.raises(InputError, match="model.name: .*model.safetensors has changed since the run was planned"):
        source.read(source.matrices[0])
    with pytest.raises(InputError, match="model.name: cannot read .*model.safetensors"):
        describe_model(config)


def write_gguf(path, model):
    """A Llama in llama.cpp's layout: its names, its permutation of q and k, one tensor quantised to 8 bits."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_merges(["t 1"])
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"])
    for block in range(c.num_hidden_layers):
        for ours, theirs in names.items():
            tensor = state[f"model.layers.{block}.{ours}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
            if heads:
                half = tensor.shape[0] // heads // 2
                tensor = tensor.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(tensor.shape)
            name = f"blk.{block}.{theirs}.weight"
            if theirs == "ffn_gate":
                packed = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_streamed(tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    write_gguf(tmp_path / "tiny.gguf", model)
    config = config_of(tmp_path, gguf_file="tiny.gguf")
    description = describe_model(config)
    source = open_source(config, description)
    assert source.how == "streamed"
    for matrix in source.matrices:
        ours, theirs = source.read(matrix), matrix.read(model)
        if matrix.layer_type == "gate_proj":
            assert 0 < (ours - theirs).abs().max() < 0.01  # 8 bits
        else:
            assert torch.equal(ours, theirs), matrix.name
    loaded = load(config, description, tokenizer="none needed")
    assert_same(source, loaded)


def test_revisions_of_the_hub(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out, read offline."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", {"step0": 1, "step1": 2})
    for revision, seed in (("step0", 1), ("step1", 2)):
        config = ModelSettings(name="some/model", revision=revision, device="cpu")
        source = open_source(config, describe_model(config))
        assert source.how == "streamed"
        expected = tiny_model("llama", seed=seed).model.layers[0].self_attn.q_proj.weight
        assert torch.equal(source.read(source.matrices[0]), expected)


def test_fresh_weights_are_the_models_own_and_seeded(tmp_path):
    folder = save_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=96)
    config = config_of(folder)
    description = describe_model(config)
    before = torch.random.get_rng_state()
    first, again, other = (initialised(config, description, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weight, same, differs = (m.matrices[0].read(m.model) for m in (first, again, other))
    assert torch.equal(weight, same) and not torch.equal(weight, differs)
    assert float(weight.std()) == pytest.approx(description.config.initializer_range, rel=0.05)


def test_fresh_recall_weights_are_those_before_training(tmp_path):
    config = ModelSettings(name="recall", device="cpu")
    config.recall.steps, config.recall.checkpoint, config.recall.cache_dir = 2, 0, str(tmp_path)
    loaded, fresh = load(config), initialised(config, describe_model(config), seed=5)
    for matrix in loaded.matrices:
        assert torch.equal(matrix.read(loaded.model), matrix.read(fresh.model))
