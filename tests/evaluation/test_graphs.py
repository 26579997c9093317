"""Passes that are captured and replayed: when, with which numbers, and what a graph must not survive.

The graphs here are recorders without a device: a replay computes the pass again, into the tensors of its results.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.engine.ranks import Ranks
from harness.errors import InputError
from harness.evaluation import graphs
from harness.evaluation.graphs import PASSES_BEFORE, Graphs, graphs_of, require_graphs
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings, ScoringOptions
from harness.measurements import compose_settings
from harness.measurements.ablation import measure
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel, loaded_from
from harness.models.targets import TargetSettings, expand_targets
from harness.spectral.regions import small
from tests.evaluation.test_scoring import requests_for, task
from tests.evaluation.test_synchronisation import CAUSAL, _moved
from tests.models.tiny import tiny_model
from tests.simulated import simulated, tree_requests


@dataclass
class Recorded:
    """A graph that computes its pass again when it is replayed, as the device would."""

    work: Any
    results: Any
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(self.results, self.work()):
            if old is not None:
                old.copy_(new)


class Recorder:
    """Captures passes as Recorded. spoil: how the results of a capture are changed."""

    def __init__(self, spoil: Any = None) -> None:
        self.graphs: list[Recorded] = []
        self.spoil = spoil

    def __call__(self, work: Any) -> tuple[Recorded, Any]:
        with torch.inference_mode():
            results = tuple(None if one is None else one.clone() for one in work())
            self.graphs.append(Recorded(work if self.spoil is None else lambda: self.spoil(work()), results))
        return self.graphs[-1], results


def _scorer(model_type: str = "llama", recorder: Any = None, needs_rank: bool = False) -> tuple[LoadedModel, Scorer]:
    loaded = loaded_from(tiny_model(model_type))
    scorer = Scorer(loaded, {"task": task(requests_for(model_type), needs_rank)}, ScoringOptions(60))
    if recorder is not None:
        with torch.inference_mode():
            scorer._graphs = Graphs(loaded.model, recorder)
    return loaded, scorer


def _score(scorer: Scorer, block: int = 0) -> list[float]:
    with torch.inference_mode():
        return scorer.score("task", block).logprob.tolist()


@pytest.mark.parametrize("model_type, needs_rank", [("llama", True), *((name, False) for name in CAUSAL)])
def test_cells_at_a_frontier_are_replayed_with_the_same_numbers(model_type: str, needs_rank: bool) -> None:
    recorder = Recorder()
    loaded, scorer = _scorer(model_type, recorder, needs_rank)
    _, plain = _scorer(model_type, None, needs_rank)
    cache, n_batches = DecompositionCache(loaded, 2**30), len(scorer.packed["task"].batches)
    last = len(loaded.blocks) - 1
    targets = [one for one in expand_targets(TargetSettings("matrix"), loaded.matrices) if one.first_block == last]
    for one in (scorer, plain):
        one.advance(last)
    for number, target in enumerate(targets[:5]):
        with ablated(loaded, Ablation(target, small(0.5)), cache):
            plain.loaded.model.load_state_dict(loaded.model.state_dict())
            assert _score(scorer, last) == _score(plain, last)
        captured = number >= PASSES_BEFORE
        assert len(recorder.graphs) == (n_batches if captured else 0)
        # the first replay is the one whose bits are compared
        assert {one.replays for one in recorder.graphs} == ({number - PASSES_BEFORE + 1} if captured else set())


def test_another_frontier_is_captured_anew() -> None:
    recorder = Recorder()
    loaded, scorer = _scorer(recorder=recorder)
    numbers, n = _score(scorer), len(scorer.packed["task"].batches)
    for block in range(3):
        scorer.advance(block)
        for _ in range(PASSES_BEFORE + 2):
            assert _score(scorer, block) == numbers
        assert len(recorder.graphs) == n * (block + 1)


def _hooked(loaded: LoadedModel) -> Any:
    return loaded.blocks[1].register_forward_hook(lambda module, args, output: 2 * output)


def _moved_weight(loaded: LoadedModel) -> None:
    weight = loaded.blocks[1].mlp.up_proj
    weight.weight = torch.nn.Parameter(3 * weight.weight.detach(), False)


@pytest.mark.parametrize("change", [_hooked, _moved_weight])
def test_a_graph_is_not_replayed_when_it_would_be_wrong(change: Any) -> None:
    recorder = Recorder()
    loaded, scorer = _scorer(recorder=recorder)
    for _ in range(PASSES_BEFORE + 1):
        before = _score(scorer)
    n, handle = len(recorder.graphs), change(loaded)
    replays = [one.replays for one in recorder.graphs]
    assert n and replays
    expected = Scorer(loaded, {"task": task(requests_for("llama"))}, ScoringOptions(60)).score("task").logprob.tolist()
    assert _score(scorer) == expected != before
    assert [one.replays for one in recorder.graphs] == replays
    if handle is None:  # weights at another address are captured again
        for _ in range(PASSES_BEFORE):
            _score(scorer)
        assert len(recorder.graphs) == 2 * n
    else:  # hooks may differ from cell to cell, and are never captured
        for _ in range(PASSES_BEFORE + 2):
            _score(scorer)
        assert len(recorder.graphs) == n
        handle.remove()
        assert _score(scorer) == before
        assert recorder.graphs[0].replays == replays[0] + 1


@pytest.mark.parametrize("problem", ["error", "memory", "numbers"])
def test_a_capture_that_fails_is_one_line_and_the_numbers_are_those_of_kernels(problem: str, caplog) -> None:
    def failing(work: Any) -> Any:
        if problem == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorder = Recorder(lambda results: (results[0] + 1, *results[1:]))
    _, scorer = _scorer(recorder=recorder if problem == "numbers" else failing)
    _, plain = _scorer()
    with caplog.at_level(logging.WARNING):
        for _ in range(PASSES_BEFORE + 3):
            assert _score(scorer) == _score(plain)
    (said,) = caplog.records
    words = {"error": "operation not permitted when stream is capturing", "memory": "memory ran out",
             "numbers": "its numbers differ from those of single kernels"}
    assert "\n" not in said.getMessage() and words[problem] in said.getMessage()
    assert len(recorder.graphs) == (problem == "numbers")


def test_when_graphs_are_used() -> None:
    loaded = loaded_from(tiny_model("llama"))
    assert all(graphs_of(loaded, wanted) is None for wanted in ("auto", True, False))  # on the CPU
    with simulated():
        tiny, experts = _moved(loaded_from(tiny_model("llama"))), _moved(loaded_from(tiny_model("mixtral")))
        assert graphs_of(tiny, False) is None and graphs_of(experts, "auto") is None
        assert graphs_of(experts, True) is not None
        assert graphs_of(_moved(loaded_from(tiny_model("bert"))), "auto") is None
        found = graphs_of(tiny, "auto")
        assert found is not None and found._most_tokens > 1e6  # a tiny model is bound by launches for any batch
        assert graphs_of(tiny, True)._most_tokens == float("inf")


def test_batches_that_keep_the_device_busy_are_launched_kernel_by_kernel() -> None:
    recorder = Recorder()
    _, scorer = _scorer()
    sizes = sorted({batch.input_ids.numel() for batch in scorer._batches.values()})
    assert len(sizes) > 1
    scorer._graphs = Graphs(scorer.loaded.model, recorder, most_tokens=sizes[0])
    for _ in range(PASSES_BEFORE + 1):
        _score(scorer)
    assert len(recorder.graphs) == sum(one.input_ids.numel() == sizes[0] for one in scorer._batches.values())


def test_a_stream_in_host_memory_is_not_captured_because_it_is_copied_anew() -> None:
    with simulated():
        scorer = Scorer(_moved(loaded_from(tiny_model("llama"))), {"task": task(requests_for("llama"))},
                        replace(ScoringOptions(60), stream_bytes=0, host_bytes=2**20))
        assert scorer._store.on_device(("task", 0)) is scorer._store.get(("task", 0))  # nothing is kept yet
        scorer.advance(1)
        assert scorer._store.on_device(("task", 0)) is None


def test_graphs_are_given_up_where_memory_runs_out_and_with_their_task() -> None:
    _, scorer = _scorer(recorder=Recorder())
    for give_up in (scorer.leave_device, scorer.stop_keeping, lambda: scorer.forget("task")):
        if "task" in scorer.packed:
            _score(scorer)
            assert scorer._graphs._passes
        give_up()
        assert not scorer._graphs._passes


@pytest.mark.parametrize("trees", [False, True])
def test_what_is_captured_does_not_wait_for_the_device(trees: bool) -> None:
    """Capturing fails where the host waits; the copy of the results comes after all batches."""
    with simulated() as devices:
        requests = tree_requests() if trees else requests_for("llama")
        scorer = Scorer(_moved(loaded_from(tiny_model("llama"))), {"task": task(requests, not trees)},
                        ScoringOptions(400 if trees else 60))
        for block in (0, 1):
            scorer.advance(block)
            for key, needs_rank in ((key, name) for key in scorer._batches for name in (False, not trees)):
                devices.waits.clear()
                scorer._score_batch(key, needs_rank)
                assert devices.waits == []


@pytest.mark.parametrize("model_type", [*CAUSAL, "mixtral", "bert", "t5"])
def test_edits_leave_every_weight_at_its_address(model_type: str) -> None:
    loaded = loaded_from(tiny_model(model_type))
    cache = DecompositionCache(loaded, 2**30)
    addresses = {name: one.data_ptr() for name, one in loaded.model.named_parameters()}
    for target in expand_targets(TargetSettings("block"), loaded.matrices):
        with ablated(loaded, Ablation(target, small(0.5)), cache):
            assert {name: one.data_ptr() for name, one in loaded.model.named_parameters()} == addresses
    assert {name: one.data_ptr() for name, one in loaded.model.named_parameters()} == addresses


def test_what_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(InputError, match="^runtime.cuda_graphs: True is wrong; it needs a CUDA device, .* use auto$"):
        require_graphs(RuntimeSettings(cuda_graphs=True), "cpu")
    for setting in ("auto", False):
        require_graphs(RuntimeSettings(cuda_graphs=setting), "cpu")
    with pytest.raises(InputError, match="^cuda_graphs: 'yes' is wrong; use auto, true or false$"):
        RuntimeSettings(cuda_graphs="yes")
    for other in ("runtime.edit=branch", "model.device_map=auto"):
        with pytest.raises(InputError, match="runtime.cuda_graphs: True is wrong"):
            compose_settings("ablation", ["runtime.cuda_graphs=true", other])
    assert compose_settings("ablation", []).runtime.cuda_graphs == "auto"
    assert compose_settings("ablation", ["runtime.cuda_graphs=false"]).runtime.cuda_graphs is False


def test_a_run_is_refused_before_its_model_is_loaded(monkeypatch) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(measure, "load", load)
    settings = compose_settings("ablation", ["runtime.cuda_graphs=true", "model.device=cpu"])
    with pytest.raises(InputError, match="^runtime.cuda_graphs: True is wrong"):
        measure.open_session(SimpleNamespace(settings=settings), Ranks(), False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(model_type: str, dtype: torch.dtype, monkeypatch, caplog) -> None:
    """Real graphs give the bits of single kernels under every edit, and all batches are captured."""
    captured, capture = [], graphs._DeviceCapture.__call__
    monkeypatch.setattr(graphs._DeviceCapture, "__call__", lambda self, work: captured.append(1) or capture(self, work))
    loaded = loaded_from(tiny_model(model_type).to("cuda", dtype))
    tasks = {"task": task(requests_for(model_type))}
    scorer, plain = (Scorer(loaded, tasks, ScoringOptions(60, cuda_graphs=wanted)) for wanted in (True, False))
    cache = DecompositionCache(loaded, 2**30)
    for block in range(len(loaded.blocks)):
        for one in (scorer, plain):
            one.advance(block)
        targets = expand_targets(TargetSettings("matrix", blocks=[block]), loaded.matrices)
        for target in targets:
            with ablated(loaded, Ablation(target, small(0.5)), cache):
                assert scorer.score("task", block).logprob.tolist() == plain.score("task", block).logprob.tolist()
    assert len(captured) == len(scorer.packed["task"].batches) * len(loaded.blocks)
    assert not caplog.records
