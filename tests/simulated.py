"""CUDA devices that do not exist: tensors say that they are on one, and the CPU computes their values.

An operation on tensors of two devices fails as it does on real ones. Every step for which the host would wait for a
device is counted: reading a value, and copying to host memory or from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from harness.evaluation.requests import Request
from harness.models.loading import LoadedModel

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
# operations whose result the host must know before it can go on
_READING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2", "masked_select",
            "unique_consecutive", "item"}
_ANYWHERE = {"copy_", "_to_copy"}


class SimulatedTensor(Tensor):
    """A tensor that says it is on `device`. values: a tensor on the CPU.

    To torch's own code it is on a device of the type lazy, because a build for the CPU has no guard for CUDA devices.
    """

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> SimulatedTensor:
        with torch.inference_mode(False):
            made = Tensor._make_wrapper_subclass(
                cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
                dtype=values.dtype, device=torch.device("lazy", device.index or 0),
            )
        made.values = values
        return made

    device = property(lambda self: torch.device("cuda", super(SimulatedTensor, self).device.index))  # type: ignore
    is_cuda = property(lambda self: True)  # type: ignore

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function}: a simulated tensor is used outside of `simulated`")


class Simulation(TorchDispatchMode):
    """waits: the operations for which the host waited, in order. operations: the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.operations: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function._can_decompose():  # in inference mode torch has not taken it apart before
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = function.overloadpacket.__name__
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        there = {value.device for value in tensors if isinstance(value, SimulatedTensor)}
        asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if asked is not None and asked.type in ("lazy", "cuda"):
            asked = torch.device("cuda", asked.index or 0)
        self.operations.append("mm.dtype" if function is torch.ops.aten.mm.dtype else name)
        if there and name in _READING:
            self.waits.append(name)
        if name in _ANYWHERE:
            self._count_copy(name, args, kwargs, asked)
        elif there:
            everywhere = {value.device for value in tensors if value.ndim or isinstance(value, SimulatedTensor)}
            indexing = name.startswith("index") or name == "_unsafe_index"  # indices may be on the CPU, and are copied
            if indexing and CPU in everywhere:
                self.waits.append(f"{name} by indices on the CPU")
                everywhere -= {CPU}
            if len(everywhere) > 1:
                raise RuntimeError(f"{name}: tensors are on {sorted(map(str, everywhere))}")
        device = asked or next(iter(there), CPU)
        if name == "copy_":
            device = args[0].device
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        bare = tree_map(lambda value: value.values if isinstance(value, SimulatedTensor) else value, (args, kwargs))
        if function is torch.ops.aten.mm.dtype:  # there is none for the CPU
            left, right, dtype = (*bare[0], *bare[1].values())
            result = left.to(dtype) @ right.to(dtype)
        else:
            result = function(*bare[0], **bare[1])
        written = function._schema.returns and function._schema.returns[0].alias_info
        if written and written.is_write:
            return kwargs.get("out", args[0])
        if device.type == "cpu":
            return result
        return tree_map(lambda value: SimulatedTensor(value, device) if isinstance(value, Tensor) else value, result)

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any], asked: torch.device | None) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else asked or source.device
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if blocking and source.device != target and CPU in (source.device, target):
            self.waits.append(f"{name} from {source.device} to {target}")


@contextmanager
def simulated() -> Iterator[Simulation]:
    """Let tensors be on devices that do not exist for the time of the context."""
    initialise = torch.cuda._lazy_init
    torch.cuda._lazy_init = lambda: None  # torch asks for the driver before it looks at the tensor
    try:
        with Simulation() as simulation:
            yield simulation
    finally:
        torch.cuda._lazy_init = initialise


def moved(model: nn.Module, second: set[nn.Module] | None = None) -> None:
    """Move a module to the first simulated device, and its modules in `second` to the second one, for good."""
    for module in model.modules():
        device = SECOND if second and module in second else FIRST
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(SimulatedTensor(parameter.data, device), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = SimulatedTensor(buffer, device)


def on_two_devices(loaded: LoadedModel) -> None:
    """Divide a model over two devices as device_map does: its last block, last norm and head are on the second."""
    model, head, last = loaded.model, loaded.model.get_output_embeddings(), loaded.blocks[-1]
    names = [name for name, module in model.named_modules() if module is last]
    stack = model.get_submodule(names[0].split(".layer")[0].split(".h.")[0].split(".block")[0])
    blocks = {part for block in loaded.blocks for part in block.modules()}
    norms = {module for name, module in stack.named_children() if "norm" in name or name == "ln_f"} - blocks
    second = {*last.modules(), *norms, *([] if head is None else [head])}
    moved(model, second)
    for module in list(model.modules()):
        device = SECOND if module in second else FIRST
        add_hook_to_module(module, AlignDevicesHook(device, io_same_device=module is model))
    loaded.device = FIRST


def tree_requests() -> list[Request]:
    """Return four continuations of one long context, which share a row."""
    rng = np.random.default_rng(0)
    context = rng.integers(3, 60, 40)
    return [Request(np.concatenate([context, rng.integers(3, 60, 3)]), np.array([40, 42]), rng.integers(0, 67, 2))
            for _ in range(4)]
