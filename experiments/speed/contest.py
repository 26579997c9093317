"""What a study costs beside the ways it is done today: one command, all contestants interleaved in one run.

    python experiments/speed/contest.py                    # everything; about 15 minutes of one CPU thread
    python experiments/speed/contest.py --quick            # one repeat on the small model only
    python experiments/speed/contest.py --report           # tables and figure again from the numbers that are there

Writes contest.csv, parts.csv, scaling.csv, contest.png and README.md beside this file (--output for elsewhere). Real
weights and data are looked for in --assets ($HARNESS_ASSETS, ../shared).

Contestants, per cell (one ablation on one task), all at one thread in float32:
  harness  this repository: `measure_units`, with everything that it does, rows on disk included
  ideal    a per-cell loop as good as it can be without resuming: the same packing and head, model kept loaded,
           cached decompositions; every block runs for every cell
  naive    a fresh copy of the model, a full float32 SVD, batches of whole sequences, full logits
  hflm     lm-evaluation-harness' HFLM called once per cell on a model that is kept loaded and edited from the cached
           decompositions (which favours it); the faster of two batch sizes

The harness edits once per ablation and measures all tasks then; the others edit for every cell.

The grid is LASER's: every block x {up_proj, down_proj} x 7 ranks. Each repeat is a study of its own with two or three
of the ranks, and pays its own decompositions, baseline and frontier. Between its cells, at a random sample of
ablations, the other three do the same ablation, and their numbers are compared with ours, request by request. Seconds
are CPU seconds of the process (one thread), which a shared machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from harness.engine import run as engine_run
from harness.engine.measurement import Context
from harness.engine.ranks import Ranks
from harness.evaluation import scoring
from harness.evaluation.requests import Request, TaskContext, scored_tasks
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import RuntimeSettings
from harness.measurements import ABLATION
from harness.measurements.ablation import cell_run, forecast, measure, rates
from harness.measurements.ablation.cells import group_by_ablation
from harness.measurements.ablation.region_settings import RegionSettings
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.units import plan
from harness.models import decompositions
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel
from harness.models.settings import ModelSettings
from harness.models.targets import TargetSettings
from harness.spectral.regions import select
from harness.spectral.regions.fraction import FractionRule
from harness.tasks.lm_eval.task import LmEvalTask
from harness.tasks.text import TextTask

RANKS = (0.1, 0.2, 0.4, 0.8, 0.9, 0.95, 0.99)  # of the rank, removed: the seven of conf/region/laser.yaml
SHARES = ((0.1, 0.8, 0.99), (0.2, 0.9), (0.4, 0.95))  # of the repeats
PARTS = ("decomposition", "edit", "forward", "head", "tasks", "I/O", "other")
CONTESTANTS = ("harness", "ideal", "naive", "hflm")
HERE = Path(__file__).parent
# windows of 256 tokens of WikiText-2, questions of ARC-easy, questions with five examples before them
SIZES = {"stories15M": (2, 16, 0), "GPT-2 size, random": (1, 6, 1)}
LIMITS = """## What it does not show

The ratio over all tasks depends on the mixture: {sizes}. Full test sets would give the
five-shot questions more weight (2,376 of them beside some 1,100 windows). On text alone the gain over HFLM is
small: every position needs the head, which resuming cannot spare and which is most of a small model's work. Other
machines, GPUs and low precision are not measured here.
"""


# ---------------------------------------------------------------- clock


class Clock:
    """CPU seconds by (contestant, task, part); a part inside another is charged to itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str, str], float] = defaultdict(float)
        self._running: list[tuple[str, str, str]] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, part: str, task: str | None = None, contestant: str | None = None) -> Iterator[None]:
        """Charge what runs inside; contestant and task are those of the part around it unless named."""
        self._charge()
        around = self._running[-1] if self._running else ("", "", "")
        self._running.append((contestant or around[0], around[1] if task is None else task, part))
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return timed


class Directly:
    """Takes the place of the engine's Writer, and writes in the thread whose parts are timed."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.put = write

    def close(self) -> None:
        pass

    def __enter__(self) -> Directly:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


@contextmanager
def instrumented(clock: Clock, after_ablation: Callable[[Ablation, Scorer], None]) -> Iterator[None]:
    """The runner with its parts timed; `after_ablation` runs with the clock of the harness stopped."""
    start, outcome, ablation, apply = (
        cell_run.CellRun.__init__, cell_run.CellRun.outcome, cell_run.CellRun.ablation, cell_run.ablated
    )

    def start_timed(self, *args):
        start(self, *args)
        self.tasks = {name: dataclasses.replace(task, measure=clock.wrap("tasks", task.measure))
                      for name, task in self.tasks.items()}

    def outcome_timed(self, cell):
        with clock.part("other", cell.task):
            return outcome(self, cell)

    @contextmanager
    def ablated_timed(*args):
        with ExitStack() as stack:
            with clock.part("edit"):
                realised = stack.enter_context(apply(*args))
            yield realised
            with clock.part("edit"):
                stack.close()

    def ablation_timed(self, what, cells):
        # the rows of a cell are written before the next cell is asked for, so inside this part too
        with clock.part("other", contestant="harness"):
            yield from ablation(self, what, cells)
        with clock.part("other", "", "nobody"):
            after_ablation(what, self.scorers.of(next(iter(self.tasks))))

    with ExitStack() as stack:
        for owner, name, replacement in (
            (decompositions, "decompose", clock.wrap("decomposition", decompositions.decompose)),
            (decompositions, "decompose_many", clock.wrap("decomposition", decompositions.decompose_many)),
            (Scorer, "_final_hidden", _method(clock, "forward", Scorer._final_hidden)),
            (Scorer, "advance", _method(clock, "forward", Scorer.advance)),
            (scoring, "read", clock.wrap("head", scoring.read)),
            (cell_run.RowMaker, "measured", _method(clock, "I/O", cell_run.RowMaker.measured)),
            (engine_run, "_write", clock.wrap("I/O", engine_run._write)),
            (engine_run, "Writer", Directly),
            (cell_run, "ablated", ablated_timed),
            (cell_run.CellRun, "__init__", start_timed),
            (cell_run.CellRun, "outcome", outcome_timed),
            (cell_run.CellRun, "ablation", ablation_timed),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _method(clock: Clock, part: str, function: Callable) -> Callable:
    def timed(self, *args, **kwargs):
        with clock.part(part):
            return function(self, *args, **kwargs)

    return timed


# ---------------------------------------------------------------- rivals


def naive_scores(clock: Clock, loaded: LoadedModel, ablation: Ablation, indices: torch.Tensor,
                 requests: list[Request], batch_size: int = 16) -> np.ndarray:
    """Log-probability of each request, the way scripts do it: copy, SVD, whole sequences, full logits."""
    (name,) = ablation.target.matrices
    matrix = next(m for m in loaded.matrices if m.name == name)
    model = copy.deepcopy(loaded.model)
    weight = matrix.read(model)
    with clock.part("decomposition"):
        left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    with clock.part("edit"):
        sigma[indices] = 0
        matrix.write(model, (left * sigma) @ right)
    found = np.empty(len(requests))
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        tokens = torch.zeros(len(members), max(len(requests[i].tokens) for i in members), dtype=torch.int64)
        for row, i in enumerate(members):
            tokens[row, : len(requests[i].tokens)] = torch.from_numpy(requests[i].tokens)
        with torch.inference_mode(), clock.part("forward"):
            # the head is part of this forward
            logprob = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
        for row, i in enumerate(members):
            found[i] = float(logprob[row, requests[i].positions, requests[i].targets].double().sum())
    return found


class Hflm:
    """lm-evaluation-harness on the model as it is at the moment of the call."""

    def __init__(self, loaded: LoadedModel, study: Study, batch_size: dict[str, int] | None) -> None:
        from lm_eval.models.huggingface import HFLM

        self.lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8, device="cpu")
        description = study.description
        context = TaskContext(study.prepared.tokenizer, description.config, description.context_length,
                              description.family.kind)
        self.requests = {name: list(task.requests) for name, task in scored_tasks(study.tasks).items()}
        self.instances = {
            name: _instances(name, task, context)
            for name, task in study.settings.tasks.items() if isinstance(task, LmEvalTask)
        }
        self.batch_size = {
            name: min((8, 32), key=lambda size: self._seconds(name, size)) for name in study.tasks
        } if batch_size is None else batch_size

    def _seconds(self, name: str, size: int) -> float:
        started = time.process_time()
        self._score(name, size)
        return time.process_time() - started

    def scores(self, name: str) -> np.ndarray:
        """Log-probability of each request of a task."""
        return self._score(name, self.batch_size[name])

    def _score(self, name: str, size: int) -> np.ndarray:
        self.lm.batch_size_per_gpu = size
        if name in self.instances:
            answers = self.lm.loglikelihood(self.instances[name], disable_tqdm=True)
        else:
            windows = [(("", ""), request.tokens[:1].tolist(), request.targets.tolist())
                       for request in self.requests[name]]
            answers = self.lm._loglikelihood_tokens(windows, disable_tqdm=True)
        return np.array([answer[0] for answer in answers])


def _instances(name: str, asked: LmEvalTask, context: TaskContext) -> list[Any]:
    """The Instances of a task, as lm-eval itself builds them."""
    from harness.tasks.lm_eval import index
    from harness.tasks.lm_eval import task as lm_eval_task

    found = index.load(name, asked)
    instances = []
    for task_name, task in found.tasks.items():
        lm_eval_task._check(name, task, asked, alone=found.single)
        part = lm_eval_task._part(name, task_name, task, asked, context)
        instances += [instance for doc in part.docs for instance in doc]
    return instances


# ---------------------------------------------------------------- one repeat


def machine_rate(repeats: int = 3) -> float:
    """FLOP/s of a large float32 product, [1024, 768] x [768, 3072], now."""
    left, right = torch.randn(1024, 768), torch.randn(768, 3072)
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        left @ right
        taken.append(time.process_time() - started)
    return 2.0 * 1024 * 768 * 3072 / statistics.median(taken)


def repeat(grid: str, number: int, settings: StudySettings, loaded: LoadedModel | None, n_samples: int,
           batch_sizes: dict[str, dict[str, int]], ideal_everywhere: bool = False,
           ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], LoadedModel]:
    """Rows of contest.csv and parts.csv for one study of the grid with its rivals at a sample of ablations.

    ideal_everywhere: whether the ideal loop does every ablation, and not only the sample. turns.py wants it, which does
    not read these rows: they would count the ideal loop too often.
    """
    study = plan(settings)
    tasks = scored_tasks(study.tasks)
    loaded = loaded or measure.open_session(study, Ranks(), False)
    groups = group_by_ablation([cell for cell in study.units if not cell.is_baseline])
    chosen = {groups[i][0] for i in random.Random(number).sample(range(len(groups)), n_samples)}
    ideal = Scorer(loaded, tasks, dataclasses.replace(settings.runtime.scoring(), reuse=False))
    hflm = Hflm(loaded, study, batch_sizes.get(grid))
    batch_sizes[grid] = hflm.batch_size
    clock, rates = Clock(), [machine_rate()]
    differences: dict[tuple[str, str], float] = defaultdict(float)

    def rivals(ablation: Ablation, scorer: Scorer) -> None:
        here = CONTESTANTS[1:] if ablation in chosen else ("ideal",) if ideal_everywhere else ()
        if not here:
            return
        rates.append(machine_rate())
        cache = decompositions.DecompositionCache(loaded, 2**33)
        (name,) = ablation.target.matrices
        matrix = next(m for m in loaded.matrices if m.name == name)
        sigma = cache(matrix).sigma
        indices = select(ablation.region, sigma, matrix.shape)
        for task in tasks:
            with ablated(loaded, ablation, cache):
                ours = scorer.score(task, ablation.target.first_block).request_logprob()
            for rival in random.Random(task).sample(here, len(here)):
                if rival == "naive":
                    with clock.part("other", task, rival):
                        theirs = naive_scores(clock, loaded, ablation, indices, list(tasks[task].requests))
                else:
                    with ExitStack() as stack:
                        with clock.part("edit", task, rival):
                            stack.enter_context(ablated(loaded, ablation, cache))
                        with clock.part("forward" if rival == "hflm" else "other", task, rival):
                            theirs = hflm.scores(task) if rival == "hflm" else ideal.score(task).request_logprob()
                        with clock.part("edit", task, rival):
                            stack.close()
                worst = float(np.abs((theirs - ours) / theirs).max())
                differences[rival, task] = max(differences[rival, task], worst)

    with instrumented(clock, rivals), clock.part("other", "", "harness"):
        started = time.perf_counter()
        engine_run.measure_units(ABLATION, study, study.units, Context(loaded))
        wall = time.perf_counter() - started
    return _rows(grid, number, study, clock, len(groups), n_samples, rates, differences, wall) + (loaded,)


def _rows(grid, number, study, clock, n_ablations, n_samples, rates, differences, wall):
    """Seconds per ablation of the whole grid; what the harness spends on no single task is shared equally."""
    tasks, costs = list(study.tasks), study.costs
    n_blocks = len(next(iter(costs.passes.values()))) - 1
    ablations = [ablation for ablation, _ in group_by_ablation(
        [cell for cell in study.units if not cell.is_baseline])]
    seconds = defaultdict(float)
    for (contestant, task, part), value in clock.seconds.items():
        if contestant not in CONTESTANTS:
            continue
        per = n_ablations if contestant == "harness" else n_samples
        for name in [task] if task else tasks:
            seconds[contestant, name, part] += value / per / (1 if task else len(tasks))
    contest, parts = [], []
    for task in tasks:
        passes = costs.passes[task]
        resumed = statistics.mean(passes[a.target.first_block] - passes[n_blocks] for a in ablations)
        for contestant in CONTESTANTS:
            of = {part: seconds[contestant, task, part] for part in PARTS}
            flops = resumed if contestant == "harness" else passes[0] - passes[n_blocks]
            contest.append({
                "grid": grid, "repeat": number, "task": task, "contestant": contestant,
                "ablations": n_ablations, "timed": n_ablations if contestant == "harness" else n_samples,
                "seconds_per_cell": sum(of.values()), "relative_difference": differences.get((contestant, task), 0.0),
                "forward_seconds": of["forward"], "head_seconds": of["head"], "forward_flops": flops,
                "n_blocks": n_blocks, "machine_flops": statistics.median(rates), "wall_seconds_of_repeat": wall,
            })
            parts += [{"grid": grid, "repeat": number, "task": task, "contestant": contestant, "part": part,
                       "seconds_per_cell": value} for part, value in of.items()]
    return contest, parts


# ---------------------------------------------------------------- grids


def _tasks(assets: Path, windows: int, questions: int, few_shot: int) -> dict[str, Any]:
    arc = {split: str(assets / f"data/arc_easy/{split}.jsonl") for split in ("validation", "test")}
    tasks: dict[str, Any] = {
        "wikitext": TextTask(data_files=str(assets / "data/wikitext-2-raw/test.jsonl"), window=256, limit=windows),
        "arc_easy": LmEvalTask(task="arc_easy", limit=questions, data_files=arc),
    }
    if few_shot:
        tasks["arc_easy 5-shot"] = LmEvalTask(task="arc_easy", num_fewshot=5, limit=few_shot, data_files=arc)
    return tasks


def _settings(model: str, tasks: dict[str, Any], ranks: tuple[float, ...], output: str) -> StudySettings:
    return StudySettings(
        model=ModelSettings(name=model, device="cpu", dtype="float32"),
        target=TargetSettings(kind="matrix", layer_types=["up_proj", "down_proj"]),
        region=RegionSettings("fraction", FractionRule(kinds=["small"], values=list(ranks)), controls=[]),
        tasks=tasks, runtime=RuntimeSettings(cache_gib=0.0, threads=1), output=output,
    )


def gpt2_sized(folder: Path, assets: Path) -> str:
    """Random weights of GPT-2's size with its tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    AutoTokenizer.from_pretrained(assets / "data/tokenizers/gpt2").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    return str(folder)


def scaling(assets: Path, folder: Path) -> list[dict[str, Any]]:
    """Measured against predicted seconds, over the number of blocks and the number of ranks of each matrix."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(assets / "models/stories15M")
    tasks = {"wikitext": TextTask(data_files=str(assets / "data/wikitext-2-raw/test.jsonl"), window=256, limit=2)}
    rows = []
    for n_blocks, n_ranks in ((3, 2), (6, 2), (12, 2), (6, 1), (6, 4)):
        where = folder / f"llama-{n_blocks}"
        if not where.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6, "vocab_size": 32000}
            LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n_blocks, max_position_embeddings=256)
                             ).save_pretrained(where)
            tokenizer.save_pretrained(where)
        output = str(folder / f"study-{n_blocks}-{n_ranks}")
        study = plan(_settings(str(where), tasks, RANKS[:n_ranks], output))
        loaded = measure.open_session(study, Ranks(), False)
        cost = forecast.forecast(study)
        with mock.patch.object(rates.time, "perf_counter", time.process_time):
            found = rates.measure_rates(torch.device("cpu"), torch.float32, (768, 288))
        started = time.process_time()
        engine_run.measure_units(ABLATION, study, study.units, Context(loaded))
        taken = time.process_time() - started
        rows.append({"n_blocks": n_blocks, "ranks": n_ranks, "cells": len(study.units), "seconds": taken,
                     "predicted_seconds": cost.seconds(found), "predicted_flops": cost.resumed})
        print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------- report


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _spread(values: list[float], digits: int = 2) -> str:
    """median (smallest to largest)"""
    values = sorted(values)
    return f"**{statistics.median(values):.{digits}f}** ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


def _ratios(rows: list[dict[str, Any]], rival: str, keep: Callable[[dict], bool]) -> list[float]:
    """Of each repeat: the rival's seconds over ours, summed over the cells that `keep` names."""
    found = []
    for number in sorted({row["repeat"] for row in rows}):
        sums = {who: sum(row["seconds_per_cell"] * row["ablations"] for row in rows if row["repeat"] == number
                         and row["contestant"] == who and keep(row)) for who in (rival, "harness")}
        if sums["harness"]:
            found.append(sums[rival] / sums["harness"])
    return found


def _reuse(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of each repeat: the factor by which resuming made forward and head cheaper, and what the formula promises with
    the seconds of a block and of the head as the ideal loop measured them."""
    measured, promised = [], []
    for number in sorted({row["repeat"] for row in rows}):
        of = {who: [row for row in rows if row["repeat"] == number and row["contestant"] == who]
              for who in ("harness", "ideal")}
        forward, head = (sum(row[key] for row in of["ideal"]) for key in ("forward_seconds", "head_seconds"))
        ours = sum(row["forward_seconds"] + row["head_seconds"] for row in of["harness"])
        n_blocks = of["ideal"][0]["n_blocks"]
        measured.append((forward + head) / ours)
        promised.append((forward + head) / (forward * (n_blocks + 1) / (2 * n_blocks) + head))
    return measured, promised


def figure(parts: list[dict[str, Any]], path: Path) -> None:
    """Seconds per cell by part, contestants side by side, one panel per grid and task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    both = "forward and head"
    parts = [{**row, "part": both} if row["part"] == "forward" and row["contestant"] in ("naive", "hflm") else row
             for row in parts]
    shown = (*PARTS[:4], both, *PARTS[4:])
    panels = list(dict.fromkeys((row["grid"], row["task"]) for row in parts))
    fig, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.6), squeeze=False)
    colours = dict(zip(shown, ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#77aa55", "#ee6677", "#aa3377",
                               "#bbbbbb")))
    for axis, (grid, task) in zip(axes[0], panels):
        bottom = np.zeros(len(CONTESTANTS))
        for part in shown:
            height = np.array([
                statistics.median([row["seconds_per_cell"] for row in parts if
                                   (row["grid"], row["task"], row["part"], row["contestant"]) ==
                                   (grid, task, part, who)] or [0.0]) for who in CONTESTANTS
            ])
            axis.bar(CONTESTANTS, height, bottom=bottom, color=colours[part], label=part)
            bottom += height
        axis.set_title(f"{grid}\n{task}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("CPU seconds per cell")
    axes[0][-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _hardware() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, 1 thread used"


def _contestants() -> list[str]:
    """What the head of this file says of them, as Markdown."""
    text = "Contestants" + __doc__.split("\nContestants", 1)[1].rstrip()
    lines = []
    for line in text.splitlines():
        name, _, meaning = line.strip().partition("  ")
        lines.append(f"- {name}: {meaning.strip()}" if name in CONTESTANTS else line.rstrip())
        if line.startswith("Contestants"):
            lines.append("")
    return lines


def report(folder: Path) -> None:
    """README.md and contest.png from the tables in `folder`."""
    rows, parts, scales = (_read(folder / name) for name in ("contest.csv", "parts.csv", "scaling.csv"))
    about = (folder / "contest.txt").read_text().strip()
    figure(parts, folder / "contest.png")
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    lines = [
        "# What a study costs, beside the ways it is done today", "",
        "Claim: identical numbers for a small part of the cost (issue: scoring near the limit). Command:", "",
        "    python experiments/speed/contest.py", "",
        "It writes this page (decompositions have a contest of their own: decomposition.py, decomposition-cpu.md).",
        "startup.md has the times of start-up and reports, contest-again.md a later run of this contest, and peers.md"
        " the released code of others.", "",
        f"Hardware: {about}. GPU: not measured.", "",
        *_contestants(), "",
        "## Ratios: seconds of the other over ours", "",
        "Median over repeats (smallest to largest). Each repeat is another sample of ablations.", "",
        "| grid | task | naive / harness | hflm / harness | ideal / harness | largest difference, relative |",
        "|---|---|---|---|---|---|",
    ]
    for grid in [*grids, "all"]:
        of_grid = [row for row in rows if grid in ("all", row["grid"])]
        tasks = list(dict.fromkeys(row["task"] for row in of_grid)) if grid != "all" else []
        for task in [*tasks, "all"]:
            mine = [row for row in of_grid if task in ("all", row["task"])]
            ratios = [_spread(_ratios(mine, rival, lambda row: True)) for rival in ("naive", "hflm", "ideal")]
            worst = max(row["relative_difference"] for row in mine)
            lines.append(f"| {grid} | {task} | {' | '.join(ratios)} | {worst:.1e} |")
    n = {(row["grid"], row["contestant"]): 0.0 for row in rows}
    for row in rows:
        n[row["grid"], row["contestant"]] += row["timed"]
    timed = "; ".join(f"{grid}: all {n[grid, 'harness']:.0f} of the harness, {n[grid, 'naive']:.0f} of each other"
                      for grid in grids)
    lines += ["", f"Cells timed: {timed}. \"all\" weighs tasks by their seconds.", "",
              "## Resuming at the edited block", "",
              "Forward and head only, against the ideal per-cell loop; the formula is (L b + h) / ((L + 1)/2 b + h)"
              " with the b and h that the ideal loop took in the same repeat. Ours includes the moves of the frontier"
              " and the baseline, which the formula leaves out. It leaves out of the last block what no scored"
              " position needs, which the formula does not know.", "",
              "| grid | measured | formula | measured / formula |", "|---|---|---|---|"]
    for grid in grids:
        measured, promised = _reuse([row for row in rows if row["grid"] == grid])
        share = [m / p for m, p in zip(measured, promised)]
        lines.append(f"| {grid} | {_spread(measured)} | {_spread(promised)} | {_spread(share)} |")
    lines += ["", "## Where the time goes", "", "![CPU seconds per cell by part](contest.png)", "",
              "Numbers in parts.csv, where the forward of naive and hflm holds their head and their softmax.", "",
              "## Against the machine", "",
              "Forward part: floating-point operations of the blocks over its seconds, as a share of a large float32"
              " product ([1024, 768] x [768, 3072]) timed between the cells of the same run.", "",
              "| grid | task | GFLOP/s | product GFLOP/s | share |", "|---|---|---|---|---|"]
    for grid in grids:
        for task in dict.fromkeys(row["task"] for row in rows if row["grid"] == grid):
            mine = [row for row in rows if (row["grid"], row["task"], row["contestant"]) == (grid, task, "ideal")]
            achieved = [row["forward_flops"] / row["forward_seconds"] / 1e9 for row in mine]
            machine = [row["machine_flops"] / 1e9 for row in mine]
            share = [a / m for a, m in zip(achieved, machine)]
            lines.append(f"| {grid} | {task} | {_spread(achieved, 0)} | {_spread(machine, 0)} | {_spread(share)} |")
    if scales:
        ratios = [row["seconds"] / row["predicted_seconds"] for row in scales]
        middle = statistics.geometric_mean(ratios)
        lines += ["", "## Scaling", "",
                  "CPU seconds of whole studies (random Llama of width 288, WikiText windows) over what `harness plan`"
                  " predicts from the rate of large products. What matters is the last column: how far each is from the"
                  " mean, as one factor stands for all that a forward does besides.", "",
                  "| blocks | ranks per matrix | cells | seconds | predicted | ratio | off the mean |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {row['n_blocks']:.0f} | {row['ranks']:.0f} | {row['cells']:.0f} | {row['seconds']:.1f} |"
                  f" {row['predicted_seconds']:.1f} | {ratio:.2f} | {ratio / middle - 1:+.0%} |"
                  for row, ratio in zip(scales, ratios)]
    sizes = "; ".join(f"{grid} windows of 256 tokens {windows}, questions {questions}, five-shot questions {few_shot}"
                      for grid, (windows, questions, few_shot) in SIZES.items())
    lines += ["", LIMITS.format(sizes=sizes).strip()]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("HARNESS_ASSETS", HERE.parents[2] / "shared")
    parser.add_argument("--assets", type=Path, default=Path(default))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--quick", action="store_true", help="one repeat on the small model, and no scaling")
    parser.add_argument("--samples", type=int, default=2, help="ablations per repeat that the others do too")
    parser.add_argument("--report", action="store_true", help="only write the page and the figure again")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        compete(arguments)
    report(arguments.output)


def compete(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    import transformers

    about = f"{_hardware()}, torch {torch.__version__}, transformers {transformers.__version__}"
    (arguments.output / "contest.txt").write_text(about + "\n")
    contest: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        assets = arguments.assets.resolve()
        grids = {"stories15M": (str(assets / "models/stories15M"), _tasks(assets, *SIZES["stories15M"]))}
        if not arguments.quick:
            model = gpt2_sized(Path(temporary) / "gpt2", assets)
            grids["GPT-2 size, random"] = (model, _tasks(assets, *SIZES["GPT-2 size, random"]))
        models: dict[str, LoadedModel] = {}
        batch_sizes: dict[str, dict[str, int]] = {}
        for number, ranks in enumerate(SHARES[:1] if arguments.quick else SHARES):
            for grid, (model, tasks) in grids.items():
                output = Path(temporary) / f"study-{len(contest)}"
                settings = _settings(model, tasks, ranks, str(output))
                rows, of_parts, models[grid] = repeat(grid, number, settings, models.get(grid), arguments.samples,
                                                       batch_sizes)
                contest += rows
                parts += of_parts
                # after every repeat: a run that is stopped keeps what it has
                _write(arguments.output / "contest.csv", contest)
                _write(arguments.output / "parts.csv", parts)
                shown = {(row["task"], row["contestant"]): round(row["seconds_per_cell"], 3) for row in rows}
                print(grid, number, shown, flush=True)
            if number == 0 and not arguments.quick:
                _write(arguments.output / "scaling.csv", scaling(assets, Path(temporary)))


if __name__ == "__main__":
    main()
