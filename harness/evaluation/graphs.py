"""Scoring passes as CUDA graphs: all kernels of a batch are launched at once, where launching them one by one is slow.

A graph reads weights, tokens and stream at the addresses at which they were when it was captured. Edits change weights
in place, so that one graph serves all cells at a frontier. What makes a graph wrong is noticed before it is replayed:
another stream, a parameter or buffer at another address, another attention, and modules with other hooks or forwards
than at the beginning, as branches and biases are. Such passes are launched kernel by kernel. A graph is kept only if
its first replay gives the bits of the pass that was launched kernel by kernel just before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.errors import one_line, wrong
from harness.evaluation.settings import RuntimeSettings
from harness.models.cost import model_cost
from harness.models.loading import LoadedModel, pick_device
from harness.models.memory import is_out_of_memory, release_memory

LOG = logging.getLogger(__name__)
# One batch at one frontier is launched so often before it is captured. A capture takes as long as about two passes.
PASSES_BEFORE = 2
# With fewer floating-point operations of a batch in a block, the host needs longer to launch its kernels than a GPU to
# compute them: about 20 kernels of 5 microseconds, at 400 TFLOP/s. On paper; the stage "graph" of
# experiments/speed/gpu.py measures it.
LAUNCH_BOUND_FLOPS = 4e10

# Log-probability, greedy, and rank or None of a batch.
Results = tuple[Tensor, Tensor, Tensor | None]


class Replayed(Protocol):
    """A captured pass."""

    def replay(self) -> None:
        """Compute the pass again, into the tensors that were its results."""
        ...


Capture = Callable[[Callable[[], Results]], tuple[Replayed, Results]]


def require_graphs(runtime: RuntimeSettings, device: str) -> None:
    """Raise InputError if runtime.cuda_graphs is true and the model is not on a CUDA device. device: its name."""
    if runtime.cuda_graphs is True and pick_device(device).type != "cuda":
        raise wrong("runtime.cuda_graphs", True, "it needs a CUDA device, and the model is on the CPU; use auto")


def graphs_of(loaded: LoadedModel, wanted: bool | str) -> Graphs | None:
    """Return what keeps the graphs of a model; None if it runs without.

    wanted: runtime.cuda_graphs. With "auto" only decoders have graphs, and among these not a mixture of experts, for
    whose routing the host waits.
    """
    device = loaded.device
    alone = all(parameter.device == device for parameter in loaded.model.parameters())
    fixed = loaded.description.family.kind == "causal" and all(matrix.expert is None for matrix in loaded.matrices)
    if device.type != "cuda" or wanted is False or not alone or (wanted == "auto" and not fixed):
        return None
    cost = model_cost(loaded.model, loaded.description.family).block
    most = LAUNCH_BOUND_FLOPS / (sum(cost) / len(cost)) if wanted == "auto" else float("inf")
    return Graphs(loaded.model, _DeviceCapture(device), most)


class _DeviceCapture:
    """Captures passes on one device. All graphs share one pool of memory, because they are replayed one by one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._side: Any = None

    def __call__(self, work: Callable[[], Results]) -> tuple[Replayed, Results]:
        with torch.cuda.device(self._device):
            usual = torch.cuda.current_stream()
            side = self._side = self._side or torch.cuda.Stream()
            side.wait_stream(usual)
            with torch.cuda.stream(side):  # what libraries allocate at their first call must not be captured
                work()
            usual.wait_stream(side)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Rows are made in another thread meanwhile, which must not end the capture.
                with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                    results = work()
            finally:
                torch.cuda.set_stream(usual)  # torch leaves the other stream if the capture fails
        return graph, results


@dataclass
class _Pass:
    """A batch at a frontier: its stream and the state of the model, and its graph once it has one."""

    stream: object
    state: tuple[Any, ...]
    passes: int = 0
    graph: Replayed | None = None
    results: Results | None = None


class Graphs:
    """The graphs of the passes of one model. capture: a function that captures a pass. most_tokens: of a batch."""

    def __init__(self, model: nn.Module, capture: Capture, most_tokens: float = float("inf")) -> None:
        self._model, self._capture, self._most_tokens = model, capture, most_tokens
        self._passes: dict[Any, _Pass] = {}
        self._modules = list(model.modules())
        self._places = [(places, name) for module in self._modules for places in (module._parameters, module._buffers)
                        for name, tensor in places.items() if tensor is not None]
        self._hooks = self._hooks_now()

    def takes(self, n_tokens: int) -> bool:
        """Return whether a batch of so many tokens, padded, is worth a graph."""
        return n_tokens <= self._most_tokens

    def run(self, key: Any, stream: object, state: tuple[Any, ...], work: Callable[[], Results]) -> Results:
        """Return what `work` returns, by its graph if there is one.

        The tensors are valid until the next pass of the same key. stream: what is kept of the batch at the frontier, as
        one object. state: that of the model now.
        """
        one = self._passes.get(key)
        if one is None or one.stream is not stream or one.state != state:
            one = self._passes[key] = _Pass(stream, state)
        if one.graph is not None and one.results is not None:
            one.graph.replay()
            return one.results
        results = work()
        one.passes += 1
        if one.passes > PASSES_BEFORE:
            self._add(one, work, results)
        return results

    def _add(self, one: _Pass, work: Callable[[], Results], expected: Results) -> None:
        """Capture a pass whose results are known. If that fails, no pass is captured any more."""
        try:
            graph, results = self._capture(work)
            graph.replay()
            problem = None if _same_bits(results, expected) else "its numbers differ from those of single kernels"
        except Exception as error:
            problem = "memory ran out" if is_out_of_memory(error) else one_line(error)
        if problem is None:
            one.graph, one.results = graph, results
            return
        LOG.warning("runtime.cuda_graphs: no pass is a CUDA graph from here on, because a capture failed (%s)",
                    problem[:200])
        self._most_tokens = -1.0
        self.clear()
        release_memory()

    def drop(self, key: Any) -> None:
        """Give up the graph of a batch, if it has one."""
        self._passes.pop(key, None)

    def clear(self) -> None:
        """Give up all graphs."""
        self._passes.clear()

    def state(self) -> tuple[Any, ...] | None:
        """Return what a graph holds fixed: where the weights are, and the attention. None if modules have other hooks.
        """
        if not _same_objects(self._hooks, self._hooks_now()):
            return None
        addresses = tuple(tensor.data_ptr() for places, name in self._places
                          if (tensor := places.get(name)) is not None)
        config = getattr(self._model, "config", None)
        return addresses, getattr(config, "_attn_implementation", None)

    def _hooks_now(self) -> list[Any]:
        """Return the hooks of all modules, and the forwards that replace those of their classes."""
        return [
            one for module in self._modules
            for one in (*module._forward_hooks.values(), *module._forward_pre_hooks.values(),
                        *([module.__dict__["forward"]] if "forward" in module.__dict__ else []))
        ]


def _same_objects(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(one is other for one, other in zip(first, second))


def _same_bits(first: Results, second: Results) -> bool:
    """Return whether two results have the same bits, of NaN too."""
    pairs = [(one, other) for one, other in zip(first, second) if one is not None and other is not None]
    return all(torch.equal(_whole(one), _whole(other)) for one, other in pairs)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
