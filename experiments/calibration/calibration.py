"""Are p-values uniform where nothing is to be found, and do intervals hold what they should hold?

    python experiments/calibration/calibration.py --assets ../shared    # writes its tables and picture beside this file

stories260K is measured once on every kind of task, with and without ablations. The measured scores are then a
population from which samples are drawn, and every null hypothesis is true by construction:

Effects. The mean effect of an ablation on the population is subtracted from its scores, in proportion to the weights.
For accuracies, which must stay 0 or 1, the two models are exchanged in every other cluster at random instead.
Documents, paradigms and passages are drawn with replacement, with all of their examples, and the p-value of the sample
is computed over clusters and, as if all examples were independent ("naive"), without them.
Draws. One of 60 random draws of a control plays the best cell, against others of them, on examples that are drawn with
replacement.
Sequential. Adaptive cells are replayed in random orders: whether their intervals hold the delta of all examples, and
whether their p-values are too small where the mean effect is zero.
"""

from __future__ import annotations

import argparse
import csv
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kstest

from harness.engine.run import RunOptions, run
from harness.evaluation.adaptive import delta_interval
from harness.evaluation.requests import ExampleScores
from harness.evaluation.sequential import zero_mean_evidence
from harness.evaluation.statistics import over_new_draw, paired
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.tasks.clusters import BLOCKS

HERE = Path(__file__).parent
LEVELS = (0.01, 0.05, 0.1)
# Task -> the metric that is tested.
METRICS = {"wikitext": "token_perplexity", "blimp": "accuracy", "boolq": "acc", "arc_easy": "acc", "ioi": "logprob",
           "factual": "logprob", "lambada": "perplexity", "qa_wikidata": "logprob"}
QUESTIONS = 200  # of a sample of a task whose examples are independent
SAMPLED = {"wikitext": 20, "blimp": 12, "boolq": QUESTIONS}  # clusters of a sample
STRETCHES = (400, 1600, 3200)  # windows of a text without headings
SEEDS = 60  # draws of the control
FIRST_LOOK, GROWTH = 32, 1.1  # of an adaptive cell of a large task, which looks most often


def settings(assets: Path) -> list[str]:
    data = assets / "data"
    return [
        "model=pretrained", f"model.name={assets / 'models/stories260K'}", "model.device=cpu", "runtime.threads=1",
        f"tasks.ioi.data_files={data / 'ioi/ioi.jsonl'}",
        f"tasks.factual.data_files={data / 'counterfact/known_1000.jsonl'}",
    ]


def of_effects(assets: Path) -> list[str]:
    data = assets / "data"
    return [
        *settings(assets), f"task=[{','.join(METRICS)}]", "region=fraction", "region.kinds=[large,small]",
        "region.values=[0.1]", "region.controls=[]", "target.layer_types=[down_proj]", "target.blocks=[1,3]",
        f"tasks.wikitext.data_files={data / 'wikitext-2-raw/test.jsonl'}", "tasks.wikitext.window=128",
        f"tasks.blimp.data_files={data / 'blimp'}", "tasks.blimp.limit=200",
        f"+tasks.boolq.data_files.train={data / 'boolq/train.jsonl'}",
        f"+tasks.boolq.data_files.validation={data / 'boolq/validation.jsonl'}", "tasks.boolq.limit=1000",
        f"+tasks.arc_easy.data_files.test={data / 'arc_easy/test.jsonl'}",
        f"+tasks.arc_easy.data_files.validation={data / 'arc_easy/validation.jsonl'}", "tasks.arc_easy.limit=600",
        f"tasks.lambada.data_files={data / 'lambada/test.jsonl'}", "tasks.lambada.limit=600",
        f"tasks.qa_wikidata.data_files={data / 'bigbench/qa_wikidata.jsonl'}", "tasks.qa_wikidata.limit=600",
    ]


def of_draws(assets: Path) -> list[str]:
    return [
        *settings(assets), "task=[ioi,factual]", "region=fraction", "region.kinds=[small]", "region.values=[0.5]",
        "region.controls=[random]", f"region.random_seeds=[{','.join(map(str, range(SEEDS)))}]",
        "target.layer_types=[down_proj]", "target.blocks=[3]",
    ]


def measured(words: list[str], folder: Path) -> Path:
    done = run(ABLATION, compose_settings(ABLATION, [*words, f"output={folder}"]), RunOptions(False, lambda line: None))
    assert done.failed == 0, f"harness status {folder} --failed"
    return folder


def scores_of(folder: Path, task: str, metric: str) -> tuple[ExampleScores, list[ExampleScores]]:
    """The scores of the baseline, and those of every ablation."""
    rows = read_metrics(folder)
    rows = rows[(rows.task == task) & (rows.metric == metric)]
    examples = read_examples(folder, task=task)
    of_cell = dict(list(examples[examples.metric == metric].groupby("cell_id")))
    transform = "exp" if metric.endswith("perplexity") else "identity"
    bounds = (0.0, 1.0) if metric.startswith("acc") else None
    found: dict[bool, list[ExampleScores]] = {True: [], False: []}
    for row in rows.itertuples():
        table = of_cell[row.cell_id]
        clusters = None if table.cluster.isna().any() else table.cluster.to_numpy(np.int64)
        score, weight = table.score.to_numpy(float), table.weight.to_numpy(float)
        scores = ExampleScores(score, weight, transform, bounds=bounds, clusters=clusters)
        found[row.target_kind == "baseline"].append(scores)
    return found[True][0], found[False]


def without_effect(ablated: ExampleScores, baseline: ExampleScores) -> ExampleScores:
    """The scores less the mean effect of the ablation on all examples, so that the metric is that of the baseline."""
    effect = (ablated.score.sum() - baseline.score.sum()) / baseline.weight.sum()
    return replace(ablated, score=ablated.score - effect * ablated.weight, bounds=None)


def exchanged(
    ablated: ExampleScores, baseline: ExampleScores, groups: np.ndarray, rng: np.random.Generator
) -> list[ExampleScores]:
    """The two scores, exchanged in every other cluster at random: an edit that helps as much as it harms."""
    swap = rng.integers(0, 2, groups.max() + 1).astype(bool)[groups]
    return [replace(one, score=np.where(swap, other.score, one.score))
            for one, other in ((ablated, baseline), (baseline, ablated))]


def null_pair(
    task: str, ablated: ExampleScores, baseline: ExampleScores, examples: np.ndarray, groups: np.ndarray,
    rng: np.random.Generator,
) -> list[ExampleScores]:
    """The scores of a sample with and without an edit of no effect. groups: the clusters of the sample."""
    if METRICS[task].startswith("acc"):
        pair = exchanged(ablated.at(examples), baseline.at(examples), groups, rng)
    else:
        pair = [without_effect(ablated, baseline).at(examples), baseline.at(examples)]
    return [replace(scores, clusters=groups) for scores in pair]


def drawn_clusters(clusters: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The examples of clusters that are drawn with replacement, each draw with a number of its own."""
    members = [np.flatnonzero(clusters == one) for one in np.unique(clusters)]
    drawn = [members[i] for i in rng.integers(0, len(members), count)]
    return np.concatenate(drawn), np.arange(count).repeat([len(one) for one in drawn])


def stretch(clusters: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n consecutive windows of a text of documents in random order, in the blocks of a text without headings."""
    count = 2 + 4 * n // (len(clusters) // len(np.unique(clusters)))
    examples, _ = drawn_clusters(clusters, count, rng)
    begin = rng.integers(0, max(1, len(examples) - n))
    return examples[begin : begin + n], np.arange(n) * BLOCKS // n


def effects(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """One p-value for each task, way to draw a sample, ablation and repetition."""
    found = []
    for number, (task, metric) in enumerate(METRICS.items()):
        baseline, ablations = scores_of(folder, task, metric)
        clusters = np.arange(len(baseline.score)) if baseline.clusters is None else baseline.clusters
        count = SAMPLED.get(task, QUESTIONS)
        ways: dict[str, Any] = {f"{task}: {count} of {len(np.unique(clusters))} clusters":
                                lambda rng, clusters=clusters, count=count: drawn_clusters(clusters, count, rng)}
        if task == "wikitext":
            ways |= {f"wikitext: {BLOCKS} blocks of {n} windows": lambda rng, n=n, c=clusters: stretch(c, n, rng)
                     for n in STRETCHES}
        for name, draw in ways.items():
            for cell, ablated in enumerate(ablations):
                rng = np.random.default_rng([number, cell])
                for _ in range(repetitions):
                    examples, groups = draw(rng)
                    pair = null_pair(task, ablated, baseline, examples, groups, rng)
                    robust, naive = paired(*pair), paired(*(replace(scores, clusters=None) for scores in pair))
                    found.append({"null": name, "metric": metric, "p": robust.p_value, "naive": naive.p_value,
                                  "ratio": robust.stderr / naive.stderr if naive.stderr else None})
    return found


def controls(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """p-values of one draw against others, by the test against a new draw and by that against their mean."""
    found = []
    for task in ("ioi", "factual"):
        _, cells = scores_of(folder, task, METRICS[task])
        for m in (3, 10):
            rng = np.random.default_rng([m, len(task)])
            for _ in range(4 * repetitions):
                examples = rng.integers(0, len(cells[0].score), QUESTIONS)
                model, *draws = (cells[i].at(examples) for i in rng.permutation(len(cells))[: m + 1])
                new = over_new_draw(model, draws).p_value
                mean = replace(model, score=np.mean([draw.score for draw in draws], axis=0))
                found.append({"null": f"{task}: {m} draws", "metric": METRICS[task], "p": new,
                              "naive": paired(model, mean).p_value, "ratio": None})
    return found


def looks(n: int) -> list[int]:
    """The numbers of examples at which an adaptive cell is looked at, without the last, which is all."""
    found = [FIRST_LOOK]
    while found[-1] * GROWTH < n - 1:
        found.append(int(np.ceil(found[-1] * GROWTH)))
    return found


def intervals(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Whether the intervals of adaptive cells hold the delta of all examples at every look, in random orders."""
    found = []
    for task in ("wikitext", "blimp"):
        metric = METRICS[task]
        baseline, ablations = scores_of(folder, task, metric)
        first = np.arange(1000 if task == "wikitext" else len(baseline.score))  # neighbouring windows
        baseline = baseline.at(first)
        for ablated in (one.at(first) for one in ablations):
            truth = paired(ablated, baseline).delta
            for confidence in (0.9, 0.95, 0.99):
                for seed in range(repetitions // 2):
                    order, held = np.random.default_rng(seed).permutation(len(first)), True
                    for n in looks(len(first)):
                        interval = delta_interval(ablated, baseline, order[:n], confidence)
                        slack = 1e-9 * abs(truth)
                        held &= interval.low - slack <= truth <= interval.high + slack
                    found.append({"task": task, "metric": metric, "confidence": confidence, "held": held})
    return found


def sequential(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """The p-values of adaptive cells that are looked at until all examples are drawn, over clusters and without."""
    found = []
    for task in ("wikitext", "blimp", "ioi"):
        baseline, ablations = scores_of(folder, task, METRICS[task])
        clusters = np.arange(len(baseline.score)) if baseline.clusters is None else baseline.clusters
        for cell, ablated in enumerate(ablations):
            rng = np.random.default_rng([7, cell])
            for _ in range(repetitions):
                examples, groups = drawn_clusters(clusters, SAMPLED.get(task, QUESTIONS), rng)
                pair = null_pair(task, ablated, baseline, examples, groups, rng)
                order = rng.permutation(len(examples))
                drawn, of = (pair[0].score - pair[1].score)[order], groups[order]
                at = [*looks(len(order)), len(order)]
                robust = max(zero_mean_evidence(drawn[:n], 0.95, of[:n]) for n in at)
                naive = max(zero_mean_evidence(drawn[:n], 0.95) for n in at)
                found.append({"null": f"{task}: adaptive, to the end", "metric": METRICS[task],
                              "p": min(1, 1 / robust), "naive": min(1, 1 / naive), "ratio": None})
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name in dict.fromkeys(row["null"] for row in rows):
        members = [row for row in rows if row["null"] == name]
        line: dict[str, Any] = {"null": name, "metric": members[0]["metric"], "p-values": len(members)}
        for column in ("p", "naive"):
            p = np.array([row[column] for row in members])
            line |= {f"{column} < {level}": float(np.mean(p < level)) for level in LEVELS}
            line[f"{column} Kolmogorov-Smirnov"] = float(kstest(p, "uniform").pvalue)
        ratios = [row["ratio"] for row in members if row["ratio"] is not None]
        line["standard error over naive"] = float(np.median(ratios)) if ratios else None
        lines.append(line)
    return lines


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows)])


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["null"] for row in rows))
    figure, axes = plt.subplots(-(-len(names) // 5), 5, figsize=(15, 3 * -(-len(names) // 5)), layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        for column, label, colour in (("naive", "naive", "tab:red"), ("p", "harness", "tab:blue")):
            p = np.sort([row[column] for row in rows if row["null"] == name])
            axis.plot(p, np.arange(1, len(p) + 1) / len(p), color=colour, label=label)
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("p", fontsize=7)
        axis.tick_params(labelsize=7)
    axes.flat[0].set_ylabel("share of p-values below", fontsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True, help="the folder with data/ and models/")
    parser.add_argument("--studies", type=Path, default=Path("results/calibration"), help="folder of the two studies")
    parser.add_argument("--repetitions", type=int, default=200, help="samples of each ablation")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        of_all, of_control = pool.map(
            measured, (of_effects(args.assets), of_draws(args.assets)), (args.studies / "all", args.studies / "draws")
        )
        parts = [pool.submit(part, folder, args.repetitions) for part, folder in (
            (intervals, of_all), (effects, of_all), (controls, of_control), (sequential, of_all)
        )]
        held, *tested = (part.result() for part in parts)
    rows = [row for part in tested for row in part]
    lines = summary(rows)
    with open(args.output / "calibration.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    coverage = []
    for task, confidence in dict.fromkeys((row["task"], row["confidence"]) for row in held):
        of_task = [row["held"] for row in held if (row["task"], row["confidence"]) == (task, confidence)]
        coverage.append({"task": task, "metric": METRICS[task], "confidence": confidence,
                         "cells and orders": len(of_task), "held at every look": float(np.mean(of_task))})
    shown = {"null": "null hypothesis", "metric": "metric", "p-values": "p-values"}
    shown |= {f"p < {level}": f"p < {level}" for level in LEVELS} | {"p Kolmogorov-Smirnov": "KS"}
    shown |= {f"naive < {level}": f"naive p < {level}" for level in LEVELS}
    shown |= {"standard error over naive": "standard error over naive"}
    text = markdown(lines, shown) + "\n\n" + markdown(coverage, {key: key for key in coverage[0]}) + "\n"
    (args.output / "calibration.md").write_text(text)
    draw_figure(rows, args.output / "calibration.png")
    print(text)


if __name__ == "__main__":
    main()
