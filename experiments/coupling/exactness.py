"""Exactness: the ways to a Jacobian against each other, and the null against simulation and random initialisation."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import torch

from harness.evaluation.jacobians import one_token_maps, whole_sequence_maps
from harness.measurements.coupling.rows import residual_stream
from harness.models.families import FAMILIES
from harness.models.loading import LoadedModel, describe_model, loaded_from
from harness.models.prefix import takes_cache
from harness.models.settings import ModelSettings
from harness.models.sources import initialised
from harness.spectral.coupling import leading_triples, misfits, overlaps
from harness.spectral.krylov import krylov_triples
from harness.spectral.residual_stream import trajectory
from tests.evaluation.test_jacobians import float64_alone
from tests.models.tiny import TINY, tiny_model

Models = dict[str, tuple[LoadedModel, list[torch.Tensor]]]  # name -> the model and its prompts, int64 [1, T] each


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def families() -> pd.DataFrame:
    """The largest relative differences over the blocks of a tiny model of every causal family, in both precisions."""
    rows = []
    prompt = torch.randint(3, 60, (1, 23), generator=torch.Generator().manual_seed(1))
    for name in TINY:
        if FAMILIES[name].kind != "causal":
            continue
        for dtype in (torch.float32, torch.float64):
            model = tiny_model(name, dtype).requires_grad_(False)
            if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
                model.set_experts_implementation("eager")  # the fused one has no float64
            one = loaded_from(model)
            with float64_alone():
                whole = whole_sequence_maps(one, prompt)
                fast = one_token_maps(one, prompt) if takes_cache(one.model) else whole
                x = torch.randn(5, len(fast[0].row), dtype=dtype, generator=torch.Generator().manual_seed(2))
                dense = [row.dense() for row in whole]
                rows.append({
                    "family": name, "dtype": str(dtype).removeprefix("torch."),
                    "path": "one_token" if takes_cache(one.model) else "whole",
                    "one_token_against_whole": max(relative(row.dense(), j) for row, j in zip(fast, dense)),
                    "forward_products": max(relative(row.forward(x), x @ j.T) for row, j in zip(fast, dense)),
                    "adjoint_products": max(relative(row.adjoint(x), x @ j) for row, j in zip(fast, dense)),
                })  # fmt: skip
    return pd.DataFrame(rows)


def real_models(models: Models, blocks: dict[str, list[int]]) -> pd.DataFrame:
    """One-token path against the whole sequence, on real weights in float32."""
    rows = []
    for name, (loaded, prompts) in models.items():
        for number, prompt in enumerate(prompts[:1]):
            prompt = prompt[:, :26]
            whole, fast = whole_sequence_maps(loaded, prompt), one_token_maps(loaded, prompt)
            for block in blocks[name]:
                rows.append({"model": name, "prompt": number, "block": block, "tokens": prompt.shape[1],
                             "one_token_against_whole": relative(fast[block].dense(), whole[block].dense())})
    return pd.DataFrame(rows)


def krylov(models: Models, blocks: dict[str, list[int]]) -> pd.DataFrame:
    """The matrix-free triples against the dense ones."""
    rows = []
    for name, (loaded, prompts) in models.items():
        for number, prompt in enumerate(prompts[:2]):
            maps = one_token_maps(loaded, prompt)
            for block in blocks[name]:
                row = maps[block]
                matrix = row.dense()
                for k in (10, 30):
                    exact, _ = leading_triples(matrix, k)
                    found = krylov_triples(
                        lambda x, row=row: row.forward(x.T).T.double(), lambda x, row=row: row.adjoint(x.T).T.double(),
                        len(row.row), k, torch.Generator().manual_seed(number),
                    )
                    one = found.triples
                    cosines = [float(torch.linalg.svdvals(a.T @ b).min())
                               for a, b in ((one.u, exact.u), (one.v, exact.v))]
                    rows.append({
                        "model": name, "prompt": number, "block": block, "d": len(row.row), "k": k, "gap": exact.gap,
                        "n_products": found.n_products,
                        "sigma_error": float(((one.sigma - exact.sigma) / exact.sigma).abs().max()),
                        "smallest_cosine": min(cosines), "frobenius_error": one.frobenius / exact.frobenius - 1,
                    })  # fmt: skip
    return pd.DataFrame(rows)


def null_simulation(models: Models, draws: int = 200) -> pd.DataFrame:
    """The analytic null against random frames, for the middle Jacobian of trained weights."""
    rows = []
    for name, (loaded, prompts) in models.items():
        maps = one_token_maps(loaded, prompts[0])
        matrix = maps[len(maps) // 2].dense().double()
        d = len(matrix)
        for k in (5, 10, 30):
            triples, _ = leading_triples(matrix, k)
            generator = torch.Generator().manual_seed(k)
            frames = [[torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q
                       for _ in range(draws)] for _ in range(2)]
            (found,) = misfits(overlaps(matrix @ torch.cat(frames[1], 1), frames[0]), triples, [k])
            for value, simulated, null in (("m", found.m, found.null), ("m_abs", found.m_abs, found.null_abs)):
                rows.append({"model": name, "d": d, "k": k, "value": value, "analytic": null,
                             "simulated": float(simulated.mean()),
                             "stderr": float(simulated.std()) / math.sqrt(draws)})
    return pd.DataFrame(rows)


def random_lines(
    settings: dict[str, ModelSettings], prompts: dict[str, list[torch.Tensor]], seeds: dict[str, int]
) -> pd.DataFrame:
    """The line-shape score of random initialisations, one row for each draw of the weights."""
    rows = []
    for name, one in settings.items():
        description = describe_model(one)
        for seed in range(seeds[name]):
            loaded = initialised(one, description, seed)
            scores = [trajectory(residual_stream(loaded, prompt)[:, -1]) for prompt in prompts[name]]
            rows.append({"model": name, "seed": seed, "lss": sum(one.lss for one in scores) / len(scores),
                         "lss_null": scores[0].lss_null, "prompts": len(scores)})
    return pd.DataFrame(rows)


def write(rows: pd.DataFrame, path: Path) -> None:
    rows.to_csv(path, index=False, float_format="%.6g")
