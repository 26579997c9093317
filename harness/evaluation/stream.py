"""Keep the residual stream at the frontier: on the model's device, then in pinned host memory, within budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kept:
    """What a batch needs to resume before `block`.

    output: the output of the last skipped block: the hidden states [B, T, d], and then whatever else a block of this
    architecture returns, such as the position biases of T5. encoded: the output of the encoder of an encoder-decoder,
    [B, S, d], once the frontier is behind the encoder; else None.
    """

    block: int
    output: tuple[Any, ...] = ()
    encoded: torch.Tensor | None = None


START = Kept(0)


class StreamStore:
    """Keeps the streams of batches, at most `device_bytes` of them on the device and `host_bytes` in host memory.

    A stream that fits into neither is not kept. Its batch then starts from the first block, which costs time and
    changes no number. For a model on the CPU only the first budget is used.
    """

    def __init__(self, device: torch.device, device_bytes: float, host_bytes: float) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._left = {"device": device_bytes, "host": host_bytes if device.type != "cpu" else 0}
        self._kept: dict[Any, tuple[str, Kept]] = {}
        self._came_from: dict[Any, torch.device] = {}  # with device_map the blocks are on several devices
        self._refused: set[Any] = set()

    def get(self, key: Any) -> Kept:
        """Return what is kept for a batch, on the device; START if nothing is kept."""
        place, kept = self._kept.get(key, ("device", START))
        if place == "device":
            return kept
        device = self._came_from[key]
        return _moved(kept, lambda tensor: tensor.to(device, non_blocking=True))

    def on_device(self, key: Any) -> Kept | None:
        """Return what is kept for a batch as `get` does, if that is the same object until it is replaced; else None."""
        place, kept = self._kept.get(key, ("device", START))
        return kept if place == "device" else None

    def put(self, key: Any, kept: Kept) -> None:
        """Keep the stream of a batch instead of the one that was kept for it before."""
        self.drop(key)
        size = _size(kept)
        place = next((place for place, left in self._left.items() if size <= left), None)
        if place is None:
            self._refused.add(key)
            return
        self._left[place] -= size
        self._came_from[key] = next((tensor.device for tensor in _tensors(kept)), self._device)
        self._kept[key] = place, _moved(kept, self._to_host) if place == "host" else kept

    def drop(self, key: Any) -> None:
        """Give up what is kept for a batch, if anything."""
        place, kept = self._kept.pop(key, ("device", START))
        self._left[place] += _size(kept)

    def takes(self, key: Any) -> bool:
        """Return whether the stream of a batch is worth computing: no stream of it was too large so far."""
        return key not in self._refused

    def clear(self) -> None:
        """Give up everything that is kept."""
        for key in list(self._kept):
            self.drop(key)

    def leave_device(self) -> None:
        """Keep nothing on the device from now on. What is there goes to host memory, or is given up."""
        self._left["device"] = -float("inf")
        for key, (place, kept) in list(self._kept.items()):
            if place == "device":
                self.put(key, kept)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._pinned)
        return copy.copy_(tensor, non_blocking=True)


def _tensors(kept: Kept) -> list[torch.Tensor]:
    return [tensor for tensor in (*kept.output, kept.encoded) if isinstance(tensor, torch.Tensor)]


def _size(kept: Kept) -> int:
    return sum(tensor.nbytes for tensor in _tensors(kept))


def _moved(kept: Kept, move: Callable[[torch.Tensor], torch.Tensor]) -> Kept:
    moved = [move(part) if isinstance(part, torch.Tensor) else part for part in (*kept.output, kept.encoded)]
    return Kept(kept.block, tuple(moved[:-1]), moved[-1])
