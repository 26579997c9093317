"""Branch mode: equal to edited weights in float32, and what low precision would swallow really goes."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from harness.cli import main
from harness.errors import InputError
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.branches import branch, branched, check_branchable
from harness.models.editing import Ablation, ablated
from harness.models.families import GROUPS, matrices_of, skeleton
from harness.models.loading import LoadedModel, loaded_from
from harness.models.targets import Target
from harness.spectral.decomposition import decompose
from harness.spectral.regions import Nothing, large, small
from tests.checkpoints import save_checkpoint, text_file
from tests.evaluation.test_scoring import requests_for, task
from tests.models.tiny import TINY, model_inputs, tiny_config, tiny_model
from tests.simulated import FIRST, moved, simulated


def decomposer(loaded: LoadedModel):
    return lambda matrix: decompose(matrix.read(loaded.model))


def ablation(names: list[str], region, first_block: int = 0) -> Ablation:
    return Ablation(Target("all", "all", tuple(names), first_block), region)


def branchable(loaded: LoadedModel, block: int | None = None) -> list[str]:
    return [m.name for m in loaded.matrices
            if m.expert is None and m.layer_type in GROUPS["all"] and block in (None, m.block)]


def moe(loaded: LoadedModel) -> bool:
    return any(m.expert is not None for m in loaded.matrices)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**model_inputs(model)).logits


@pytest.mark.parametrize("region", [small(0.3), large(0.2), small(0.7)],
                         ids=lambda region: region.label)
@pytest.mark.parametrize("model_type", TINY)
def test_in_float32_it_is_the_edited_weight(model_type: str, region) -> None:
    loaded = loaded_from(tiny_model(model_type))
    # In float64 no rounding of the edited weight is in the comparison; fused experts have no float64 product.
    reference = loaded_from(tiny_model(model_type).to(torch.float32 if moe(loaded) else torch.float64))
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    baseline = logits(loaded.model)
    for names in ([[name] for name in branchable(loaded, 1)] + [branchable(loaded)]):
        with ablated(reference, ablation(names, region), decomposer(reference)) as expected:
            by_weight = logits(reference.model)
        with ablated(loaded, ablation(names, region), decomposer(loaded), "branch") as realised:
            by_branch = logits(loaded.model)
        scale = by_weight.abs().max()
        assert float((by_branch - by_weight).abs().max()) < 1e-5 * float(scale), names
        assert float((by_branch - baseline).abs().max()) > 1e-4 * float(scale), names
        assert realised.realised_removal > 1 - 1e-4
        assert (realised.n_removed, realised.n_values) == (expected.n_removed, expected.n_values)
        assert realised.energy_removed == pytest.approx(expected.energy_removed, rel=1e-6)
        assert torch.equal(logits(loaded.model), baseline)
    assert all(torch.equal(before[name], p) for name, p in loaded.model.named_parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "phi3", "t5"])
def test_removing_nothing_or_everything(model_type: str) -> None:
    loaded = loaded_from(tiny_model(model_type, torch.bfloat16))
    baseline = logits(loaded.model)
    names = branchable(loaded, 1)
    with ablated(loaded, ablation(names, Nothing()), decomposer(loaded), "branch") as realised:
        assert torch.equal(logits(loaded.model), baseline)
        assert realised.realised_removal is None and realised.n_removed == 0
    everything = ablation(names, small(1.0))
    with ablated(loaded, everything, decomposer(loaded)):
        by_weight = logits(loaded.model)
    with ablated(loaded, everything, decomposer(loaded), "branch") as realised:
        assert torch.equal(logits(loaded.model), by_weight)
        assert realised.realised_removal == 1


@torch.no_grad()
def kept_along_the_removed(loaded: LoadedModel, name: str, path: str, edit_mode: str) -> tuple[float, float]:
    """What an ablation of the smallest 0.5 % leaves: by the row, and at the module's output by regression on what an
    exact multiplication gives along the removed directions, which rounding noise does not pull either way."""
    matrix = next(m for m in loaded.matrices if m.name == name)
    module, seen = loaded.model.get_submodule(path), []
    with ablated(loaded, ablation([name], small(0.005)), decomposer(loaded), edit_mode) as realised:
        handle = module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        loaded.model(torch.randint(3, 60, (8, 120), generator=torch.Generator().manual_seed(1)))
        handle.remove()
    weight = matrix.read(loaded.model).double()
    x, y = (tensor.flatten(0, -2).double() for tensor in seen[0])
    y = y[:, matrix.layout.rows[0] : matrix.layout.rows[1]] if matrix.layout.rows else y
    left = torch.linalg.svd(weight).U[:, -realised.n_removed :]
    there, found = x @ weight.T @ left, y @ left
    return 1 - realised.realised_removal, float((there * found).sum() / there.square().sum())


@pytest.mark.parametrize(
    ("model_type", "name", "path", "sizes"),
    [
        ("llama", "0.o_proj", "model.layers.0.self_attn.o_proj", {"hidden_size": 512, "num_key_value_heads": 4}),
        ("gpt2", "0.o_proj", "transformer.h.0.attn.c_proj", {"n_embd": 512}),
        ("gpt2", "0.v_proj", "transformer.h.0.attn.c_attn", {"n_embd": 512}),
        ("gpt_neox", "0.o_proj", "gpt_neox.layers.0.attention.dense", {"hidden_size": 512}),
        ("phi3", "0.q_proj", "model.layers.0.self_attn.qkv_proj", {"hidden_size": 512}),
    ],
)
def test_bfloat16_swallows_an_edited_weight_and_not_a_branch(model_type, name, path, sizes) -> None:
    layers = {"n_layer": 1} if model_type == "gpt2" else {"num_hidden_layers": 1}
    model = tiny_model(model_type, torch.bfloat16, **sizes, **layers)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()  # so that the output itself is the product
    loaded = loaded_from(model)
    row, measured = kept_along_the_removed(loaded, name, path, "weight")
    assert row > 0.4 and measured > 0.25
    row, measured = kept_along_the_removed(loaded, name, path, "branch")
    assert row < 0.05 and abs(measured) < 0.05


def test_where_the_input_is_the_smaller_side_in_bfloat16() -> None:
    """up_proj: 24 inputs, 512 outputs; the float64 product, rounded once, and nothing else."""
    loaded = loaded_from(tiny_model("llama", torch.bfloat16, intermediate_size=512))
    matrix = next(m for m in loaded.matrices if m.name == "1.up_proj")
    weight = matrix.read(loaded.model)
    decomposition = decompose(weight)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    for indices in (torch.arange(22, 24), torch.arange(3, 24)):
        left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
        sigma[indices] = 0
        expected = (x.double() @ ((left * sigma) @ right).T).bfloat16()
        with branched(loaded.model, [branch(matrix, weight, decomposition, indices)]):
            found = loaded.model.model.layers[1].mlp.up_proj(x)
        assert (found != expected).float().mean() < 1e-3  # ties of the last rounding


def test_scores_resumed_at_the_edited_block_are_those_of_the_full_forward() -> None:
    loaded = loaded_from(tiny_model("phi3"))
    tasks = {"task": task(requests_for("phi3"))}
    full, resumed = Scorer(loaded, tasks, ScoringOptions(reuse=False)), Scorer(loaded, tasks)
    for block in (1, 2):
        resumed.advance(block)
        one = ablation(branchable(loaded, block), small(0.3), block)
        with ablated(loaded, one, decomposer(loaded), "branch"):
            ours, expected = resumed.score("task", block), full.score("task")
            assert (ours.logprob == expected.logprob).all()
        assert (expected.logprob != full.score("task").logprob).any()


@pytest.mark.parametrize(
    ("model_type", "name", "what"),
    [
        ("mixtral", "1.down_proj.e2", "an expert of a fused 3-D parameter"),
        ("qwen3_moe", "2.router", "not a plain linear layer"),
        ("t5", "decoder.0.relative_bias", "not a plain linear layer"),
    ],
)
def test_what_is_not_a_plain_linear_layer_is_refused(model_type: str, name: str, what: str) -> None:
    bare = skeleton(tiny_config(model_type))
    matrices = {m.name: m for m in matrices_of(bare)}
    check_branchable(bare, [m for m in matrices.values() if m.expert is None and m.layer_type in GROUPS["all"]])
    with pytest.raises(InputError, match=f"runtime.edit: branch cannot edit {name}, which is {what};.*edit=weight"):
        check_branchable(bare, [matrices[name]])


def test_through_the_command_line(tmp_path, capsys) -> None:
    def settings(model_type: str) -> list[str]:
        return [
            "runtime=branch", "model=pretrained", f"model.name={save_checkpoint(tmp_path / model_type, model_type)}",
            "model.dtype=bfloat16", "target.blocks=[1]", "region.kinds=[small]", "region.values=[0.1]", "task=text",
            f"tasks.text.data_files={text_file(tmp_path / 'text.txt')}", "tasks.text.split=train",
            f"runtime.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'study'}",
        ]  # fmt: skip

    assert main(["run", "--quiet", *settings("phi3")]) == 0
    table = pd.read_parquet(tmp_path / "study" / "metrics")
    assert set(table["edit"]) == {"branch"} and set(table["status"]) == {"ok"}
    assert (table.loc[table["target_kind"] == "matrix", "realised_removal"] > 0.999).all()
    assert (table.loc[table["region_kind"] == "none", "delta"] == 0).all()
    refused = ["plan", *settings("mixtral")]
    capsys.readouterr()
    assert main(refused) == 2
    refusal = capsys.readouterr().err
    assert "runtime.edit: branch cannot edit 1.gate_proj.e0" in refusal and refusal.count("\n") == 1


@pytest.mark.skipif(not hasattr(torch.ops.aten.mm, "dtype"), reason="this torch has no product with another dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_low_precision_is_multiplied_as_it_is_and_summed_in_float32(dtype) -> None:
    """On a simulated device, where products and sums are those of the CPU, so that nothing at all may differ."""
    name, region, found = "2.up_proj", small(0.2), []
    for on_device in (False, True):
        loaded = loaded_from(tiny_model("llama", dtype))
        loaded.model.set_attn_implementation("eager")
        with simulated() as devices:
            if on_device:
                moved(loaded.model)
                loaded.device = FIRST
            scorer = Scorer(loaded, {"task": task(requests_for("llama"))}, ScoringOptions(60))
            with ablated(loaded, ablation([name], region), decomposer(loaded), "branch"):
                found.append(scorer.score("task").logprob.tolist())
            taken = devices.operations.count("mm.dtype")
        assert taken == (len(scorer.packed["task"].batches) if on_device and dtype != torch.float32 else 0)
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_real_gpu_it_is_the_float32_product_up_to_the_order_of_the_sum(dtype) -> None:
    from harness.models.branches import _linear_in_float32

    x, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((3, 50, 256), (128, 256)))
    exact = x.double() @ weight.double().T
    ours = _linear_in_float32(x, weight)
    assert ours.dtype == torch.float32 and float((ours - exact).abs().max()) < 1e-4
