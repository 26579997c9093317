"""The way of a direction through the final norm and the head, for RMS and layer norms, against plain products."""

from __future__ import annotations

import pytest
import torch

from harness.models.loading import loaded_from
from harness.models.unembedding import down_proj_of, extreme_tokens, final_norm, stream_directions
from tests.models.tiny import tiny_model


def opened(kind):
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(3)
    loaded = loaded_from(model)
    norm = final_norm(loaded)
    norm.weight.data = 1 + torch.randn(norm.weight.shape, generator=generator)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = torch.randn(norm.bias.shape, generator=generator)
    return loaded, norm


@pytest.mark.parametrize("kind, name", [("llama", "model.norm"), ("gpt2", "transformer.ln_f"),
                                        ("gpt_neox", "gpt_neox.final_layer_norm")])
def test_tokens_are_those_of_scaled_directions(kind, name):
    loaded, norm = opened(kind)
    assert norm is loaded.model.get_submodule(name)
    rows = torch.randn(4, norm.weight.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = rows if kind == "llama" else rows - rows.mean(1, keepdim=True)
    logits = (centred * norm.weight.double()) @ loaded.model.get_output_embeddings().weight.double().T
    order = logits.argsort(1, descending=True)
    promoted, suppressed = extreme_tokens(loaded, rows, 3)
    assert promoted == order[:, :3].tolist() and suppressed == order.flip(1)[:, :3].tolist()


def test_neurons_go_through_their_column_of_down_proj():
    loaded, _ = opened("llama")
    by_name = {matrix.name: matrix for matrix in loaded.matrices}
    up, down = by_name["1.up_proj"], by_name["1.down_proj"]
    assert down_proj_of(up, loaded.matrices) == down and down_proj_of(down, loaded.matrices) is None
    rows = torch.eye(up.shape[0], dtype=torch.float64)[:3]
    neurons = torch.arange(1.0, up.shape[0] + 1, dtype=torch.float64)
    found = stream_directions(loaded, up, rows, neurons)
    weight = loaded.model.get_parameter(down.parameter).double()
    assert torch.allclose(found, torch.stack([(i + 1) * weight[:, i] for i in range(3)]))
    assert torch.equal(stream_directions(loaded, down, rows[:, :4]), rows[:, :4])
    assert stream_directions(loaded, by_name["1.q_proj"], rows) is None
