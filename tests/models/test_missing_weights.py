"""Weights that a checkpoint does not hold are named, and never scored as the random numbers they would be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from harness.errors import InputError
from harness.evaluation.scoring import Scorer
from harness.models.loading import describe_model, load, loaded_from, require_head
from harness.models.settings import ModelSettings
from tests.encoders import save, tiny_classifier
from tests.encoders import tokenizer as tokenizer_of
from tests.models.tiny import TINY, tiny_model

ON_DISK = [model_type for model_type in TINY if model_type != "recall"]


def _save(folder, model, model_type):
    model.save_pretrained(folder)
    tokenizer_of(model_type if model_type in ("bert", "roberta", "t5") else "llama").save_pretrained(folder)
    return ModelSettings(name=str(folder), device="cpu")


def _drop(folder, wanted: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if wanted not in name}
    assert len(kept) < len(weights), list(weights)
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize("model_type", ON_DISK)
def test_a_whole_checkpoint_has_every_weight_and_its_values(model_type: str, tmp_path) -> None:
    model = tiny_model(model_type)
    loaded = load(_save(tmp_path, model, model_type))
    assert loaded.missing == ()
    require_head(loaded)
    there = dict(loaded.model.named_parameters())
    assert all(torch.equal(there[name], parameter) for name, parameter in model.named_parameters())


# a tied head is the embedding and cannot be lost by itself
@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "mixtral", "opt", "phi3", "gptj", "bert", "roberta"])
def test_a_checkpoint_without_its_head_is_named_before_it_is_scored(model_type: str, tmp_path, capfd) -> None:
    tie = {} if model_type in ("bert", "roberta") else {"tie_word_embeddings": False}
    model = tiny_model(model_type, **tie)
    config = _save(tmp_path, model, model_type)
    stored = {"gpt_neox": "embed_out", "bert": "cls."}.get(model_type, "lm_head")
    head = "cls." if model_type == "bert" else "lm_head"  # in the model
    _drop(tmp_path, stored)
    capfd.readouterr()
    loaded = load(config)
    assert loaded.missing and all(name.startswith(head) for name in loaded.missing)
    with pytest.raises(InputError, match=rf"^model\.name: .* no weights for {head}.* cannot be scored") as refused:
        require_head(loaded)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="cannot be scored"):
        Scorer(loaded, {})
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("model_type", ON_DISK)
def test_a_checkpoint_with_a_hole_in_its_body_is_refused(model_type: str, tmp_path) -> None:
    config = _save(tmp_path, tiny_model(model_type), model_type)
    names = sorted(load_file(tmp_path / "model.safetensors"))
    lost = next(name for name in names if ".1." in name and name.endswith("weight") and "vision" not in name)
    _drop(tmp_path, lost)
    with pytest.raises(InputError, match=r"^model\.name: .* (is not complete|does not fit its config)") as refused:
        load(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_encoder_without_any_head_has_spectra_but_no_scores(model_type: str, tmp_path) -> None:
    body = AutoModel.from_config(tiny_model(model_type).config)
    config = _save(tmp_path, body, model_type)
    loaded = load(config)
    own = dict(body.named_parameters())
    for matrix in loaded.matrices:
        own_name = matrix.parameter.removeprefix(f"{model_type}.")
        assert torch.equal(loaded.model.get_parameter(matrix.parameter), own[own_name])
    for classifier, head in ((False, "cls.|lm_head."), (True, "classifier.")):
        with pytest.raises(InputError, match=f"({head}).*saved as {type(body).__name__}"):
            require_head(load(config, describe_model(config, classifier)))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_a_masked_or_causal_checkpoint_is_no_classifier_and_the_reverse(model_type: str, tmp_path) -> None:
    config = _save(tmp_path / "model", tiny_model(model_type), model_type)
    with pytest.raises(InputError, match="cannot be scored"):
        require_head(load(config, describe_model(config, classifier=True)))
    classifier = _save(tmp_path / "classifier", tiny_classifier(model_type), model_type)
    with pytest.raises(InputError, match="cannot be scored"):
        require_head(load(classifier))
    loaded = load(classifier, describe_model(classifier, classifier=True))
    require_head(loaded)
    assert loaded.description.family.kind == "classification" and loaded.model.config.num_labels == 3


def test_no_classification_head_on_an_encoder_decoder(tmp_path) -> None:
    with pytest.raises(InputError, match="encoder-decoder with a classification head is not supported"):
        describe_model(ModelSettings(name=str(save(tmp_path, "t5"))), classifier=True)


def test_a_classifier_in_memory_is_known_as_one() -> None:
    assert loaded_from(tiny_classifier("bert")).description.family.kind == "classification"
    assert loaded_from(tiny_model("bert")).description.family.kind == "masked"


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_weights_of_another_size_than_the_config_says_are_refused(model_type: str, tmp_path) -> None:
    config = _save(tmp_path, tiny_model(model_type), model_type)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name][:16].clone()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"^model\.name: .*{name}.*\[16, 24\].*\[24, 24\]") as refused:
        load(config)
    assert "\n" not in str(refused.value)
