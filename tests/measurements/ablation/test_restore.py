"""After a study every byte of the model is what it was: the real run loop, on a tiny checkpoint of every family."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from harness.measurements import ABLATION
from harness.measurements.ablation import cell_run, measure
from harness.measurements.ablation.settings import StudySettings
from harness.settings.compose import checked
from tests.encoders import save, tiny_classifier
from tests.models.tiny import TINY, tiny_model
from tests.studies import run_settings

TEXT = "the cat sat on the mat . mary gave the red book to john , and then it was good .\n" * 6
ROWS = '{"text": "the cat sat", "sentence": "the dog ran", "source": "a bird", "target": "it ran", "label": 1}\n'
# grouped products of bfloat16 want rows of a multiple of 16 bytes
SIZES = {"qwen3_moe": {"moe_intermediate_size": 16}}
KINDS = {"bert": "masked", "roberta": "masked", "t5": "seq2seq"}


def digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and bytes of all parameters and buffers."""
    found = hashlib.sha256()
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def settings(folder, model_type: str, dtype: str, kind: str, model=None) -> StudySettings:
    """Two targets by two regions and the controls of one task; routers and tables of position biases included."""
    if model_type == "recall":
        recall = {"dim": 16, "hidden_dim": 24, "context_length": 16, "steps": 1, "batch_size": 4,
                  "cache_dir": str(folder / "cache")}
        chosen = {"name": "recall", "recall": recall}
        task = {"kind": "recall", "n_sequences": 16}
    else:
        tokens = model_type if model_type in (*KINDS, "llama") else "llama"
        model = tiny_model(model_type, **SIZES.get(model_type, {})) if model is None else model
        save(folder / "model", tokens, model)
        chosen = {"name": str(folder / "model")}
        data = folder / ("text.txt" if kind == "text" else "rows.jsonl")
        data.write_text(TEXT if kind == "text" else ROWS * 3)
        task = {"kind": kind, "data_files": str(data)} | ({"window": 16} if kind == "text" else {})
    return checked(ABLATION.settings, {
        "model": {**chosen, "dtype": dtype, "device": "cpu"},
        "target": {"kind": "block", "layer_types": ["all", "router", "relative_bias"], "blocks": [0, 1]},
        "region": {"by": "fraction", "kinds": ["large", "small"], "values": [0.5], "controls": ["none", "random"]},
        "tasks": {"task": task}, "output": str(folder / "study"),
    })


def run(config: StudySettings, monkeypatch) -> pd.DataFrame:
    """Run a study and check the model that it loaded; its table of metrics."""
    seen = []

    def load(*arguments):
        loaded = real_load(*arguments)
        seen.append((loaded.model, digest(loaded.model), {id(p) for p in loaded.model.parameters()}))
        return loaded

    real_load = measure.load
    monkeypatch.setattr(measure, "load", load)
    folder = run_settings(config)
    ((model, before, parameters),) = seen
    assert digest(model) == before
    assert {id(p) for p in model.parameters()} == parameters
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return pd.read_parquet(folder / "metrics")


def assert_measured(table: pd.DataFrame) -> None:
    assert (table.status == "ok").all(), table.error.dropna().tolist()[:1]
    edited = table[(table.target_kind == "block") & (table.region_kind == "large")]
    assert edited.target.nunique() == 2
    # were nothing written, nothing would have to be put back
    assert (edited.groupby("target").delta.apply(lambda deltas: deltas.abs().max()) > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TINY)
def test_every_byte_is_what_it_was(model_type: str, dtype: str, tmp_path, monkeypatch) -> None:
    config = settings(tmp_path, model_type, dtype, KINDS.get(model_type, "text"))
    assert_measured(run(config, monkeypatch))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2"])
def test_every_byte_of_a_classifier_is_what_it_was(model_type: str, tmp_path, monkeypatch) -> None:
    model = tiny_classifier(model_type)
    assert_measured(run(settings(tmp_path, model_type, "float32", "classification", model), monkeypatch))


def test_every_byte_is_what_it_was_after_cells_that_failed(tmp_path, monkeypatch) -> None:
    """Scoring that fails under an edit leaves through the same door."""
    config = settings(tmp_path, "llama", "float32", "text")
    real = cell_run.CellRun._measure

    def failing(run_of_cells, cell, *arguments):
        if cell.ablation.target.kind == "block" and cell.ablation.region.kind == "small":
            raise FloatingPointError("made to fail")
        return real(run_of_cells, cell, *arguments)

    monkeypatch.setattr(cell_run.CellRun, "_measure", failing)
    table = run(config, monkeypatch)
    failed = table[table.status == "error"]
    assert set(failed.region_kind) == {"small"} and failed.error.str.contains("made to fail").all()


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "mixtral", "bert", "t5"])
def test_cells_that_resume_equal_cells_that_run_every_block(model_type: str, tmp_path, monkeypatch) -> None:
    tables = []
    for reuse in (True, False):
        config = settings(tmp_path / str(reuse), model_type, "float32", KINDS.get(model_type, "text"))
        config.runtime.reuse = reuse
        table = run(config, monkeypatch).sort_values(["target", "region", "metric"], ignore_index=True)
        tables.append(table[["target", "region", "metric", "value", "stderr", "delta"]])
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_lines_of_the_docs_run(capsys) -> None:
    """docs/editing.md on a model in memory, against a truncation by LAPACK's SVD."""
    (code,) = re.findall(r"(?s)```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "editing.md").read_text())
    model, tokens = tiny_model("llama"), torch.arange(2, 18)[None]
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    exec(code, found := {"module": model, "tokens": tokens})
    weight = other.model.layers[1].mlp.down_proj.weight
    u, sigma, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    kept = len(sigma) - len(sigma) // 2
    with torch.no_grad():
        plain = other(input_ids=tokens).logits
        weight.copy_((u[:, :kept] * sigma[:kept]) @ v[:kept])
        expected = other(input_ids=tokens).logits
    assert torch.allclose(found["logits"], expected, atol=1e-6, rtol=0)
    assert (plain - expected).abs().max() > 1e-4
    assert capsys.readouterr().out == f"{len(sigma) // 2} of {len(sigma)} singular values removed\n"
    assert all(torch.equal(after, before[name]) for name, after in model.state_dict().items())
