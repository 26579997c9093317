"""Exported models: transformers itself loads them, and they compute what the ablated model in memory computed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.cli import main
from harness.errors import InputError
from harness.models.factored import FILE, load_factored
from harness.models.families import AUTO_CLASSES, family_of, matrices_of
from harness.models.recall import load_recall
from tests.checkpoints import save_checkpoint, text_file
from tests.gguf_files import SMOLLM2, beginning
from tests.models.tiny import model_inputs, tiny_config

FAMILIES = ("llama", "gpt2", "gpt_neox", "phi3", "mixtral", "roberta", "t5")
EVERYTHING = ["target=all", "region=fraction", "region.kinds=[small]", "region.values=[0.9]"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> its tiny checkpoint."""
    made: dict[tuple, Path] = {}

    def of(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / family
            made[family, dtype] = save_checkpoint(folder, family, dtype)
        return made[family, dtype]

    return of


def export(checkpoint: Path, output: Path, *settings: str, factored: bool = False) -> int:
    options = ["--factored"] if factored else []
    return main(["export", *options, "model=pretrained", f"model.name={checkpoint}", f"output={output}", *settings])


def refusal(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def by_transformers(folder: Path, family: str, **options):
    import transformers

    kind = family_of(tiny_config(family)).kind
    return getattr(transformers, AUTO_CLASSES[kind]).from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**model_inputs(model)).logits


def edited_by_hand(folder: Path, family: str, keep: float, names=None):
    """The checkpoint with its matrices cut by LAPACK: only the largest `keep` of the values of each stay."""
    model = by_transformers(folder, family)
    for matrix in matrices_of(model):
        if matrix.layer_type in ("router", "relative_bias") or names and matrix.name not in names:
            continue
        left, sigma, right = torch.linalg.svd(matrix.read(model).double(), full_matrices=False)
        sigma[int(keep * len(sigma) + 1e-9) :] = 0
        matrix.write(model, (left * sigma) @ right)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_exported(checkpoint, tmp_path, family, capsys) -> None:
    output = tmp_path / "ablated"
    block = 2
    name = {"t5": "decoder.0.up_proj", "mixtral": "2.q_proj"}.get(family, f"{block}.up_proj")
    layer_type = name.rpartition(".")[2]
    settings = [f"target.layer_types=[{layer_type}]", f"target.blocks=[{block}]", "region=fraction",
                "region.kinds=[small]", "region.values=[0.25]"]
    assert export(checkpoint(family), output, *settings) == 0
    assert f"{name}: bottom 25 % (6 of 24 singular values, 1 matrices) in {output}" in capsys.readouterr().out
    ours, expected = by_transformers(output, family), edited_by_hand(checkpoint(family), family, 0.75, [name])
    state = expected.state_dict()
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=0, atol=2e-7)
    changed = by_transformers(checkpoint(family), family).state_dict()
    assert [key for key, tensor in ours.state_dict().items() if not torch.equal(tensor, changed[key])] == [
        next(m.parameter for m in matrices_of(ours) if m.name == name)
    ]
    assert AutoTokenizer.from_pretrained(output)("the cat sat").input_ids == [4, 6, 9]
    about = json.loads((output / "ablation.json").read_text())
    assert (about["matrices"], about["region"], about["n_removed"]) == ([name], "small 0.25", 6)
    assert about["realised_removal"] > 0.9999
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_factored_loads_to_the_same_outputs_from_a_smaller_file(checkpoint, tmp_path, family) -> None:
    dense, factored = tmp_path / "dense", tmp_path / "factored"
    assert export(checkpoint(family), dense, *EVERYTHING) == 0
    assert export(checkpoint(family), factored, *EVERYTHING, factored=True) == 0
    ours, theirs = load_factored(factored), by_transformers(dense, family)
    assert type(ours) is type(theirs) and not ours.training
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())  # tied as there
    scale = float(logits(theirs).abs().max())
    assert float((logits(ours) - logits(theirs)).abs().max()) < 1e-5 * scale
    by_hand = logits(edited_by_hand(checkpoint(family), family, 0.1))
    assert float((logits(ours) - by_hand).abs().max()) < 1e-4 * scale
    assert (factored / FILE).stat().st_size < 0.75 * (dense / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(factored)("the cat sat").input_ids == [4, 6, 9]


@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
def test_one_of_the_matrices_that_share_a_parameter(checkpoint, tmp_path, family) -> None:
    settings = ["target.layer_types=[k_proj]", "target.blocks=[1]", *EVERYTHING[1:]]
    assert export(checkpoint(family), tmp_path / "ablated", *settings, factored=True) == 0
    stored = load_file(tmp_path / "ablated" / FILE)
    assert {name for name in stored if name.startswith("1.")} == {"1.q_proj", "1.k_proj:left", "1.k_proj:right",
                                                                  "1.v_proj"}
    ours, expected = load_factored(tmp_path / "ablated"), edited_by_hand(checkpoint(family), family, 0.1, ["1.k_proj"])
    assert float((logits(ours) - logits(expected)).abs().max()) < 1e-5 * float(logits(expected).abs().max())


def test_bfloat16_factors_give_the_weights_that_were_rounded_once(checkpoint, tmp_path) -> None:
    source, settings = checkpoint("llama", torch.bfloat16), [*EVERYTHING, "model.dtype=auto"]
    assert export(source, tmp_path / "dense", *settings) == 0
    assert export(source, tmp_path / "f", *settings, factored=True) == 0
    ours = load_factored(tmp_path / "f").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").state_dict()
    different = sum(int((ours[name] != tensor).sum()) for name, tensor in theirs.items())
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert different < 1e-4 * sum(tensor.numel() for tensor in theirs.values())
    assert (tmp_path / "f" / FILE).stat().st_size < (tmp_path / "dense" / "model.safetensors").stat().st_size


def test_the_embedded_model(tmp_path) -> None:
    settings = ["model.recall.dim=32", "model.recall.hidden_dim=64", "model.recall.context_length=32",
                "model.recall.steps=3", "model.recall.batch_size=8", f"model.recall.cache_dir={tmp_path}", *EVERYTHING]
    assert main(["export", *settings, f"output={tmp_path / 'dense'}"]) == 0
    assert main(["export", "--factored", *settings, f"output={tmp_path / 'factored'}"]) == 0
    tokens = torch.arange(20)[None]
    expected, ours = (model(tokens).logits for model in (load_recall(tmp_path / "dense"),
                                                         load_factored(tmp_path / "factored")))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def study(checkpoint, tmp_path_factory):
    """A study of a checkpoint of its own: the settings of its text task, its folder, its table."""
    folder = tmp_path_factory.mktemp("study")
    source = save_checkpoint(folder / "model", "phi3")
    task = ["task=text", f"tasks.text.data_files={text_file(folder / 'text.txt')}", "tasks.text.split=train"]
    settings = ["model=pretrained", f"model.name={source}", *task, "target=block", "region=fraction"]
    assert main(["run", "--quiet", *settings, f"output={folder / 'study'}"]) == 0
    return source, task, folder / "study", pd.read_parquet(folder / "study" / "metrics")


def test_a_cell_of_a_study_is_exported_and_measures_the_same(study, tmp_path, capsys) -> None:
    _, task, folder, table = study
    cell = table[(table["block"] == 1) & (table["region_kind"] == "bulk")].iloc[0]
    output = tmp_path / "ablated"
    assert main(["export", "--study", str(folder), "--cell", cell["cell_id"][:12], f"output={output}"]) == 0
    again = tmp_path / "again"
    settings = ["model=pretrained", f"model.name={output}", *task, "target.blocks=[0]", f"output={again}"]
    assert main(["run", "--quiet", *settings]) == 0
    measured = pd.read_parquet(again / "metrics")
    baseline = measured[(measured["target"] == "baseline") & (measured["metric"] == cell["metric"])].iloc[0]
    assert baseline["value"] == pytest.approx(cell["value"], rel=1e-12)
    assert cell["value"] != pytest.approx(cell["baseline"], rel=1e-3)
    assert "block 1: middle 10 %" in capsys.readouterr().out


def test_what_cannot_be_exported_is_one_line(study, checkpoint, tmp_path, capsys) -> None:
    source, _, folder, table = study
    new = f"output={tmp_path / 'new'}"
    base = ["model=pretrained", f"model.name={checkpoint('llama')}", "region=fraction", "region.values=[0.1]"]
    one = ["target.layer_types=[o_proj]", "target.blocks=[0]", "region.kinds=[small]"]
    cell = table.loc[table["block"] == 0, "cell_id"].iloc[0]
    baseline = table.loc[table["target"] == "baseline", "cell_id"].iloc[0]
    text = refusal(capsys, *base, new, "target.layer_types=[o_proj]", "region.kinds=[small]")
    assert "mean 3 (0.o_proj: bottom 10 %, 1.o_proj: bottom 10 %, 2.o_proj: bottom 10 %)" in text
    assert "region.kinds: []" in refusal(capsys, *base, new, *one, "region.kinds=[]")
    assert "output: not set" in refusal(capsys, *base, *one)
    assert "not an empty folder" in refusal(capsys, *base, *one, f"output={source}")
    few = ["region.values=[0.15]", new]
    assert "20 of 24 singular values are kept" in refusal(capsys, "--factored", *base, *one, *few)
    assert "bfloat16 weights cannot leave out" in refusal(
        capsys, *base, *one, new, "runtime=branch", "model.dtype=bfloat16"
    )
    for cell_id in ("nosuchcell", ""):
        assert "no such cell" in refusal(capsys, "--study", str(folder), "--cell", cell_id, new)
    assert "it removes nothing" in refusal(capsys, "--study", str(folder), "--cell", baseline, new)
    assert "give both" in refusal(capsys, "--cell", cell, new)
    assert "a cell has its own settings" in refusal(
        capsys, "--study", str(folder), "--cell", cell, new, "model.dtype=bfloat16"
    )
    weights = source / "model.safetensors"
    kept = weights.read_bytes()
    state = load_file(weights)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, weights, metadata={"format": "pt"})
    try:
        assert "no longer what" in refusal(capsys, "--study", str(folder), "--cell", cell, new)
    finally:
        weights.write_bytes(kept)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_no_factored_model_is_refused(checkpoint, tmp_path) -> None:
    with pytest.raises(InputError, match="no factored.safetensors there"):
        load_factored(checkpoint("llama"))
    assert export(checkpoint("llama"), tmp_path / "f", *EVERYTHING, factored=True) == 0
    path = tmp_path / "f" / FILE
    content = path.read_bytes()
    stored = load_file(path)
    save_file(stored, path)
    with pytest.raises(InputError, match="format None, this harness reads"):
        load_factored(tmp_path / "f")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not readable"):
        load_factored(tmp_path / "f")


@pytest.mark.slow
@pytest.mark.assets
def test_a_gguf_model(assets, tmp_path) -> None:
    beginning(assets / "models" / SMOLLM2, tmp_path / SMOLLM2, 2)
    settings = ["model=pretrained", f"model.name={tmp_path}", "model.dtype=bfloat16",
                f"model.gguf_file={SMOLLM2}", "target.layer_types=[down_proj]",
                "target.blocks=[1]", "region=fraction", "region.kinds=[small]", "region.values=[0.9]"]
    assert main(["export", *settings, f"output={tmp_path / 'dense'}"]) == 0
    assert main(["export", "--factored", *settings, f"output={tmp_path / 'factored'}"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    ours = load_factored(tmp_path / "factored").state_dict()
    assert theirs.dtype == torch.bfloat16 and not hasattr(theirs.config, "quantization_config")
    different = {name: int((ours[name] != tensor).sum()) for name, tensor in theirs.state_dict().items()}
    assert {name for name, count in different.items() if count} <= {"model.layers.1.mlp.down_proj.weight"}
    assert sum(different.values()) < 1e-4 * 576 * 1536
    text = "The capital of France is"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "factored")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
