"""Activation covariances against numpy's, from inputs caught by plain hooks in whole forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.evaluation import covariance as covariance_module
from harness.evaluation.covariance import CovarianceStream, InputCovariance
from harness.evaluation.requests import Request
from harness.models.loading import loaded_from
from tests.models.tiny import tiny_model


def requests(lengths=(19, 7, 12, 19, 3), seed=0):
    """Sequences of which only the second half is scored."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 60, n) for n in lengths]
    return [Request(t, np.arange(len(t) // 2, len(t)), np.zeros(len(t) - len(t) // 2, dtype=np.int64)) for t in tokens]


def reference(model, asked, scored_only, modules):
    """Every module's inputs at the tokens that count, one unpadded sequence at a time: name -> float64 [n, in]."""
    caught = {name: [] for name in modules}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: caught[name].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in modules
    ]
    kept = []
    with torch.no_grad():
        for request in asked:
            model(input_ids=torch.from_numpy(request.tokens)[None])
            kept.append(torch.from_numpy(request.positions) if scored_only else torch.arange(len(request.tokens)))
    for handle in handles:
        handle.remove()
    return {name: torch.cat([rows[at] for rows, at in zip(found, kept)]).numpy() for name, found in caught.items()}


@pytest.mark.parametrize("scored_only", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3", "bert", "recall"])
def test_covariances_are_numpys(model_type, scored_only):
    model = tiny_model(model_type).float()
    loaded, asked = loaded_from(model), requests()
    owners = {matrix.name: matrix.parameter.rpartition(".")[0] for matrix in loaded.matrices}
    expected = reference(model, asked, scored_only, set(owners.values()))
    stream = CovarianceStream(loaded, asked, scored_only, batch_tokens=40)
    found: dict[str, InputCovariance] = {}
    for block in range(len(loaded.blocks)):
        of_block = [matrix for matrix in loaded.matrices if matrix.block == block]
        if block != 1:  # a block of which nothing is asked still runs
            found |= stream.next_block(of_block)
        else:
            assert stream.next_block([]) == {}
    assert set(found) == {matrix.name for matrix in loaded.matrices if matrix.block != 1}
    for name, covariance in found.items():
        rows = expected[owners[name]]
        assert covariance.n_tokens == len(rows)
        scale = rows.var(0).max()
        # batches of padded float32 rows round differently from single ones
        assert np.allclose(covariance.covariance, np.cov(rows.T, bias=True), rtol=0, atol=2e-5 * scale)
        assert np.allclose(covariance.mean, rows.mean(0), rtol=0, atol=2e-5 * scale**0.5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in block.__dict__ for block in loaded.blocks)


def test_matrices_with_one_input_share_one_covariance():
    loaded = loaded_from(tiny_model("llama"))
    found = CovarianceStream(loaded, requests()).next_block([m for m in loaded.matrices if m.block == 0])
    assert found["0.q_proj"] is found["0.k_proj"] is found["0.v_proj"]
    assert found["0.gate_proj"] is found["0.up_proj"]
    assert len({id(covariance) for covariance in found.values()}) == 4


def test_inputs_of_experts_are_left_out():
    loaded = loaded_from(tiny_model("mixtral"))
    found = CovarianceStream(loaded, requests()).next_block([m for m in loaded.matrices if m.block == 0])
    assert set(found) == {"0.q_proj", "0.k_proj", "0.v_proj", "0.o_proj", "0.router"}


def test_scored_tokens_only_of_overlapping_windows():
    tokens = np.arange(3, 33)
    first, second = tokens[:20], tokens[10:]
    overlapping = [Request(first, np.arange(20), first), Request(second, np.arange(10, 20), second[10:])]
    loaded = loaded_from(tiny_model("llama"))
    matrices = [m for m in loaded.matrices if m.block == 0]
    assert CovarianceStream(loaded, overlapping).next_block(matrices)["0.q_proj"].n_tokens == 30
    assert CovarianceStream(loaded, overlapping, scored_only=False).next_block(matrices)["0.q_proj"].n_tokens == 40


def test_a_batch_without_tokens_that_count():
    asked = requests((19, 12))
    none = Request(asked[0].tokens, np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    loaded = loaded_from(tiny_model("llama"))
    matrices = [m for m in loaded.matrices if m.name == "0.q_proj"]
    with_it, without = (CovarianceStream(loaded, some, batch_tokens=1).next_block(matrices)["0.q_proj"]
                        for some in ([none, asked[1]], [asked[1]]))
    assert torch.equal(with_it.covariance, without.covariance)


def test_a_large_mean_does_not_swallow_the_variance(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm = torch.nn.Identity()
        model.model.embed_tokens.weight[:, 0] += 1e6
    loaded, asked = loaded_from(model.double()), requests()
    monkeypatch.setattr(covariance_module, "_PIECE_ELEMENTS", 24 * 3)  # several pieces of a batch
    (covariance,) = CovarianceStream(loaded, asked, batch_tokens=20).next_block(
        [m for m in loaded.matrices if m.layer_type == "q_proj"]
    ).values()
    rows = model.model.embed_tokens.weight[torch.from_numpy(np.concatenate([r.tokens[r.positions] for r in asked]))]
    expected = float((rows[:, 0].detach().double() - 1e6).var(correction=0))
    assert float(covariance.covariance[0, 0]) == pytest.approx(expected, rel=1e-7)  # (1e6)^2 eps is 2e-4


def test_directions_are_eigenvectors_without_rounding_noise():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 20, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / 9
    directions = InputCovariance(torch.zeros(20), covariance, 9).directions()
    assert directions.shape == (20, 8)  # nine centred tokens span eight directions
    values = torch.linalg.eigvalsh(covariance).flip(0)[:8]
    assert torch.allclose(covariance @ directions, directions * values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_experts_have_the_covariance_of_the_tokens_that_are_routed_to_them(model_type):
    model = tiny_model(model_type).float()
    loaded, asked = loaded_from(model), requests()
    path = "model.layers.0.mlp.experts"
    experts, caught = model.get_submodule(path), []
    handle = experts.register_forward_pre_hook(lambda module, args: caught.append(args[:2]))
    with torch.no_grad():
        for request in asked:
            model(input_ids=torch.from_numpy(request.tokens)[None])
    handle.remove()
    scored = [torch.from_numpy(request.positions) for request in asked]
    hidden, chosen = (torch.cat([call[i][at] for call, at in zip(caught, scored)]) for i in (0, 1))
    found = CovarianceStream(loaded, asked, batch_tokens=40).next_block(
        [m for m in loaded.matrices if m.block == 0], experts=True
    )
    for expert in range(3):
        rows = hidden[(chosen == expert).any(1)].double()
        gate, up = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
        for name, expected in (("gate_proj", rows), ("up_proj", rows), ("down_proj", product)):
            one = found[f"0.{name}.e{expert}"]
            assert one.n_tokens == len(rows)
            numpys = np.cov(expected.detach().numpy().T, bias=True)
            assert np.allclose(one.covariance, numpys, rtol=0, atol=2e-5 * numpys.max())
            assert np.allclose(one.mean, expected.detach().mean(0), rtol=0, atol=2e-5 * numpys.max() ** 0.5)
