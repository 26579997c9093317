"""How often the host waits for the device, counted on devices that do not exist, and which kernel attention takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.evaluation.requests import Request
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import ScoringOptions
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel, loaded_from
from harness.models.targets import TargetSettings, expand_targets
from harness.spectral.regions import small
from tests.evaluation.test_scoring import requests_for, task
from tests.models.tiny import tiny_model
from tests.simulated import FIRST, moved, simulated, tree_requests

CAUSAL = ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2")


def _moved(loaded: LoadedModel) -> LoadedModel:
    moved(loaded.model)
    loaded.device = FIRST
    return loaded


@pytest.mark.parametrize("model_type, needs_rank", [("llama", True), *((name, False) for name in CAUSAL)])
def test_the_host_waits_once_for_all_batches_of_a_pass(model_type: str, needs_rank: bool) -> None:
    """Plain rows in several batches, from the first block and resumed, with the stream on the device and the host."""
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    expected = Scorer(loaded_from(model), {"task": task(requests_for(model_type), needs_rank)}, ScoringOptions(60))
    numbers = expected.score("task").logprob.tolist()
    with simulated() as devices:
        loaded = _moved(loaded_from(model))
        for budget in ({}, {"stream_bytes": 0, "host_bytes": 2**20}):
            options = replace(ScoringOptions(60), **budget)
            scorer = Scorer(loaded, {"task": task(requests_for(model_type), needs_rank)}, options)
            assert len(scorer.packed["task"].batches) > 2
            for block in range(len(loaded.blocks)):
                devices.waits.clear()
                scorer.advance(block)
                assert devices.waits == []
                assert scorer.score("task", block).logprob.tolist() == numbers
                assert devices.waits == ["_to_copy from cuda:0 to cpu"]


def test_and_once_for_trees() -> None:
    with simulated() as devices:
        scorer = Scorer(_moved(loaded_from(tiny_model("llama"))), {"task": task(tree_requests())}, ScoringOptions(400))
        assert [batch.last is not None for batch in scorer.packed["task"].batches] == [True]
        devices.waits.clear()
        scorer.score("task")
        assert devices.waits == ["_to_copy from cuda:0 to cpu"]


@pytest.mark.parametrize("edit", ["weight", "branch"])
def test_and_at_most_once_for_an_edited_matrix(edit: str) -> None:
    """Of a region that is chosen by rank, once the matrix is decomposed; restoring it does not wait at all."""
    with simulated() as devices:
        loaded = _moved(loaded_from(tiny_model("llama")))
        cache = DecompositionCache(loaded, 2**30)
        target = expand_targets(TargetSettings("block"), loaded.matrices)[0]
        for matrix in loaded.matrices:
            cache(matrix)
        for region in (small(0.3), small(0.7)):
            devices.waits.clear()
            with ablated(loaded, Ablation(target, region), cache, edit):
                assert len(devices.waits) <= len(target.matrices), devices.waits[:5]
                devices.waits.clear()
            assert devices.waits == []


def test_transformers_looks_at_the_values_of_every_batch_by_the_name_that_is_replaced(monkeypatch) -> None:
    """So that the tests above fail if a version of transformers has this function under another name."""
    from contextlib import nullcontext

    from transformers import masking_utils

    from harness.evaluation import scoring

    found, looked = masking_utils.find_packed_sequence_indices, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        looked.append(1)
        return found(*args, **kwargs)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counted)
    scorer = Scorer(loaded_from(tiny_model("llama")), {"task": task(requests_for("llama"))}, ScoringOptions(60))
    scorer.score("task")
    assert not looked
    monkeypatch.setattr(scoring, "without_waiting", nullcontext)
    scorer.score("task")
    assert len(looked) > 1


class _Attention(TorchDispatchMode):
    """Notes which kernel scaled dot product attention took, and with which mask."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[str, bool, bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if "scaled_dot_product" in name and name != "scaled_dot_product_attention":
            causal = kwargs.get("is_causal", args[4] if len(args) > 4 else False)
            self.taken.append((name, kwargs.get("attn_mask") is None, bool(causal)))
        return function(*args, **kwargs)


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _attention(loaded: LoadedModel, requests: list[Request], options: ScoringOptions) -> set[tuple[str, bool, bool]]:
    scorer = Scorer(loaded, {"task": task(requests)}, options)
    with _Attention() as attention, torch.no_grad():
        for i in range(len(scorer.packed["task"].batches)):
            Scorer._score_batch.__wrapped__(scorer, ("task", i), False)  # inference mode hides the kernels
    return set(attention.taken)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral"])
def test_plain_rows_take_the_flash_kernel_without_a_mask(model_type: str) -> None:
    loaded = loaded_from(tiny_model(model_type))
    found = _attention(loaded, requests_for(model_type), ScoringOptions(60, share_context=False))
    assert found == {(FLASH, True, True)}


def test_trees_have_a_mask() -> None:
    (taken,) = _attention(loaded_from(tiny_model("llama")), tree_requests(), ScoringOptions(400))
    assert taken == (FLASH, False, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_on_a_gpu(model_type: str) -> None:
    """torch's own count of waits, and the kernels by the profiler."""
    import warnings

    loaded = loaded_from(tiny_model(model_type).to("cuda", torch.bfloat16))
    scorer = Scorer(loaded, {"task": task(requests_for(model_type), False)}, ScoringOptions(60))
    scorer.advance(1)
    scorer.score("task", 1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            scorer.score("task", 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(wait.message) for wait in waits) <= 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scorer.score("task", 1)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


