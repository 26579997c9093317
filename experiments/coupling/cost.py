"""The cost of Jacobians, decompositions and pairs beside the published way, on the same prompts and in one run.

The published way (the released code of arXiv 2407.07810): d vector-Jacobian products through the whole sequence with
parameters that require gradients, in 2 (T // 20) + 5 + prompt number chunks, then a full singular value decomposition,
then one product for every pair. Each of its blocks runs in a process of its own that is ended after a number of
processor seconds.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time

import pandas as pd
import torch

from harness.evaluation.jacobians import CHUNK, block_calls, one_token_maps
from harness.models.loading import LoadedModel
from harness.spectral.coupling import leading_triples, misfits, overlaps

LIMIT = 60  # processor seconds of the published way for one block


def published_jacobian(loaded: LoadedModel, prompt: torch.Tensor, block: int, number: int) -> torch.Tensor:
    """One block's Jacobian at the last token as the released code computes it, but at the true block boundary."""
    call = block_calls(loaded, prompt)[block]
    loaded.model.requires_grad_(True)
    entering = call.entering.clone().requires_grad_(True)
    leaving = call.run(entering)[0, -1]
    d, chunks = len(leaving), 2 * (prompt.shape[1] // 20) + 5 + number

    def product(cotangent: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(leaving, entering, cotangent, retain_graph=True)[0][0, -1]

    found = torch.vmap(product, chunk_size=math.ceil(d / chunks))(torch.eye(d))
    loaded.model.requires_grad_(False)
    return found.detach() - torch.eye(d)


def _in_time(loaded: LoadedModel, prompt: torch.Tensor, block: int, number: int, connection) -> None:
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + LIMIT, math.ceil(used) + LIMIT + 5))
    found = published_jacobian(loaded, prompt, block, number)
    connection.send((time.process_time() - used, found.numpy()))


def published(loaded: LoadedModel, prompt: torch.Tensor, block: int, number: int) -> tuple[float | None, object]:
    """Processor seconds and the Jacobian; None where it did not finish."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_time, args=(loaded, prompt, block, number, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None, None
    finally:
        process.join()


def jacobians(
    loaded: LoadedModel, prompts: dict[int, list[torch.Tensor]], blocks: dict[int, list[int]]
) -> pd.DataFrame:
    """Processor seconds of one Jacobian of both ways, and of all blocks by ours, for prompts by their length."""
    rows = []
    for length, of_length in prompts.items():
        for number, prompt in enumerate(of_length):
            started = time.process_time()
            maps = one_token_maps(loaded, prompt)
            prepared = time.process_time() - started
            seconds, found = [], []
            for row in maps:
                started = time.process_time()
                found.append(row.dense())
                seconds.append(time.process_time() - started)
            for block in blocks[length]:
                theirs, matrix = published(loaded, prompt, block, number)
                ours = seconds[block] + prepared / len(maps)
                difference = None
                if theirs is not None:
                    matrix = torch.from_numpy(matrix)
                    difference = float((found[block] - matrix).norm() / matrix.norm())
                rows.append({
                    "tokens": length, "prompt": number, "block": block, "ours_seconds": ours,
                    "published_seconds": theirs, "limit_seconds": LIMIT, "finished": theirs is not None,
                    "ratio": (theirs or LIMIT) / ours, "relative_difference": difference,
                    "ours_all_blocks_seconds": prepared + sum(seconds), "chunk": CHUNK,
                })  # fmt: skip
                print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def pairs(loaded: LoadedModel, prompts: list[torch.Tensor], ks: tuple[int, ...] = (10, 30, 50)) -> pd.DataFrame:
    """Decompositions and pairs: ours (Gram matrix; stacked products) and the published way, and their difference."""
    rows = []
    for number, prompt in enumerate(prompts):
        matrices = [row.dense() for row in one_token_maps(loaded, prompt)]
        started = time.process_time()
        triples = [leading_triples(one, max(ks))[0] for one in matrices]
        ours_svd = time.process_time() - started
        started = time.process_time()
        full = [torch.linalg.svd(one) for one in matrices]
        their_svd = time.process_time() - started
        started = time.process_time()
        stacked, left = torch.cat([one.v for one in triples], 1), [one.u for one in triples]
        ours = [misfits(overlaps(matrix.double() @ stacked, left), one, ks) for matrix, one in zip(matrices, triples)]
        ours_pairs = time.process_time() - started
        started = time.process_time()
        theirs = {}
        for i, jacobian in enumerate(matrices):
            for j, (u, _, vt) in enumerate(full):
                for k in ks:
                    sigma = torch.diag(full[i][1][:k])
                    inner = (u[:, :k].T @ jacobian @ vt[:k].T).abs() - sigma
                    theirs[i, j, k] = float(inner.norm() / sigma.norm())
        their_pairs = time.process_time() - started
        differences = [abs(float(found.m_abs[j]) - theirs[i, j, found.k])
                       for i, of_i in enumerate(ours) for found in of_i for j in range(len(matrices))]
        rows.append({"prompt": number, "blocks": len(matrices), "ours_triples_seconds": ours_svd,
                     "published_svd_seconds": their_svd, "triples_ratio": their_svd / ours_svd,
                     "ours_pairs_seconds": ours_pairs, "published_pairs_seconds": their_pairs,
                     "pairs_ratio": their_pairs / ours_pairs, "largest_difference": max(differences)})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)
