"""Measure the harness on a GPU, in about ten minutes, on a machine that has torch, transformers, pyarrow and pandas.

    PYTHONPATH=. python experiments/speed/gpu.py                   # writes gpu.jsonl beside this file
    PYTHONPATH=. python experiments/speed/gpu.py --tiny --device cpu   # the same stages in small, to try them out

Nothing is downloaded: weights and tokens are random, and the large model (the sizes of Llama-3-8B) is made on the
device. Every stage writes one line of JSON and flushes it before the next begins, so that what is measured stays when
the machine goes. A stage that takes longer than its limit, or fails, is a line with `error`, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from harness.engine.measurement import Context
from harness.engine.run import measure_units
from harness.evaluation.requests import ExampleScores, Request, ScoredTask, Scores
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings, ScoringOptions
from harness.measurements import ABLATION
from harness.measurements.ablation.preparation import Prepared
from harness.measurements.ablation.region_settings import NO_REGION
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.ablation.units import build
from harness.models.cost import model_cost
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.identity import module_identity, parameters_digest
from harness.models.loading import LoadedModel, loaded_from
from harness.models.memory import is_out_of_memory, release_memory
from harness.models.settings import ModelSettings
from harness.models.targets import Target, TargetSettings, expand_targets
from harness.spectral.ablation import edit
from harness.spectral.decomposition import decompose, decomposition_flops
from harness.spectral.regions import small

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    large: the keys of the large model's config. windows: how many, and of how many tokens. experts: the keys of a
    mixture's config. trees: how many contexts, of how many tokens, with how many continuations, of how many tokens.
    """

    large: dict[str, int]
    windows: tuple[int, int]
    batches: tuple[int, ...]
    small: dict[str, int]
    small_windows: tuple[int, int]
    eigh: tuple[int, ...]
    product: int
    experts: dict[str, int]
    trees: tuple[int, int, int, int]


LLAMA_3_8B = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
# one block of OLMoE with half of its experts
OLMOE = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 1,
         "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 32, "num_experts_per_tok": 8}
FULL = Sizes(LLAMA_3_8B, (141, 2048), (8192, 16384, 32768), {}, (64, 1024), (768, 1024, 2048, 4096, 8192), 8192, OLMOE,
             (64, 512, 8, 32))
TINY = Sizes(
    {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
     "num_key_value_heads": 2, "max_position_embeddings": 64},
    (6, 32), (64, 128), {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 96}, (4, 32),
    (16, 32), 64,
    {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
     "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}, (2, 20, 3, 2),
)


class OverLimit(Exception):
    """A stage took longer than its limit."""


@dataclass
class Bench:
    """The device, the sizes, and what earlier stages leave for later ones."""

    device: torch.device
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    rate: float = 0.0  # floating-point operations per second of a large product in `dtype`
    kept: dict[str, Any] = field(default_factory=dict)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> float:
        """The median of the seconds that `work` takes, with the device waited for."""
        taken = []
        for number in range(warm_up + repeats):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            if number >= warm_up:
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    @property
    def large(self) -> LoadedModel:
        """The large model, made on the device when it is asked for the first time."""
        if "large" not in self.kept:
            with made_on(self.device, self.dtype):
                model = LlamaForCausalLM(LlamaConfig(**self.sizes.large))
            self.kept["large"] = loaded_from(model.eval().requires_grad_(False))
        found: LoadedModel = self.kept["large"]
        return found

    def small(self, dtype: torch.dtype | None = None) -> LoadedModel:
        """A new model of GPT-2's size, in bfloat16 by default."""
        with made_on(self.device, dtype or self.dtype):
            model = GPT2LMHeadModel(GPT2Config(**self.sizes.small))
        return loaded_from(model.eval().requires_grad_(False), identity=module_identity(model))


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def windows(n: int, length: int, vocabulary: int, name: str = "windows") -> ScoredTask:
    """Random tokens, of which every one but the first is scored."""
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(n):
        tokens = rng.integers(3, vocabulary, length)
        requests.append(Request(tokens[:-1], np.arange(length - 1), tokens[1:]))

    def measure(scores: Scores) -> dict[str, ExampleScores]:
        score, weight = -scores.request_logprob(), np.full(n, float(length - 1))
        return {"nll": ExampleScores(score, weight, higher_is_better=False)}

    return ScoredTask(name, {"windows": n, "length": length}, requests, [str(i) for i in range(n)], measure)


def large_task(bench: Bench) -> ScoredTask:
    return windows(*bench.sizes.windows, bench.sizes.large["vocab_size"])


def machine(bench: Bench) -> dict[str, Any]:
    """Versions, the device, and its rates."""
    import transformers

    n = bench.sizes.product
    rates = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        left, right = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / bench.seconds(lambda a=left, b=right: a @ b) / 1e12
    bench.rate = rates[str(bench.dtype).removeprefix("torch.")] * 1e12
    host = torch.empty(n * n, dtype=torch.float32, pin_memory=bench.device.type == "cuda")
    there = torch.empty_like(host, device=bench.device)
    copy = host.nbytes / bench.seconds(lambda: there.copy_(host, non_blocking=True)) / 1e9
    cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if cuda else platform.processor() or "cpu",
        "memory_gib": torch.cuda.get_device_properties(bench.device).total_memory / 2**30 if cuda else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "cuda": torch.version.cuda, "tflops": rates, "from_host_gb_per_second": copy,
    }


def exactness(bench: Bench) -> dict[str, Any]:
    """Float32 scores against those of the CPU; resumed and restored bit for bit."""
    task = windows(*TINY.windows, TINY.large["vocab_size"])
    found: dict[str, Any] = {}
    reference = None
    for device in (torch.device("cpu"), bench.device):
        with made_on(torch.device("cpu"), torch.float32):
            model = LlamaForCausalLM(LlamaConfig(**TINY.large)).eval().requires_grad_(False)
        loaded = loaded_from(model.to(device))
        scorer, before = Scorer(loaded, {"windows": task}, ScoringOptions(64)), parameters_digest(model)
        full = scorer.score("windows").logprob
        resumed = True
        for block in range(len(loaded.blocks)):
            scorer.advance(block)
            resumed &= bool((scorer.score("windows", block).logprob == full).all())
        last = loaded.matrices[-1]
        target = Target("matrix", last.name, (last.name,), last.block)
        with ablated(loaded, Ablation(target, small(0.5)), DecompositionCache(loaded, 2**30)):
            edited = scorer.score("windows", last.block).logprob
        found |= {"resumed_bit_for_bit": resumed, "restored_bit_for_bit": parameters_digest(model) == before,
                  "edit_changes_scores": bool((edited != full).any())}
        if reference is not None:
            found["largest_difference_from_cpu"] = float(np.abs(full - reference[0]).max())
            found["largest_difference_from_cpu_edited"] = float(np.abs(edited - reference[1]).max())
        reference = full, edited
    return found


def large_model(bench: Bench) -> dict[str, Any]:
    """Make the large model on the device."""
    started = time.perf_counter()
    loaded = bench.large
    bench.wait()
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {"seconds": time.perf_counter() - started, "parameters": parameters, "matrices": len(loaded.matrices)}


def passes(bench: Bench) -> dict[str, Any]:
    """One scoring pass from the first, a middle and the last block, for several sizes of batches."""
    loaded, task = bench.large, large_task(bench)
    cost, n = model_cost(loaded.model), len(loaded.blocks)
    (count, length), rows = bench.sizes.windows, []
    tokens = count * (length - 1)
    for batch_tokens in bench.sizes.batches:
        scorer = Scorer(loaded, {"windows": task}, ScoringOptions(batch_tokens, stream_bytes=2**40))
        scorer.rehearse("windows")  # kernels are chosen and loaded
        for block in (0, n // 2, n - 1):
            bench.wait()
            started = time.perf_counter()
            scorer.advance(block)
            bench.wait()
            moved = time.perf_counter() - started
            seconds = bench.seconds(lambda at=block, by=scorer: by.score("windows", at), repeats=1, warm_up=0)
            flops = tokens * (sum(cost.block[block:]) + cost.head) + (n - block) * count * length**2 * cost.pair / 2
            rows.append({"batch_tokens": batch_tokens, "block": block, "seconds": seconds, "advance_seconds": moved,
                         "tflops": flops / seconds / 1e12})
        del scorer
        release_memory()
    whole = min(row["seconds"] for row in rows if row["block"] == 0)
    last = min(row["seconds"] for row in rows if row["block"] == n - 1)
    bench.kept["batch_tokens"] = next(row["batch_tokens"] for row in rows if row["seconds"] == whole)
    return {"passes": rows, "cells_per_hour_of_single_matrices": 3600 / ((whole + last) / 2)}


def head(bench: Bench) -> dict[str, Any]:
    """What the reading of the head takes of a pass."""
    from harness.evaluation import scoring

    loaded, spent = bench.large, [0.0]
    scorer = Scorer(loaded, {"windows": large_task(bench)}, ScoringOptions(bench.kept.get("batch_tokens", 8192)))
    read = scoring.read

    def timed(*arguments: Any) -> Any:
        bench.wait()
        started = time.perf_counter()
        result = read(*arguments)
        bench.wait()
        spent[0] += time.perf_counter() - started
        return result

    scorer.rehearse("windows")
    scoring.read = timed
    try:
        seconds = bench.seconds(lambda: scorer.score("windows"), repeats=1, warm_up=0)
    finally:
        scoring.read = read
    return {"head_seconds": spent[0], "pass_seconds": seconds, "share": spent[0] / seconds}


def profile(bench: Bench) -> dict[str, Any]:
    """The fifteen kernels that take longest in one batch."""
    from torch.profiler import ProfilerActivity

    cuda = bench.device.type == "cuda"
    scorer = Scorer(bench.large, {"windows": large_task(bench)}, ScoringOptions(bench.sizes.batches[0]))
    scorer.rehearse("windows")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as taken:
        scorer._score_batch(("windows", 0), False)
        bench.wait()
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(taken.key_averages(), key=lambda event: -getattr(event, time_of))
    return {"top": [[event.key[:80], getattr(event, time_of) / 1e3, event.count] for event in events[:15]]}


def compiled(bench: Bench) -> dict[str, Any]:
    """Blocks and head compiled, as by runtime.compile: the first batch, and a pass from the middle block."""
    loaded, half = bench.large, len(bench.large.blocks) // 2
    tasks, options = {"windows": large_task(bench)}, ScoringOptions(bench.kept.get("batch_tokens", 8192))
    scorer = Scorer(loaded, tasks, options)
    scorer.advance(half)
    plain = bench.seconds(lambda: scorer.score("windows", half), repeats=1)
    forwards = [block.forward for block in loaded.blocks]
    for block in loaded.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
    try:
        started = time.perf_counter()
        scorer = Scorer(loaded, tasks, replace(options, compile=True))
        scorer.rehearse("windows")
        bench.wait()
        first = time.perf_counter() - started
        scorer.advance(half)
        seconds = bench.seconds(lambda: scorer.score("windows", half), repeats=1)
    finally:
        for block, forward in zip(loaded.blocks, forwards):
            block.forward = forward
    return {"compile_seconds": first, "plain_seconds": plain, "compiled_seconds": seconds}


def decompositions(bench: Bench) -> dict[str, Any]:
    """Eigendecompositions in float64, and one whole matrix; against products in the model's dtype."""
    rows = []
    for size in bench.sizes.eigh:
        matrix = torch.randn(size, 2 * size, device=bench.device, dtype=torch.float64)
        gram = matrix @ matrix.T
        rows.append([size, bench.seconds(lambda one=gram: torch.linalg.eigh(one), repeats=1)])
    shape = bench.sizes.large["hidden_size"], bench.sizes.large["intermediate_size"]
    weight = torch.randn(shape, device=bench.device, dtype=bench.dtype)
    whole = bench.seconds(lambda: decompose(weight), repeats=1)
    weight[3] = 0
    dead = bench.seconds(lambda: decompose(weight), repeats=1)
    share = decomposition_flops(*shape) / whole
    return {"eigh_seconds": rows, "matrix": shape, "seconds": whole, "with_a_dead_row": dead,
            "method_with_a_dead_row": decompose(weight).method, "tflops": share / 1e12,
            "weight_against_products": bench.rate / share if bench.rate else None}


def edits(bench: Bench) -> dict[str, Any]:
    """The edit of one matrix, how often the host waits for it, and the same cell as a branch."""
    loaded = bench.large
    matrix = next(one for one in reversed(loaded.matrices) if one.layer_type == "down_proj")
    cache, weight = DecompositionCache(loaded, 2**34), matrix.read(loaded.model)
    found: dict[str, Any] = {"decomposition_seconds": bench.seconds(lambda: cache(matrix), repeats=1, warm_up=0)}
    for share in (0.1, 0.5):
        indices = small(share).positions(None, matrix.shape)
        found[f"edit_{share}"] = bench.seconds(lambda at=indices: edit(weight, cache(matrix), at))
    scorer = Scorer(loaded, {"windows": large_task(bench)}, ScoringOptions(bench.kept.get("batch_tokens", 8192)))
    scorer.advance(matrix.block)
    found["unedited_pass"] = bench.seconds(lambda: scorer.score("windows", matrix.block), repeats=1)
    target = Target("matrix", matrix.name, (matrix.name,), matrix.block)
    for mode in ("weight", "branch"):
        with ablated(loaded, Ablation(target, small(0.1)), cache, mode):
            found[f"{mode}_pass"] = bench.seconds(lambda: scorer.score("windows", matrix.block), repeats=1)
    if bench.device.type == "cuda":
        found["waits"] = waits(lambda: scorer.score("windows", matrix.block))
    return found


def waits(work: Callable[[], Any]) -> int:
    """How often the host waits for the device, as torch counts it."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def study_of(bench: Bench, loaded: LoadedModel, folder: Path, batch_tokens: int) -> Any:
    """A study of a small model: two regions of up_proj and down_proj."""
    settings = StudySettings(
        model=ModelSettings(name="memory/small"), target=TargetSettings("matrix", ["up_proj", "down_proj"]),
        runtime=RuntimeSettings(batch_tokens=batch_tokens, cache_gib=0.0), output=str(folder),
    )
    vocabulary = loaded.model.config.vocab_size
    prepared = Prepared(loaded.description, loaded.matrices, None,
                        {"windows": windows(*bench.sizes.small_windows, vocabulary)})
    targets = expand_targets(settings.target, loaded.matrices)
    return build(settings, prepared, targets, [small(0.1), small(0.5), NO_REGION])


def cells(bench: Bench) -> dict[str, Any]:
    """A study of GPT-2's size with rows on disk, and the share of its time that is scoring."""
    loaded, spent, score = bench.small(), [0.0], Scorer.score

    def timed(self: Scorer, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return score(self, *arguments)
        finally:
            spent[0] += time.perf_counter() - started

    rows = []
    for batch_tokens in (8192, 32768, 65536):
        with tempfile.TemporaryDirectory() as folder:
            study = study_of(bench, loaded, Path(folder), batch_tokens)
            spent[0], Scorer.score = 0.0, timed  # type: ignore[method-assign]
            started = time.perf_counter()
            try:
                measure_units(ABLATION, study, study.units, Context(loaded))
            finally:
                Scorer.score = score  # type: ignore[method-assign]
            taken = time.perf_counter() - started
            states = read_metrics(Path(folder))["status"].value_counts().to_dict()
        rows.append({"batch_tokens": batch_tokens, "cells": len(study.units), "seconds": taken,
                     "cells_per_second": len(study.units) / taken, "scoring_share": spent[0] / taken, "states": states})
    return {"studies": rows}


def rates(bench: Bench) -> dict[str, Any]:
    """The rates that `harness plan` uses, measured and then read again, and what they say of the costs of shards."""
    from harness.measurements.ablation.costs import DECOMPOSITION_WEIGHT, DECOMPOSITION_WEIGHT_IN_LOW_PRECISION
    from harness.measurements.ablation.rates import rates_of

    shape = bench.sizes.large["hidden_size"], bench.sizes.large["intermediate_size"]
    low = bench.dtype != torch.float32
    found: dict[str, Any] = {"assumed_weight": DECOMPOSITION_WEIGHT_IN_LOW_PRECISION if low else DECOMPOSITION_WEIGHT}
    for name in ("measured", "kept"):
        started = time.perf_counter()
        of = rates_of(bench.device, bench.dtype, shape)
        found[name] = {"seconds": time.perf_counter() - started, "decomposition_weight": of.decomposition_weight,
                       "tflops": [of.product / 1e12, of.decomposition / 1e12, of.edit / 1e12]}
    return found


def experts(bench: Bench) -> dict[str, Any]:
    """The edit of all experts of a block, each by itself and all of a parameter together: seconds, waits, bits."""
    from harness.models import editing

    with made_on(bench.device, bench.dtype):
        model = OlmoeForCausalLM(OlmoeConfig(**bench.sizes.experts))
    loaded = loaded_from(model.eval().requires_grad_(False))
    target = expand_targets(TargetSettings("block", ["gate_proj", "up_proj", "down_proj"]), loaded.matrices)[0]
    chosen = [matrix for matrix in loaded.matrices if matrix.name in target.matrices]
    cache, ablation = DecompositionCache(loaded, 2**36), Ablation(target, small(0.1))
    started = time.perf_counter()
    for matrix in chosen:
        cache(matrix)
    bench.wait()
    found: dict[str, Any] = {"experts": len(chosen), "decompositions_seconds": time.perf_counter() - started}
    edited, usual = [], editing.EXPERT_BYTES

    def edit_all() -> None:
        with ablated(loaded, ablation, cache):
            pass

    for name, most in (("together", usual), ("alone", 0)):
        editing.EXPERT_BYTES = most
        try:
            found[name] = bench.seconds(edit_all)
            if bench.device.type == "cuda":
                found[f"{name}_waits"] = waits(edit_all)
            with ablated(loaded, ablation, cache):
                edited.append([matrix.read(model) for matrix in chosen])
        finally:
            editing.EXPERT_BYTES = usual
    different = [int((one != other).sum()) for one, other in zip(*edited)]
    return {**found, "different_elements": sum(different), "elements": sum(one.numel() for one in edited[0])}


def graph(bench: Bench) -> dict[str, Any]:
    """Passes of the small model as CUDA graphs, against kernels that are launched one by one, for sizes of batches."""
    loaded, rows = bench.small(), []
    n, length = bench.sizes.small_windows
    task = windows(n, length, loaded.model.config.vocab_size)
    target = Target("matrix", loaded.matrices[-1].name, (loaded.matrices[-1].name,), loaded.matrices[-1].block)
    cache = DecompositionCache(loaded, 2**34)
    for batch_tokens in (length, 4 * length, 16 * length):
        row: dict[str, Any] = {"batch_tokens": batch_tokens}
        scores = []
        for wanted in (False, True):
            scorer = Scorer(loaded, {"windows": task}, ScoringOptions(batch_tokens, cuda_graphs=wanted))
            name = "graph" if wanted else "plain"
            row[f"{name}_seconds"] = bench.seconds(lambda by=scorer: by.score("windows"), warm_up=4)
            with ablated(loaded, Ablation(target, small(0.5)), cache):  # an edit in place keeps the address
                scores.append(scorer.score("windows").logprob)
            kept = scorer._graphs._passes.values() if scorer._graphs is not None else ()
            row["captured"] = sum(one.graph is not None for one in kept)
            row["batches"] = len(scorer.packed["windows"].batches)
        auto = Scorer(loaded, {"windows": task}, ScoringOptions(batch_tokens, cuda_graphs="auto"))._graphs
        row["auto"] = auto is not None and batch_tokens <= auto._most_tokens
        row["same_bits"] = bool((scores[0] == scores[1]).all())
        rows.append(row)
    return {"passes": rows}


def host_stream(bench: Bench) -> dict[str, Any]:
    """The stream in pinned host memory: seconds of a pass from the middle, and the same bits."""
    loaded = bench.small()
    task, half = windows(*bench.sizes.small_windows, loaded.model.config.vocab_size), len(loaded.blocks) // 2
    found, scores = {}, []
    for place, budget in (("device", {}), ("host", {"stream_bytes": 0, "host_bytes": 2**34})):
        scorer = Scorer(loaded, {"windows": task}, replace(ScoringOptions(16384), **budget))
        scorer.advance(half)
        found[place] = bench.seconds(lambda by=scorer: by.score("windows", half))
        scores.append(scorer.score("windows", half).logprob)
    return {**found, "same_bits": bool((scores[0] == scores[1]).all())}


def attention(bench: Bench) -> dict[str, Any]:
    """Attention of plain rows, of trees with a mask, and of trees by FlexAttention with a block mask."""
    import torch.nn.functional as F

    heads, head_dim = bench.sizes.large["num_attention_heads"], 128 if bench.sizes is FULL else 16
    length = bench.sizes.windows[1]
    shape = (4, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(3))
    last = torch.full((4, length), length, device=bench.device)
    index = torch.arange(length, device=bench.device)
    mask = (index[:, None] >= index) & (index[None, :, None] < last[:, None, :])
    additive = torch.zeros(mask.shape, device=bench.device, dtype=bench.dtype).masked_fill_(~mask, -1e9)[:, None]
    found: dict[str, Any] = {
        "plain": bench.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "masked": bench.seconds(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=additive)),
    }
    if bench.device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (j <= i) & (i < last[b, j])

        blocks = create_block_mask(visible, 4, None, length, length, device=str(bench.device))
        flex = torch.compile(flex_attention)
        found["flex"] = bench.seconds(lambda: flex(q, k, v, block_mask=blocks))
    return found


def contexts(n: int, length: int, choices: int, tokens: int, vocabulary: int) -> ScoredTask:
    """Random contexts with several continuations each, whose last tokens are scored: packed trees."""
    rng, requests = np.random.default_rng(0), []
    for _ in range(n):
        context = rng.integers(3, vocabulary, length)
        for _ in range(choices):
            whole = np.concatenate([context, rng.integers(3, vocabulary, tokens)])
            requests.append(Request(whole[:-1], np.arange(length - 1, len(whole) - 1), whole[length:]))

    def measure(scores: Scores) -> dict[str, ExampleScores]:
        score = -scores.request_logprob()
        return {"nll": ExampleScores(score, np.full(len(score), float(tokens)), higher_is_better=False)}

    return ScoredTask("trees", {"contexts": n}, requests, [str(i) for i in range(len(requests))], measure)


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """Do not compile FlexAttention on a CPU, where that takes a minute and is not what is measured."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as of_transformers

    before = of_transformers.compile_friendly_flex_attention
    if device.type == "cpu":
        of_transformers.compile_friendly_flex_attention = (
            lambda query, key, value, training=False, **options: flex_attention(query, key, value, **options)
        )
    try:
        yield
    finally:
        of_transformers.compile_friendly_flex_attention = before


def trees(bench: Bench) -> dict[str, Any]:
    """Passes over packed trees of the small model, attended by a mask and by FlexAttention."""
    loaded, scores = bench.small(), []
    task, found = contexts(*bench.sizes.trees, loaded.model.config.vocab_size), {}
    longest = 1 + bench.sizes.trees[1] + bench.sizes.trees[2] * bench.sizes.trees[3]
    for how in ("mask", "flex"):
        with uncompiled(bench.device) if how == "flex" else nullcontext():
            scorer = Scorer(loaded, {"trees": task}, ScoringOptions(16 * longest, tree_attention=how))
            started = time.perf_counter()
            scores.append(scorer.score("trees").logprob)
            found[f"{how}_first"] = time.perf_counter() - started
            found[how] = bench.seconds(lambda by=scorer: by.score("trees"), repeats=3)
    batches = scorer.packed["trees"].batches
    return {**found, "batches": len(batches), "of_trees": sum(batch.last is not None for batch in batches),
            "tokens": scorer.packed["trees"].n_tokens,
            "largest_difference": float(np.abs(scores[0] - scores[1]).max())}


def out_of_memory(bench: Bench) -> dict[str, Any]:
    """Studies while almost all memory is taken: every cell must be there, some in smaller batches."""
    bench.kept.clear()
    release_memory()
    loaded, cuda = bench.small(), bench.device.type == "cuda"
    free = torch.cuda.mem_get_info(bench.device)[0] if cuda else 0
    hold = torch.empty(max(0, free - 5 * 2**29), dtype=torch.uint8, device=bench.device)
    recognised = None
    if cuda:
        try:
            torch.empty(free, dtype=torch.uint8, device=bench.device)
        except Exception as error:
            recognised = is_out_of_memory(error)
    with tempfile.TemporaryDirectory() as folder:
        study = study_of(bench, loaded, Path(folder), 65536)
        measure_units(ABLATION, study, study.units, Context(loaded))
        table = read_metrics(Path(folder))
    del hold
    used = table["settings"].map(lambda text: json.loads(text).get("batch_tokens"))
    errors = table["error"].dropna().str.slice(-300).unique().tolist()
    return {"recognised": recognised, "states": table["status"].value_counts().to_dict(), "errors": errors[:3],
            "batch_tokens": {str(key): int(count) for key, count in used.value_counts().items()}}


# name -> the stage and its limit in seconds; those without the large model first, the risky ones last
STAGES: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "machine": (machine, 40), "exactness": (exactness, 40), "large_model": (large_model, 60), "passes": (passes, 120),
    "head": (head, 30), "profile": (profile, 30), "rates": (rates, 20), "decompositions": (decompositions, 50),
    "edits": (edits, 50), "cells": (cells, 80), "experts": (experts, 50), "host_stream": (host_stream, 30),
    "attention": (attention, 40), "graph": (graph, 40), "trees": (trees, 80), "compiled": (compiled, 90),
    "out_of_memory": (out_of_memory, 50),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OverLimit(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, names: list[str], output: Path, scale: float = 1.0) -> None:
    """Run stages and append a line for each to `output`."""
    with output.open("a") as file:
        for name in names:
            stage, limit = STAGES[name]
            started, line = time.perf_counter(), {"stage": name}
            try:
                with limited(limit * scale):
                    line |= stage(bench)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            line["stage_seconds"] = round(time.perf_counter() - started, 3)
            if bench.device.type == "cuda":
                line["peak_gib"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
                torch.cuda.reset_peak_memory_stats(bench.device)
            release_memory()
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(json.dumps(line), flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the stages out")
    parser.add_argument("--output", type=Path, default=HERE / "gpu.jsonl")
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="by default all")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no CUDA device; --tiny --device cpu tries the stages out")
    bench = Bench(device, TINY if args.tiny else FULL, torch.bfloat16 if device.type == "cuda" else torch.float32)
    run(bench, args.stages or list(STAGES), args.output)


if __name__ == "__main__":
    main()
