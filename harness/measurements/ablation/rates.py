"""The rates of a device: floating-point operations per second of products, decompositions and edits.

They are measured on small samples in about a second. Those of a GPU are kept in the user's cache folder by the name of
the device, the version of torch, the dtype and the shape. Those of a CPU are measured each time, because they depend on
what else the machine does.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness.files import replacing, user_cache
from harness.measurements.ablation.costs import edit_flops
from harness.models.loading import TORCH_DTYPES
from harness.models.matrices import Matrix
from harness.spectral.ablation import edit
from harness.spectral.decomposition import decompose, decomposition_flops

LOG = logging.getLogger(__name__)
# Rates are measured on matrices of at most this rank, so that planning takes only about a second.
LARGEST_MEASURED = {"cpu": 512, "cuda": 2048}  # a GPU reaches its rate on large matrices only


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second. product: of large matrix products in the model's dtype."""

    product: float
    decomposition: float
    edit: float

    @property
    def decomposition_weight(self) -> float:
        """How many times as long an operation of a decomposition takes as one of a product."""
        return self.product / self.decomposition


def rates_of(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> Rates:
    """Return the rates of a device, as `measure_rates` does. Those of a CUDA device are measured once and kept."""
    if device.type != "cuda":
        return measure_rates(device, dtype, shape)
    return kept_rates(torch.cuda.get_device_name(device), dtype, shape, lambda: measure_rates(device, dtype, shape))


def rates_for(device: torch.device, dtype: str, matrices: Iterable[Matrix]) -> Rates:
    """Return the rates of a device for the most common shape of some matrices. dtype: its name in the settings."""
    shape = Counter(matrix.shape for matrix in matrices).most_common(1)[0][0]
    return rates_of(device, TORCH_DTYPES[dtype], shape)


def kept_rates(
    name: str, dtype: torch.dtype, shape: tuple[int, int], measure: Callable[[], Rates], folder: Path | None = None
) -> Rates:
    """Return the kept rates of a device; without any, those that `measure` returns, which are then kept.

    name: of the device. folder: of the tables, by default in the user's cache. A table that cannot be read or written
    costs a second and raises nothing.
    """
    path = (folder or user_cache("rates")) / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    key = f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {shape[0]}x{shape[1]}"
    table: dict[str, dict[str, float]] = {}
    try:
        table = dict(json.loads(path.read_text(encoding="utf-8")))
        rates = Rates(**{part: float(rate) for part, rate in table[key].items()})
        if min(asdict(rates).values()) > 0:
            return rates
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    rates = measure()
    try:
        with replacing(path, durable=False) as temporary:
            temporary.write_text(json.dumps({**table, key: asdict(rates)}, indent=1), encoding="utf-8")
    except OSError as error:
        LOG.warning("cannot keep the rates of the device in %s (%s)", path, error)
    return rates


def measure_rates(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> Rates:
    """Measure the present rates of this machine.

    shape: (out, in) of a typical matrix. Decompositions and edits are measured on one that is scaled down to a rank of
    at most LARGEST_MEASURED of the device.
    """
    scale = max(1.0, min(shape) / LARGEST_MEASURED.get(device.type, 512))
    out, width = (max(1, int(side / scale)) for side in shape)
    generator = torch.Generator(device).manual_seed(0)
    activations, weight = (torch.randn(size, device=device, generator=generator).to(dtype)
                           for size in ((1024, shape[1]), shape))
    small = torch.randn((out, width), device=device, generator=generator)
    decomposition, half = decompose(small), torch.arange(min(out, width) // 2)
    return Rates(
        product=2.0 * 1024 * shape[0] * shape[1] / _seconds(lambda: activations @ weight.T, device),
        decomposition=decomposition_flops(out, width) / _seconds(lambda: decompose(small), device),
        edit=edit_flops(out, width, len(half)) / _seconds(lambda: edit(small, decomposition, half), device),
    )


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    taken = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
