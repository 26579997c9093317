"""Trees by FlexAttention against trees by a mask, and what of it is asked for and refused."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers.integrations import flex_attention as of_transformers

from harness.errors import InputError
from harness.evaluation.packing import tree_mask
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.tree_attention import check_flex, flex_masked
from harness.measurements.ablation.cells import numeric_settings
from harness.measurements.ablation.settings import StudySettings
from harness.models.loading import loaded_from
from tests.evaluation.test_scoring import task
from tests.models.tiny import tiny_config, tiny_model
from tests.simulated import tree_requests

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2")


@pytest.fixture
def eager(monkeypatch) -> list[Any]:
    """FlexAttention without its compiler, which takes a minute; the masks that it was given."""
    masks: list[Any] = []

    def attend(query, key, value, training=False, **kwargs):
        masks.append(kwargs["block_mask"])
        return flex_attention(query, key, value, **{**kwargs, "kernel_options": None})

    monkeypatch.setattr(of_transformers, "compile_friendly_flex_attention", attend)
    return masks


def _score(model: Any, how: str, block: int = 0) -> tuple[np.ndarray, Scorer]:
    scorer = Scorer(loaded_from(model), {"task": task(tree_requests())}, ScoringOptions(400, tree_attention=how))
    assert [batch.last is not None for batch in scorer.packed["task"].batches] == [True]
    scorer.advance(block)
    return scorer.score("task", block).logprob, scorer


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_flex_gives_the_scores_of_the_mask(model_type: str, eager) -> None:
    wide = {"sliding_window": 128} if model_type == "gemma2" else {}  # trees are not wider than a window
    model = tiny_model(model_type, **wide)
    usual, (expected, _) = model.config._attn_implementation, _score(model, "mask")
    assert not eager
    for block in (0, 1):
        found, _ = _score(model, "flex", block)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    n_blocks = len(loaded_from(model).blocks)
    # a resumed pass and the move before it are one pass; the first pass of a batch runs the last block twice
    assert len(eager) == 2 * (n_blocks + 1) and None not in eager
    assert model.config._attn_implementation == usual


def test_the_block_mask_is_the_additive_mask() -> None:
    _, scorer = _score(tiny_model("llama"), "mask")
    (batch,) = scorer._batches.values()
    mask = flex_masked(batch).block_mask
    rows, length = batch.last.shape
    at = torch.arange(length)
    seen = torch.stack([torch.stack([mask.mask_mod(torch.tensor(row), None, query, at) for query in at])
                        for row in range(rows)])
    assert torch.equal(seen, tree_mask(batch.last, torch.float32)[:, 0] == 0)


def test_a_model_without_flex_is_refused_in_one_line() -> None:
    model = tiny_model("llama")
    check_flex(model)
    model._supports_flex_attn = False
    with pytest.raises(InputError, match="^runtime.tree_attention: 'flex' is wrong; .* for llama; use mask$"):
        check_flex(model)


def test_it_is_part_of_the_id_of_a_cell_and_the_usual_attention_is_not() -> None:
    class Description:
        identity: dict[str, str] = {}
        dtype = "float32"
        config = tiny_config("llama")

    settings = StudySettings()
    before = numeric_settings(settings, Description())
    assert "tree_attention" not in before
    settings.runtime.cuda_graphs = True  # the bits are the same
    assert numeric_settings(settings, Description()) == before
    settings.runtime.tree_attention = "flex"
    assert numeric_settings(settings, Description()) == {**before, "tree_attention": "flex"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or shutil.which("gcc") is None, reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_on_a_gpu(model_type: str) -> None:
    """Compiled, with heads of 16 numbers, the fewest that the kernel takes."""
    sizes = {"hidden_size": 64} if model_type == "llama" else {"n_embd": 64}
    model = tiny_model(model_type, **sizes).to("cuda")
    expected, found = _score(model, "mask")[0], _score(model, "flex")[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
