"""Ours beside the released code of others: the same work, in turn, in one process, with one thread.

    python experiments/speed/peers.py --laserrmt path/to/laserRMT --laser path/to/laser \\
        --attn-vs-mlp path/to/ATTN_vs_MLP --repeats 3

A contest whose checkout is not named, or whose package is not installed (WeightWatcher), is left out. peers.md says
what work each contest does and what was changed in the code of others so that it runs here. A number is CPU seconds of
the process, which a busy machine disturbs less than the clock on the wall. Writes peers.csv beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import io
import json
import math
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.engine.run import RunOptions, run_plan
from harness.measurements import compose_settings, find
from harness.measurements.spectra.rows import spectrum_of
from harness.models.editing import Ablation
from harness.models.recall_data import load_counts, recall_process
from harness.models.recall_training import initial_model, scored_logits, train
from harness.models.settings import RecallModelSettings
from harness.models.targets import Target
from harness.spectral.decomposition import decompose
from harness.spectral.regions.index import Index
from harness.spectral.singular_values import singular_values
from harness.tables.drawing import reports_with

ASSETS = Path(os.environ.get("HARNESS_ASSETS", Path(__file__).resolve().parents[3] / "shared"))
MODEL = ASSETS / "models" / "stories15M"
TEXT = ASSETS / "data" / "tinystories" / "validation_first_stories.txt"
KNOWN = ASSETS / "data" / "counterfact" / "known_1000.jsonl"
WINDOWS, WINDOW = 16, 128
DRAWN = [3, 9]  # the matrices that WeightWatcher draws, by its own numbers: a square one and one of the MLP
STEPS = 60  # of training
Row = dict[str, Any]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returned. Its output on the terminal is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        started = time.process_time()
        found = work()
        return time.process_time() - started, found


def in_turn(repeat: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds of ours and of theirs, the first of which changes from repeat to repeat; and what theirs returned."""
    if repeat % 2 == 0:
        mine, (other, found) = timed(ours)[0], timed(theirs)
    else:
        (other, found), mine = timed(theirs), timed(ours)[0]
    return mine, other, found


def planned(measurement: str, *words: str) -> tuple[Any, Any]:
    """The measurement and the plan of overrides."""
    found = find(measurement)
    settings = compose_settings(found, ["model=pretrained", f"model.name={MODEL}", *words], None)
    return found, found.units.plan(settings)


def run_into(measurement: Any, plan: Any, folder: Path) -> None:
    """Run a plan in a folder, without a bar and a report: loading, measuring, and rows on disk."""
    run_plan(measurement, dataclasses.replace(plan, folder=folder), RunOptions(False, lambda line: None))


# ---------------------------------------------------------------- WeightWatcher


def weightwatcher(repeats: int, scratch: Path) -> Iterator[Row]:
    """Power laws of the 42 matrices of stories15M, from weights in memory to a table."""
    import logging

    import weightwatcher as ww

    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    import matplotlib

    matplotlib.use("Agg")
    blocks = AutoModelForCausalLM.from_pretrained(MODEL).model.layers
    watcher = ww.WeightWatcher(model=blocks)
    measurement, plan = planned("spectra", "vectors=false", "threads=1")

    def numbers_only() -> list[Row]:
        rows = []
        for block in blocks:
            for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
                weight = linear.weight.detach()
                rows.append(spectrum_of(weight, singular_values([weight])[0])[0])
        return rows

    for repeat in range(-1, repeats):
        folder = scratch / f"spectra{repeat}"
        mine, other, theirs = in_turn(repeat, partial(run_into, measurement, plan, folder),
                                      partial(watcher.analyze, model=blocks, min_evals=0))
        bare, _ = timed(numbers_only)
        with reports_with("none"):  # as with report.figures=none
            told, _ = timed(partial(measurement.report.report, folder))
        shutil.rmtree(folder / "report")
        drawn, drawn_by_them = timed(partial(measurement.report.report, folder))[0], None
        if repeat == 0:  # once, because it takes minutes
            figures = scratch / "figures"
            drawn_by_them, _ = timed(partial(watcher.analyze, model=blocks, min_evals=0, layers=DRAWN, plot=True,
                                             savefig=str(figures)))
            print(f"WeightWatcher: {len(list(figures.iterdir()))} figures of {len(DRAWN)} matrices", file=sys.stderr)
        ours = pd.read_parquet(folder / "matrices").sort_values(["block", "matrix"])
        apart = alphas_apart(ours, theirs)
        if repeat >= 0:  # the first imports and fills caches
            n = len(ours)
            yield {"contest": "WeightWatcher", "what": "a matrix, to rows on disk", "repeat": repeat, "ours": mine / n,
                   "theirs": other / n, "difference": apart}
            yield {"contest": "WeightWatcher", "what": "a matrix, numbers only", "repeat": repeat, "ours": bare / n,
                   "theirs": other / n, "difference": apart}
            yield {"contest": "WeightWatcher", "what": "a matrix, rows and our report, no figures of both",
                   "repeat": repeat, "ours": (mine + told) / n, "theirs": other / n, "difference": apart}
            yield {"contest": "WeightWatcher", "what": "a matrix, rows, our figures, no figure of theirs",
                   "repeat": repeat, "ours": (mine + drawn) / n, "theirs": other / n, "difference": apart}
            if drawn_by_them is not None:
                yield {"contest": "WeightWatcher", "what": "a matrix, rows and figures of both", "repeat": repeat,
                       "ours": (mine + drawn) / n, "theirs": drawn_by_them / len(DRAWN), "difference": apart}


def alphas_apart(ours: pd.DataFrame, theirs: pd.DataFrame) -> float:
    """The largest relative difference of alpha, paired by the largest singular value, which tells matrices apart."""
    mine = ours.set_index(ours["sigma_max"].round(4))["alpha"].sort_index()
    other = theirs.set_index(theirs["sv_max"].round(4))["alpha"].sort_index()
    return float(np.abs(mine.to_numpy() / other.to_numpy() - 1).max())


# ---------------------------------------------------------------- ATTN_vs_MLP


def attn_vs_mlp(repeats: int, scratch: Path, checkout: Path) -> Iterator[Row]:
    """Training steps of the two-layer transformer on in-context recall, of the default size of the embedded model."""
    sys.path.insert(0, str(checkout))
    from ihead_basic_model import ModelArgs, Transformer
    from ihead_data import DataArgs, Dataset

    settings = RecallModelSettings(noise_token="!", optimizer="sgd", learning_rate=0.03, steps=STEPS)
    process, counts = recall_process(settings), load_counts()
    # the file that their code reads, and which its checkout does not hold
    names = counts["vocabulary"]
    (scratch / "data").mkdir(exist_ok=True)
    (scratch / "data" / "meta.pkl").write_bytes(pickle.dumps({
        "itos": dict(enumerate(names)), "stoi": {name: i for i, name in enumerate(names)}, "vocab_size": len(names),
        "unigrams": dict(zip(names, counts["unigram"])),
        "bigrams": {(a, b): n for a, row in zip(names, counts["bigram"]) for b, n in zip(names, row) if n},
    }))
    before = Path.cwd()
    os.chdir(scratch)
    try:
        data = Dataset(DataArgs(k=1, seq_length=settings.context_length), noise_prob=settings.noise,
                       noise_token_id=process.noise_token_id)
    finally:
        os.chdir(before)
    shape = ModelArgs(vocab_size=len(names), dim=settings.dim, max_length=settings.context_length, final_ffn=True,
                      first_ffn=True, linear_final_ffn=False, linear_first_ffn=False)

    def draw() -> list[tuple[torch.Tensor, ...]]:
        rng, found = np.random.default_rng(0), []
        for _ in range(STEPS):
            tokens, outs = data.gen_batch(rng, settings.batch_size)
            found.append(tuple(map(torch.from_numpy, (tokens[:, :-1], tokens[:, 1:], outs[:, :-1]))))
        return found

    def steps(batches: list[tuple[torch.Tensor, ...]]) -> None:  # as in ihead_basic_main.py, without its probes
        model = Transformer(shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=settings.momentum,
                                    weight_decay=settings.weight_decay)
        for x, y, outs in batches:
            pred = model(x)
            loss = torch.nn.functional.cross_entropy(pred[outs >= 2], y[outs >= 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    apart = losses_apart(settings, Transformer(shape), draw()[0])
    for repeat in range(-1, repeats):
        mine, other, batches = in_turn(repeat, partial(train, settings, progress=False), draw)
        trained, _ = timed(partial(steps, batches))
        if repeat >= 0:
            for what, theirs in (("a training step, data included", other + trained),
                                 ("a training step, our data included, theirs not", trained)):
                yield {"contest": "ATTN_vs_MLP", "what": what, "repeat": repeat, "ours": mine / STEPS,
                       "theirs": theirs / STEPS, "difference": apart}


def losses_apart(settings: RecallModelSettings, theirs: Any, batch: tuple[torch.Tensor, ...]) -> float:
    """The relative difference of the losses of one batch, with our initial weights in their model."""
    ours: Any = initial_model(settings)
    with torch.no_grad():
        theirs.tok_embeddings.weight.copy_(ours.embed_tokens.weight)
        theirs.pe.copy_(ours.embed_positions.weight)
        theirs.output.weight.copy_(ours.lm_head.weight)
        for their_block, block in zip(theirs.layers, ours.blocks):
            for name, parameter in (("wk", "k_proj"), ("wv", "v_proj"), ("wo", "o_proj")):
                getattr(their_block.attention, name).weight.copy_(getattr(block.self_attn, parameter).weight)
            their_block.ff.w1.weight.copy_(block.mlp.up_proj.weight)
            their_block.ff.w2.weight.copy_(block.mlp.down_proj.weight)
        tokens, labels, outs = batch
        their_loss = torch.nn.functional.cross_entropy(theirs(tokens)[outs >= 2], labels[outs >= 2])
        our_loss = torch.nn.functional.cross_entropy(scored_logits(ours, tokens, outs >= 2), labels[outs >= 2])
    return abs(float(our_loss / their_loss) - 1)


# ---------------------------------------------------------------- laserRMT


def released_modifier(checkout: Path, model: Any, tokens: torch.Tensor) -> Any:
    """An object of laserRMT's class ModelModifier, whose released code runs on the CPU, in float32, on our windows."""
    source = (checkout / "rmt_laser.py").read_text().split("# Usage")[0]
    for old, new in ((".cuda()", ""), ("import datasets\n", ""), ("from lib.utils import gptq_data_utils\n", "")):
        source = source.replace(old, new)
    reader = types.SimpleNamespace(get_test_tokens=lambda *_, **__: tokens.view(1, -1))
    names: Row = {"gptq_data_utils": reader}
    exec(compile(source, "rmt_laser.py", "exec"), names)
    names["tqdm"] = lambda values: Quiet(values)
    modifier = object.__new__(names["ModelModifier"])
    modifier.model_name, modifier.model = str(MODEL), model
    modifier.original_weights, modifier.modified_layers, modifier.failed_attempts = {}, set(), set()
    return modifier


class Quiet(list):
    """Takes the place of a bar of tqdm."""

    def set_description(self, text: str) -> None:
        """Do nothing."""


def kept_by_laserrmt(modifier: Any, sigma: torch.Tensor, shape: tuple[int, int]) -> int:
    """The number of values that laserRMT's own rule keeps."""
    threshold = modifier.marchenko_pastur_threshold(modifier.estimate_sigma_with_full_iqr(sigma), *shape)
    return int((sigma > threshold).sum())


def laserrmt(repeats: int, scratch: Path, checkout: Path) -> Iterator[Row]:
    """One perplexity of the whole model and 12 of models with one matrix truncated, restored afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = torch.tensor(tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    modifier = released_modifier(checkout, model, tokens[: WINDOWS * WINDOW])
    measurement, plan = planned("ablation", "task=text", f"tasks.text.data_files={TEXT}", f"tasks.text.limit={WINDOWS}",
                                f"tasks.text.window={WINDOW}", "tasks.text.bos=false", "runtime.threads=1",
                                "runtime.cache_gib=0", "target=matrix", "region=none")
    types_ = ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
              "self_attn.o_proj")  # fmt: skip

    def theirs(chosen: list[tuple[str, int]]) -> list[float]:
        found = [modifier.calculate_model_perplexity(["local"], seqlen=WINDOW)]
        for kind, block in chosen:
            modifier.update_model_reduce_layer(kind, f".{block}.")
            found.append(modifier.calculate_model_perplexity(["local"], seqlen=WINDOW))
            modifier.restore_model_original_layer(kind, f".{block}.")
        return found

    for repeat in range(-1, repeats):
        chosen = [(types_[(block + 2 * repeat + i) % 6], block) for block in range(6) for i in (0, 3)]
        kept: dict[tuple[str, int], int] = {}
        for kind, block in chosen:
            weight = model.get_submodule(f"model.layers.{block}.{kind}").weight
            kept[kind, block] = kept_by_laserrmt(modifier, decompose(weight).sigma, tuple(weight.shape))
        pairs = [(ablation_of(kind, block, kept[kind, block]), "text") for kind, block in chosen]
        study = plan.with_cells(pairs)

        folder = scratch / f"laserrmt{repeat}"
        mine, other, found = in_turn(repeat, partial(run_into, measurement, study, folder), partial(theirs, chosen))
        rows = pd.read_parquet(folder / "metrics")
        rows = rows[rows["metric"] == "token_perplexity"].set_index("target")["value"]
        ours = [rows["baseline"], *(rows[f"{block}.{kind.split('.')[-1]}"] for kind, block in chosen)]
        if repeat >= 0:
            yield {"contest": "laserRMT", "what": "a cell, one of 13", "repeat": repeat, "ours": mine / 13,
                   "theirs": other / 13, "difference": max(abs(math.log(a / b)) for a, b in zip(ours, found))}


def ablation_of(kind: str, block: int, kept: int) -> Ablation:
    """The removal of all but the largest values of one matrix."""
    layer_type = kind.split(".")[-1]
    name = f"{block}.{layer_type}"
    return Ablation(Target("matrix", name, (name,), block, block, layer_type), Index(kept, None))


# ---------------------------------------------------------------- LASER


def laser(repeats: int, scratch: Path, checkout: Path) -> Iterator[Row]:
    """12 cells of 40 known facts: the log-probability of the answer with one matrix of the MLP at a low rank."""
    sys.path.insert(0, str(checkout / "src"))
    from laser.LaserWrapper import LaserWrapper
    from study_utils.metric_utils import Metrics

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    facts = [json.loads(line) for line in KNOWN.read_text().splitlines()]
    facts = [one for one in facts if one["attribute"].isalpha()][:40]
    file = scratch / "facts.jsonl"
    file.write_text("".join(json.dumps({"text": f"{one['prompt']} {one['attribute']}"}) + "\n" for one in facts))
    metrics = Metrics(case_sensitive=False, strip=True)
    silent = types.SimpleNamespace(log=lambda text: None)

    def log_probabilities(edited: Any) -> list[float]:
        found = []
        for one in facts:  # as in intervention_llama2_counterfact.py, without the text that it generates
            answer = f" {one['attribute']}"
            tokens = tokenizer(one["prompt"] + answer, return_tensors="pt")
            with torch.no_grad():
                logits = edited(tokens.input_ids).logits[0]
                log_prob = torch.nn.functional.log_softmax(logits, dim=1)
                found.append(metrics.answer_log_prob(log_prob, tokens.input_ids[0], answer, tokenizer).answer_log_prob)
        return found

    def theirs(keep: float) -> list[list[float]]:
        found = [log_probabilities(model)]
        for block in range(6):
            for name in ("fc_up", "fc_out"):
                edited = copy.deepcopy(model)
                found.append(log_probabilities(
                    LaserWrapper.get_edited_model(edited, name, block, 10 - 10 * keep, logger=silent)))
        return found

    for repeat in range(-1, repeats):
        keep = (0.1, 0.2, 0.05)[repeat % 3]
        measurement, study = planned(
            "ablation", "task=lambada", f"tasks.lambada.data_files={file}", "runtime.threads=1", "runtime.cache_gib=0",
            "target=mlp_matrix", "target.layer_types=[up_proj,down_proj]", "region=laser", f"region.keep=[{keep}]",
            "region.controls=[]",
        )  # fmt: skip

        folder = scratch / f"laser{repeat}"
        mine, other, found = in_turn(repeat, partial(run_into, measurement, study, folder), partial(theirs, keep))
        ours = answers_of(folder)
        apart = np.array([np.abs(ours[label] - np.array(values)).mean() for label, values in
                          zip(["baseline", *(f"{block}.{kind}" for block in range(6) for kind in
                                             ("up_proj", "down_proj"))], found)])
        if repeat >= 0:
            yield {"contest": "LASER", "what": f"a cell, one of 13, rank {keep:g}", "repeat": repeat, "ours": mine / 13,
                   "theirs": other / 13, "difference": float(apart[1:].mean())}
            print(f"LASER, unedited: {apart[0]:.2g} nats apart", file=sys.stderr)


def answers_of(folder: Path) -> dict[str, np.ndarray]:
    """Target -> log-probability of the answer of each example, of a study of lambada."""
    rows = pd.read_parquet(folder / "examples")
    rows = rows[rows["metric"] == "perplexity"]
    cells = pd.read_parquet(folder / "metrics").drop_duplicates("cell_id").set_index("cell_id")["target"]
    return {cells[cell]: -of_cell["score"].to_numpy(float) for cell, of_cell in rows.groupby("cell_id", sort=False)}


def table(rows: list[Row]) -> str:
    """Medians over the repeats, and the median of theirs / ours with its range."""
    lines = ["| contest | unit | ours, s | theirs, s | theirs / ours (range) | difference | repeats |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for key in dict.fromkeys((row["contest"], row["what"].split(", rank")[0]) for row in rows):
        of = [row for row in rows if (row["contest"], row["what"].split(", rank")[0]) == key]
        ratios = [row["theirs"] / row["ours"] for row in of]
        ours, theirs = (statistics.median(row[side] for row in of) for side in ("ours", "theirs"))
        lines.append(f"| {key[0]} | {key[1]} | {ours:.3g} | {theirs:.3g} | **{statistics.median(ratios):.2f}**"
                     f" ({min(ratios):.2f} to {max(ratios):.2f}) | {max(row['difference'] for row in of):.2g}"
                     f" | {len(of)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laserrmt", type=Path, help="a checkout of laserRMT")
    parser.add_argument("--laser", type=Path, help="a checkout of LASER")
    parser.add_argument("--attn-vs-mlp", type=Path, help="a checkout of ATTN_vs_MLP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("peers.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, checkout, contest in (("laserRMT", arguments.laserrmt, laserrmt), ("LASER", arguments.laser, laser),
                                        ("ATTN_vs_MLP", arguments.attn_vs_mlp, attn_vs_mlp)):
            if checkout is None:
                print(f"{name} is left out: name a checkout", file=sys.stderr)
                continue
            rows += contest(arguments.repeats, Path(scratch), checkout)
        try:
            rows += weightwatcher(arguments.repeats, Path(scratch))
        except ImportError as error:
            print(f"WeightWatcher is left out: {error}", file=sys.stderr)
    if rows:
        with open(arguments.output, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
