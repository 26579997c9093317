"""Make the columns of the tables `components` and `predictions` for one matrix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.evaluation.gradients import SingularGradients
from harness.evaluation.requests import ScoredTask
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.sources import MatrixSource
from harness.models.unembedding import extreme_tokens, stream_directions
from harness.spectral import components
from harness.spectral.activations import InputCovariance
from harness.spectral.decomposition import Decomposition


@dataclass(frozen=True)
class Described:
    """One matrix of a loaded model.

    operand: what its components make up, [out, in]: its weight, or the change of it. decomposition: the spectrum of
    that in the metric of the run. inputs, leading: the statistics of its inputs and their leading directions; None
    without a calibration text. neurons: float64 [out], the root mean squares of the activations of the neurons into
    which it writes; None if it writes into none, or without a text.
    """

    loaded: LoadedModel
    matrix: Matrix
    operand: Tensor
    decomposition: Decomposition
    inputs: InputCovariance | None
    leading: Tensor | None
    neurons: Tensor | None


@dataclass(frozen=True)
class Named:
    """Of which components the promoted and suppressed tokens are named. n: how many of either.

    largest: None for all components; else int64 [k], the positions of those.
    """

    n: int
    largest: Tensor | None = None


def component_columns(
    about: Described, tokens: Named, others: Mapping[str, MatrixSource], rounded: bool
) -> dict[str, Any]:
    """Return the columns of `components` that need no derivative.

    others: name -> the weights in which each component is
    looked for again. rounded: whether it is looked for in the weight rounded to 4 bits, too.
    """
    weight = about.operand
    sigma = about.decomposition.sigma
    of = components.directions(weight, about.decomposition)
    square = (sigma**2).cpu()
    columns: dict[str, Any] = {
        "index": list(range(len(sigma))), "sigma": sigma.cpu().numpy(),
        "energy": (square / square.sum() if square.sum() else square).numpy(), **components.concentration(of),
    }  # fmt: skip
    signs = torch.ones_like(sigma)
    if about.inputs is not None and about.leading is not None:
        found, signs = components.outputs(of, about.inputs, about.leading)
        columns |= found
    for name, source in others.items():
        other = source.read(about.matrix).to(weight.device)
        columns[f"stability_{name}"] = components.stability(of, other).cpu().numpy()
    if rounded:
        coarse = components.rounded_to_4_bits(weight)
        columns["stability_rounded"] = components.stability(of, coarse).cpu().numpy()
    if tokens.n:
        chosen = torch.arange(len(sigma)) if tokens.largest is None else tokens.largest
        output = (of.output * signs[:, None])[chosen.to(sigma.device)]
        stream = stream_directions(about.loaded, about.matrix, output, about.neurons)
        if stream is not None:
            for name, ids in zip(("promoted", "suppressed"), extreme_tokens(about.loaded, stream, tokens.n)):
                words: list[str | None] = [None] * len(sigma)
                for i, row in zip(chosen.tolist(), ids):
                    words[i] = _words(about.loaded.tokenizer, row)
                columns[name] = words
    return columns


def prediction_columns(
    task: ScoredTask, found: SingularGradients, matrix: str, better: float
) -> list[dict[str, Any]]:
    """Return the rows of `predictions` of one metric and matrix. better: 1 if a larger metric is better, else -1."""
    common = {"task": task.name, "metric": found.metric, "value": found.value, "n_examples": len(task.example_ids)}
    return [{**common, "index": i, "predicted_delta": -product, "predicted_improvement": -better * product}
            for i, product in enumerate(found.products[matrix].tolist())]


def _words(tokenizer: Any, ids: list[int]) -> str:
    """Return tokens as JSON: their texts, or their numbers for a model without a tokenizer that decodes."""
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return json.dumps(ids)
    return json.dumps([tokenizer.decode([one]) for one in ids], ensure_ascii=False)
