"""Examples and seconds that adaptive precision needs against exact, and whether its intervals hold.

    python experiments/speed/adaptive.py --exact results/exact --adaptive results/adaptive -- \\
        model=pretrained model.name=../shared/models/stories260K task=wikitext \\
        tasks.wikitext.data_files=../shared/data/wikitext-2-raw/test.jsonl region=fraction region.values=[0.1] \\
        target.layer_types=[q_proj,down_proj] target.blocks=[0,2,4] region.controls=[]

Behind `--`: the overrides of the study, as for `harness run`; both runs go on where they were stopped, and without
overrides the folders are read as they are (--adaptive may then be left out). Writes adaptive-<name>.csv and .md beside
this file (--output for elsewhere).

Run: each cell in both modes, examples and seconds of scoring. Replay: the exact run's table of examples through the
same rule, in many random orders and at several precisions; "held" counts the orders whose interval holds the exact
delta.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine.manifest import read_manifest
from harness.engine.run import RunOptions, run
from harness.evaluation.adaptive import measure_sampled
from harness.evaluation.draws import draw
from harness.evaluation.requests import ExampleScores, Request, ScoredTask, Scores
from harness.evaluation.settings import AdaptiveSettings
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.tables import read_examples, read_metrics

PRECISIONS = {
    "20 % or 1 %": AdaptiveSettings(relative=0.2, of_baseline=0.01),
    "10 % or 0.5 %": AdaptiveSettings(),
    "5 % or 0.2 %": AdaptiveSettings(relative=0.05, of_baseline=0.002),
    "sign or 0.2 %": AdaptiveSettings(relative=None, of_baseline=0.002, sign=True),
}
POINTS = {f"{points} points": AdaptiveSettings(relative=None, of_baseline=None, absolute=points / 100)
          for points in (5, 3, 2, 1)}  # of an accuracy
BOUNDED = ("accuracy",)
PAIR_TOKENS = 38  # fed for a pair of BLiMP, on average, under the tokenizer of stories260K


def precisions_of(metric: str) -> tuple[dict[str, AdaptiveSettings], str]:
    """What to replay, and which of them the run in adaptive mode uses."""
    return (POINTS, "2 points") if metric in BOUNDED else (PRECISIONS, "10 % or 0.5 %")


def replay_task(tokens: np.ndarray, metric: str) -> ScoredTask:
    """A task with examples of so many tokens, which are their weights, whose scores come from a table.

    The examples of an accuracy have the weight 1 and PAIR_TOKENS tokens each, so that groups may be fewer in a run.
    """
    lengths = (tokens * (PAIR_TOKENS if metric in BOUNDED else 1)).astype(int)
    requests = [Request(np.zeros(n, np.int64), np.array([n - 1]), np.array([0])) for n in lengths]

    def measure(scores: Scores) -> dict[str, ExampleScores]:
        transform = "exp" if metric.endswith("perplexity") else "identity"
        return {metric: ExampleScores(scores.logprob, tokens, transform, bounds=(0, 1) if metric in BOUNDED else None)}

    return ScoredTask("replay", {}, requests, [str(i) for i in range(len(tokens))], measure)


def replayed(
    ablated: np.ndarray, baseline: np.ndarray, tokens: np.ndarray, batch_tokens: int, settings: AdaptiveSettings,
    seed: int, metric: str = "token_perplexity",
) -> tuple[int, bool]:
    """Examples used in one random order, and whether the interval holds the delta of all."""
    task, offsets = replay_task(tokens, metric), np.arange(len(tokens) + 1)
    draws = draw(task, batch_tokens, seed)
    members = dict(zip((group.name for group in draws.tasks), draws.requests))

    def score(name: str) -> Scores:
        one = members[name]
        return Scores(ablated[one], np.zeros(len(one), bool), None, np.arange(len(one) + 1))

    found = measure_sampled(draws, score, Scores(baseline, np.zeros(len(tokens), bool), None, offsets), settings)
    row = found.metrics[metric]
    values = [scores.sum() / tokens.sum() for scores in (ablated, baseline)]
    delta = np.subtract(*(np.exp(values) if metric.endswith("perplexity") else values))
    # all drawn: equal but for the order of summation
    slack = 1e-9 * abs(row.value)
    return row.n, bool(row.low - slack <= delta <= row.high + slack)


def by_cell(
    folder: Path, task: str, metric: str = "token_perplexity"
) -> tuple[Any, dict[str, np.ndarray], np.ndarray]:
    """The rows of the metric; cell -> score of each example, float64 [n]; weight of each example, float64 [n]."""
    metrics = read_metrics(folder)
    metrics = metrics[(metrics["metric"] == metric) & (metrics["status"] == "ok") & (metrics["task"] == task)]
    metrics = metrics.set_index("cell_id")
    examples = read_examples(folder, task=task)
    examples = examples[examples["metric"] == metric]
    scores, tokens = {}, None
    # the rows of a cell are in the order of the task, the same for all
    for cell, rows in examples.groupby("cell_id"):
        scores[str(cell)] = rows["score"].to_numpy(np.float64)
        tokens = rows["weight"].to_numpy(np.float64) if len(scores) == 1 else tokens
    return metrics, scores, tokens


def compare(
    exact: Path, adaptive: Path | None, task: str, orders: int, metric: str = "token_perplexity",
    resample: int | None = None,
) -> list[dict[str, Any]]:
    metrics, scores, tokens = by_cell(exact, task, metric)
    if resample is not None:
        chosen = np.random.default_rng(0).integers(0, len(tokens), resample)
        scores, tokens = {cell: score[chosen] for cell, score in scores.items()}, tokens[chosen]
    batch_tokens = read_manifest(exact).settings["runtime"]["batch_tokens"]
    (baseline,) = metrics.index[metrics["target_kind"] == "baseline"]
    ran = None
    if adaptive is not None:
        found = read_metrics(adaptive)
        ran = found[(found["metric"] == metric) & (found["task"] == task)].set_index(["target", "region"])
    lines = []
    for cell, row in metrics.iterrows():
        if row["target_kind"] in ("baseline", "control"):
            continue
        print(f"{row['target']} {row['region']}", file=sys.stderr, flush=True)
        line = {
            "model": Path(row["model"]).name, "target": row["target"], "region": row["region"],
            "region_kind": row["region_kind"], "n": len(tokens), "baseline": row["baseline"], "delta": row["delta"],
        }
        for name, precision in precisions_of(metric)[0].items():
            tries = [
                replayed(scores[cell], scores[baseline], tokens, batch_tokens, precision, seed, metric)
                for seed in range(orders)
            ]
            line[f"n {name}"] = statistics.median(n for n, _ in tries)
            line[f"held {name}"] = f"{sum(held for _, held in tries)}/{orders}"
        if ran is not None and (row["target"], row["region"]) in ran.index:
            other = ran.loc[(row["target"], row["region"])]
            line |= {
                "n run": other["n"], "delta run": other["delta"], "ci_low run": other["ci_low"],
                "ci_high run": other["ci_high"], "seconds exact": row["seconds"], "seconds run": other["seconds"],
                "held run": bool(other["ci_low"] - 1e-5 * row["value"] <= row["delta"]
                                 <= other["ci_high"] + 1e-5 * row["value"]),
            }
        lines.append(line)
    return sorted(lines, key=lambda line: (("large", "bulk", "small").index(line["region_kind"])
                                           if line["region_kind"] in ("large", "bulk", "small") else 3,
                                           line["target"], line["region"]))


def run_study(overrides: list[str]) -> None:
    run(ABLATION, compose_settings(ABLATION, overrides), RunOptions(progress=False, tidy=True))


def _median(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.1f}x ({min(values):.1f} to {max(values):.1f})" if values else "-"


def summary(lines: list[dict[str, Any]], title: str, metric: str, orders: int) -> str:
    """Markdown: by region, how many times fewer examples, and seconds; then every cell at the precision that ran."""
    precisions, default = precisions_of(metric)
    groups = defaultdict(list)
    for line in lines:
        groups[line["region_kind"]].append(line)
    text = [f"# {title}", "",
            f"{lines[0]['n']} examples, {metric}, baseline {lines[0]['baseline']:.4g}. How many times fewer examples"
            f" than exact: median over cells (range). Replay: median of {orders} random orders per cell; held: orders"
            " whose interval holds the exact delta.", "",
            "| region | cells | " + " | ".join(f"{name} | held" for name in precisions) + " |",
            "|---|--:|" + "--:|--:|" * len(precisions)]
    for kind, members in groups.items():
        parts = []
        for name in precisions:
            held = [tuple(map(int, line[f"held {name}"].split("/"))) for line in members]
            parts += [_median(line["n"] / line[f"n {name}"] for line in members),
                      f"{sum(a for a, _ in held)}/{sum(b for _, b in held)}"]
        text.append(f"| {kind} | {len(members)} | " + " | ".join(parts) + " |")
    if any("n run" in line for line in lines):
        text += ["", f"Run in adaptive mode ({default}):", "",
                 "| region | cells | fewer examples | fewer seconds | held |", "|---|--:|--:|--:|--:|"]
        for kind, members in groups.items():
            ran = [line for line in members if "n run" in line]
            if ran:
                text.append(f"| {kind} | {len(ran)} | {_median(m['n'] / m['n run'] for m in ran)} |"
                            f" {_median(m['seconds exact'] / m['seconds run'] for m in ran)} |"
                            f" {sum(m['held run'] for m in ran)}/{len(ran)} |")
    text += ["", f"Every cell ({default}):", "",
             "| target | region | delta | n, replay | held | n, run | interval, run | seconds, exact | seconds, run |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for line in lines:
        own = ["", "", "", ""]
        if "n run" in line:
            own = [str(line["n run"]), f"{line['ci_low run']:.4g} .. {line['ci_high run']:.4g}",
                   f"{line['seconds exact']:.2f}", f"{line['seconds run']:.2f}"]
        text.append(f"| {line['target']} | {line['region']} | {line['delta']:.4g} | {line[f'n {default}']:g} |"
                    f" {line[f'held {default}']} | " + " | ".join(own) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=Path, required=True, help="folder of the exact study")
    parser.add_argument("--adaptive", type=Path, help="folder of the same study in adaptive mode")
    parser.add_argument("--task", default="wikitext")
    parser.add_argument("--metric", default="token_perplexity")
    parser.add_argument("--orders", type=int, default=40, help="random orders to replay per cell")
    parser.add_argument("--resample", type=int, help="replay on so many examples drawn with replacement from the run's:"
                        " what a larger set of their kind would need")
    parser.add_argument("--name", help="of the files written; by default that of the model")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("overrides", nargs="*", help="of the study, behind --")
    args = parser.parse_args()
    if args.overrides:
        run_study([*args.overrides, f"output={args.exact}"])
        if args.adaptive is not None:
            precisions, default = precisions_of(args.metric)
            tolerances = [f"runtime.adaptive.{key}={'null' if value is None else value}"
                          for key, value in dataclasses.asdict(precisions[default]).items()]
            run_study([*args.overrides, f"output={args.adaptive}", "runtime.precision=adaptive", *tolerances])
    lines = compare(args.exact, args.adaptive, args.task, args.orders, args.metric, args.resample)
    name = args.name or lines[0]["model"]
    with open(args.output / f"adaptive-{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=max(lines, key=len).keys())
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in line.items()}
                         for line in lines)
    title = f"{lines[0]['model']}: adaptive against exact, {os.cpu_count()} cores"
    text = summary(lines, title, args.metric, args.orders)
    (args.output / f"adaptive-{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
