"""The reference of a model, and the pairs that are refused before weights are loaded."""

from __future__ import annotations

import json

import pytest

from harness.errors import InputError, SettingError
from harness.models.loading import describe_model
from harness.models.reference import describe_reference
from harness.models.settings import ModelSettings, ReferenceSettings
from tests.checkpoints import save_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def reference(model, other, **settings):
    """The reference of two folders."""
    own = ModelSettings(name=str(model))
    return describe_reference(ReferenceSettings(name=str(other), **settings), own, describe_model(own))


def test_a_pair_is_described_without_weights(base, tmp_path):
    tuned = save_checkpoint(tmp_path / "tuned", seed=1, vocab_size=80)  # a larger vocabulary has the same matrices
    found = reference(tuned, base)
    assert found.settings.name == str(base) and found.description.source == str(base)
    own = ModelSettings(name=str(tuned), dtype="bfloat16", device="cpu")
    in_bfloat16 = describe_reference(ReferenceSettings(name=str(base)), own, describe_model(own))
    assert in_bfloat16.description.dtype == "bfloat16" and in_bfloat16.settings.device == "cpu"
    assert describe_reference(ReferenceSettings(), own, describe_model(own)) is None


def test_the_reference_of_an_adapter_is_its_base():
    model = ModelSettings(name="some/base", adapter="some/adapter", revision="main")
    assert ReferenceSettings().of(model) == ModelSettings(name="some/base", revision="main")
    assert ReferenceSettings(name="a/b").of(model) == ModelSettings(name="a/b")
    assert ReferenceSettings().of(ModelSettings(name="some/base")) is None


def test_what_is_no_pair_is_one_line(base, tmp_path):
    def refused(words, *arguments, **settings):
        with pytest.raises(InputError) as caught:
            reference(*arguments, **settings)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    refused("is a 'gpt2' model, and", base, save_checkpoint(tmp_path / "gpt2", "gpt2"))
    refused("reference.name: 0.gate_proj is 40x24 in", base, save_checkpoint(tmp_path / "wide", intermediate_size=48))
    refused("and 48x24 in", base, tmp_path / "wide")
    refused("2.q_proj is 24x24 in", base, save_checkpoint(tmp_path / "short", num_hidden_layers=2))
    refused("has 2.q_proj, and", tmp_path / "short", base)
    refused("reference.name: './none' is not a folder", base, "./none")
    quantised = save_checkpoint(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    refused("reference.name: ", base, quantised)
    refused("is quantised by its config.json", base, quantised)
    refused("model.name: ", quantised, base)
    own = ModelSettings(name=str(base), gguf_file="model.gguf")
    with pytest.raises(InputError, match="model.gguf_file: .* is quantised"):
        describe_reference(ReferenceSettings(name=str(base)), own, None)


def test_settings_of_a_reference():
    with pytest.raises(SettingError, match="name: 'recall' is wrong; the embedded model is not compared"):
        ReferenceSettings(name="recall")
    assert [str(error) for error in ReferenceSettings(revision="x").unread()] == [
        "name: must be set, because reference.revision is"
    ]
