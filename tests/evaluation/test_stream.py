"""The kept stream stays within its budget, and no budget changes a bit of a score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.errors import InputError
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings, ScoringOptions
from harness.evaluation.stream import START, Kept, StreamStore
from harness.measurements.ablation.settings import StudySettings
from harness.models.loading import loaded_from
from harness.settings.validation import validated
from tests.evaluation.test_scoring import loaded, requests_for, task
from tests.models.tiny import tiny_model

CPU = torch.device("cpu")


def _kept(block: int, n: int, fill: float = 0.0) -> Kept:
    return Kept(block, (torch.full((n, 2), fill), None), torch.zeros(n))  # 12 n bytes


def kept_bytes(store: StreamStore) -> int:
    """Bytes of all tensors that a store keeps."""
    parts = [part for _, kept in store._kept.values() for part in (*kept.output, kept.encoded)]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))


def test_what_does_not_fit_is_not_kept_and_not_asked_for_again() -> None:
    store = StreamStore(CPU, device_bytes=100, host_bytes=1000)  # on the CPU there is one memory
    store.put("a", _kept(1, 4))
    store.put("b", _kept(1, 5))
    store.put("c", _kept(1, 4))
    assert [store.get(key).block for key in "abc"] == [1, 0, 1]
    assert store.get("b") is START and not store.takes("b") and store.takes("a")
    assert kept_bytes(store) == 96
    store.put("a", _kept(2, 4, 7.0))  # in the place of the one before
    assert kept_bytes(store) == 96 and store.get("a").block == 2 and float(store.get("a").output[0][0, 0]) == 7.0
    store.clear()
    assert kept_bytes(store) == 0
    store.put("d", _kept(1, 8))
    assert store.get("d").block == 1


def test_the_rest_goes_to_host_memory_and_comes_back_whole() -> None:
    store = StreamStore(torch.device("meta"), device_bytes=50, host_bytes=60)  # any device that is not the CPU
    store.put("a", _kept(1, 4))
    store.put("b", _kept(1, 4, 3.0))
    store.put("c", _kept(1, 4))
    place, kept = store._kept["b"]
    assert place == "host" and kept.output[0].device.type == "cpu"
    assert torch.equal(kept.output[0], torch.full((4, 2), 3.0)) and kept.output[1] is None
    assert store._kept["a"][0] == "device" and store.get("c") is START
    assert store.get("b").output[0].device.type == "cpu"  # moved to where it came from when it is needed
    store.drop("a")
    store.put("c", _kept(1, 4))
    assert store._kept["c"][0] == "device"


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "t5"])
def test_no_budget_changes_a_score(model_type: str) -> None:
    model, tasks = loaded(model_type), {"task": task(requests_for(model_type))}
    options = ScoringOptions(batch_tokens=60)
    free = Scorer(model, tasks, options)
    n_batches = len(free.packed["task"].batches)
    free.advance(1)
    needed = kept_bytes(free._store)
    assert n_batches > 2
    for share in (0.0, 0.6, 1.0):
        tight = Scorer(model, tasks, replace(options, stream_bytes=needed * share))
        for block in range(1, len(model.blocks)):
            tight.advance(block)
            free.advance(block)
            assert tight.score("task", block).logprob.tolist() == free.score("task", block).logprob.tolist()
            assert kept_bytes(tight._store) <= needed * share
        n_kept = sum(tight._store.get(("task", i)).block > 0 for i in range(n_batches))
        # T5 keeps more and more: position biases, and what the encoder hands over
        assert n_kept == 0 if share == 0 else 0 < n_kept < n_batches if share < 1 else n_kept > 0
        free.advance(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_on_a_gpu_a_stream_in_pinned_host_memory_gives_the_same_bits(model_type: str) -> None:
    model = loaded_from(tiny_model(model_type).to("cuda"))
    tasks, options = {"task": task(requests_for(model_type))}, ScoringOptions(batch_tokens=60)
    free, host, half = (Scorer(model, tasks, replace(options, **budget)) for budget in
                        ({}, {"stream_bytes": 0, "host_bytes": 2**30}, {"stream_bytes": 2000, "host_bytes": 2000}))
    for block in range(1, len(model.blocks)):
        for scorer in (free, host, half):
            scorer.advance(block)
            assert scorer.score("task", block).logprob.tolist() == free.score("task", block).logprob.tolist()
    assert kept_bytes(host._store) == kept_bytes(free._store)
    assert all(place == "host" and kept.output[0].is_pinned() for place, kept in host._store._kept.values())


def test_the_settings_reach_the_scorer() -> None:
    model, tasks = loaded("gpt2"), {"task": task(requests_for("gpt2"))}
    scorer = Scorer(model, tasks, RuntimeSettings(stream_gib=0.0, batch_tokens=60).scoring())
    scorer.advance(2)
    assert kept_bytes(scorer._store) == 0
    scorer = Scorer(model, tasks, RuntimeSettings(batch_tokens=60, share_context=False).scoring())
    scorer.advance(2)
    assert kept_bytes(scorer._store) > 0


@pytest.mark.parametrize("key", ["stream_gib", "stream_host_gib", "decomposition_gib"])
def test_a_budget_below_zero_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"runtime\.{key}: -1.0 is wrong; it must be at least 0"):
        validated(StudySettings, {"runtime": {key: -1.0}})
