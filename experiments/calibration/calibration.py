"""Are p-values uniform where nothing is to be found, and do intervals hold what they should hold?

    python experiments/calibration/calibration.py --assets ../shared    # writes its tables and picture beside this file

Every kind of task is measured once, with and without ablations (populations.py). The measured scores are then
populations from which samples are drawn, and every null hypothesis is true by construction (nulls.py):

Effects. The mean effect of an ablation on the population is subtracted from its scores, in proportion to the weights.
For accuracies, which must stay 0 or 1, the two models are exchanged in every other cluster at random instead.
Documents, paradigms, passages and stories are drawn with replacement, with all of their examples, and the p-value of
the sample is computed over clusters and, as if all examples were independent ("naive"), without them.
Stories. Stories of known beginnings are drawn with replacement and put together to one text, which is cut into windows.
Draws. One of 60 random draws of a control plays the best cell, against others of them, on examples that are drawn with
replacement.
Sequential. Adaptive cells are replayed in random orders: whether their intervals hold the delta of all examples, and
whether their p-values are too small where the mean effect is zero.
Rows. How alike neighbouring rows are, for documents and for pieces of documents.
A row that is refused is drawn again with another seed and more samples.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from nulls import CONFIDENCES, Rows, controls, effects, intervals, packed, sequential
from populations import METRICS, measured, measured_stories
from rows import likeness_of_rows
from scipy.stats import binomtest, kstest

HERE = Path(__file__).parent
LEVELS = (0.01, 0.05, 0.1)
LEVEL = 0.05  # of all tests of this experiment together
AGAIN = 5  # times as many samples of a row that is refused, with another seed


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The result of a function, and the processor time in seconds that it took."""
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def summary(rows: Rows) -> Rows:
    """One line for each null hypothesis and metric, with the tests of whether its p-values are what they should be."""
    lines = []
    kinds = list(dict.fromkeys((row["null"], row["metric"]) for row in rows))
    for name, metric in kinds:
        members = [row for row in rows if (row["null"], row["metric"]) == (name, metric)]
        line: dict[str, Any] = {"null": name, "metric": metric, "p-values": len(members)}
        for column in ("p", "naive"):
            p = np.array([row[column] for row in members])
            line |= {f"{column} < {level}": float(np.mean(p < level)) for level in LEVELS}
        ratios = [row["ratio"] for row in members if row["ratio"] is not None]
        line["standard error over naive"] = float(np.median(ratios)) if ratios else None
        p, discrete = np.array([row["p"] for row in members]), members[0]["discrete"]
        line["test"] = "not too small" if discrete else "uniform"
        side = "greater" if discrete else "two-sided"  # "greater" refuses only too many small p-values
        line["Kolmogorov-Smirnov"] = float(kstest(p, "uniform", alternative=side).pvalue)
        line["too many < 0.05"] = float(binomtest(int((p < 0.05).sum()), len(p), 0.05, "greater").pvalue)
        refused = min(line["Kolmogorov-Smirnov"], line["too many < 0.05"]) < LEVEL / (2 * len(kinds))
        line["refused"] = "refused" if refused else "no"
        lines.append(line)
    return lines


def coverage(rows: Rows) -> Rows:
    """How often the intervals of exact cells hold, for each way to draw a sample and each metric."""
    lines = []
    for name, metric in dict.fromkeys((row["null"], row["metric"]) for row in rows):
        members = [row["held"] for row in rows if (row["null"], row["metric"]) == (name, metric)]
        line: dict[str, Any] = {"sample": name, "metric": metric, "samples": len(members)}
        line |= {f"{what} {confidence:.0%}": float(np.mean([one[what][confidence] for one in members]))
                 if what in members[0] else None for what in ("value", "delta", "ratio") for confidence in CONFIDENCES}
        lines.append(line)
    return lines


def adaptive_coverage(rows: Rows) -> Rows:
    """How often the intervals of adaptive cells hold at every look."""
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        line: dict[str, Any] = {"task": task, "metric": metric}
        for confidence in CONFIDENCES:
            members = [row["held"] for row in rows
                       if (row["task"], row["metric"], row["confidence"]) == (task, metric, confidence)]
            line |= {"cells and orders": len(members), f"{confidence:.0%}": float(np.mean(members))}
        lines.append(line)
    return lines


def markdown(rows: Rows, columns: list[str]) -> str:
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows)])


def draw_figure(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys((row["null"], row["metric"]) for row in rows))
    figure, axes = plt.subplots(-(-len(names) // 6), 6, figsize=(16, 2.8 * -(-len(names) // 6)), layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names):
        for column, label, colour in (("naive", "naive", "tab:red"), ("p", "harness", "tab:blue")):
            p = np.sort([row[column] for row in rows if (row["null"], row["metric"]) == name])
            axis.plot(p, np.arange(1, len(p) + 1) / len(p), color=colour, label=label)
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        axis.set_title("\n".join(name), fontsize=8)
        axis.set_xlabel("p", fontsize=7)
        axis.tick_params(labelsize=7)
    axes.flat[0].set_ylabel("share of p-values below", fontsize=7)
    axes.flat[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def write_csv(path: Path, rows: Rows) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def drawn_again(lines: Rows, studies: Path, repetitions: int) -> Rows:
    """The rows that were refused, from samples of their own, so that chance can be told from a fault."""
    refused = {(line["null"], line["metric"]) for line in lines if line["refused"] == "refused"}
    parts = (part(studies, AGAIN * repetitions, 1, refused) for part in (effects, packed, controls) if refused)
    return summary([row for part in parts for row in part])


def write(
    output: Path, tested: list[Rows], held: Rows, alike: Rows, used: str, again: Callable[[Rows], Rows]
) -> None:
    """Write tables and picture, and print the tables.

    tested: the rows of effects, packed, controls and sequential. held: those of intervals. alike: those of
    likeness_of_rows. used: the first line of the page. again: a function that draws refused lines again.
    """
    rows = [row for part in tested for row in part]
    lines, of_exact, of_adaptive = summary(rows), coverage(tested[0] + tested[1]), adaptive_coverage(held)
    lines_again = again(lines)
    write_csv(output / "calibration.csv", lines)
    write_csv(output / "coverage.csv", of_exact)
    write_csv(output / "adaptive.csv", of_adaptive)
    write_csv(output / "likeness.csv", alike)
    shown = ["null", "metric", "p-values", *(f"p < {level}" for level in LEVELS),
             *(f"naive < {level}" for level in LEVELS), "standard error over naive", "test", "Kolmogorov-Smirnov",
             "too many < 0.05", "refused"]
    tables = [markdown(lines, shown), *(markdown(part, list(part[0])) for part in (of_exact, of_adaptive, alike))]
    drawn = markdown(lines_again, shown) if lines_again else "none"
    text = "\n\n".join([used, *tables, f"Refused rows, drawn again with another seed: {drawn}"]) + "\n"
    text = text.replace("seed: |", "seed:\n\n|")
    (output / "calibration.md").write_text(text)
    draw_figure(rows, output / "calibration.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, required=True, help="the folder with data/ and models/")
    parser.add_argument("--studies", type=Path, default=Path("results/calibration"), help="folder of the studies")
    parser.add_argument("--repetitions", type=int, default=200, help="samples of each ablation")
    parser.add_argument("--processes", type=int, default=2, help="cores that may be used")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes) as pool:
        studies = [pool.submit(timed, measured, study, args.assets, args.studies) for study in METRICS]
        studies.append(pool.submit(timed, measured_stories, args.assets, args.studies))
        of_studies = sum(study.result()[1] for study in studies)
        parts = [pool.submit(timed, part, args.studies, args.repetitions)
                 for part in (intervals, effects, packed, controls, sequential)]
        (held, *tested), times = zip(*(part.result() for part in parts))
    used = f"Processor time: {of_studies:.0f} s for the studies, {sum(times):.0f} s for the resampling."
    write(args.output, tested, held, likeness_of_rows(args.assets), used,
          lambda lines: drawn_again(lines, args.studies, args.repetitions))


if __name__ == "__main__":
    main()
