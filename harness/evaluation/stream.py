"""Where the stream of the evaluation set is kept: on the model's device, then in pinned host memory, within budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Kept:
    """What a batch needs to resume before `block`: the output of the last skipped block, hidden states [B, T, d] first
    and then whatever else a block of this architecture returns (T5: position biases); and what a decoder reads of its
    encoder, [B, S, d], once the frontier has left the encoder."""

    block: int
    output: tuple[Any, ...] = ()
    encoded: torch.Tensor | None = None


START = Kept(0)


class StreamStore:
    """Kept streams by batch, of at most `device_bytes` on the device and `host_bytes` beside it.

    What fits into neither is not kept: its batch starts from the first block, which costs time and changes no number.
    A model on the CPU has the first budget only.
    """

    def __init__(self, device: torch.device, device_bytes: float, host_bytes: float) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._left = {"device": device_bytes, "host": host_bytes if device.type != "cpu" else 0}
        self._kept: dict[Any, tuple[str, Kept]] = {}
        self._refused: set[Any] = set()

    def get(self, key: Any) -> Kept:
        """What is kept for a batch, on the device; START where nothing is."""
        place, kept = self._kept.get(key, ("device", START))
        return _moved(kept, lambda tensor: tensor.to(self._device, non_blocking=True)) if place == "host" else kept

    def put(self, key: Any, kept: Kept) -> None:
        """Keep the stream of a batch in the place of the one before."""
        self.drop(key)
        size = _size(kept)
        place = next((place for place, left in self._left.items() if size <= left), None)
        if place is None:
            self._refused.add(key)
            return
        self._left[place] -= size
        self._kept[key] = place, _moved(kept, self._to_host) if place == "host" else kept

    def drop(self, key: Any) -> None:
        place, kept = self._kept.pop(key, ("device", START))
        self._left[place] += _size(kept)

    def takes(self, key: Any) -> bool:
        """Whether a stream of this batch is worth computing: none of its streams was ever refused."""
        return key not in self._refused

    def clear(self) -> None:
        """Keep nothing."""
        for key in list(self._kept):
            self.drop(key)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._pinned)
        return copy.copy_(tensor, non_blocking=True)


def _tensors(kept: Kept) -> list[torch.Tensor]:
    return [tensor for tensor in (*kept.output, kept.encoded) if isinstance(tensor, torch.Tensor)]


def _size(kept: Kept) -> int:
    return sum(tensor.nbytes for tensor in _tensors(kept))


def _moved(kept: Kept, move) -> Kept:
    moved = [move(part) if isinstance(part, torch.Tensor) else part for part in (*kept.output, kept.encoded)]
    return Kept(kept.block, tuple(moved[:-1]), moved[-1])
