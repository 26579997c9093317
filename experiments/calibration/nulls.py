"""True null hypotheses about measured scores, the p-values of the harness under them, and whether intervals hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from populations import COUNTS, METRICS, STORIES, scores_of, stories
from scipy.stats import t

from harness.evaluation.adaptive import delta_interval
from harness.evaluation.requests import ExampleScores
from harness.evaluation.sequential import zero_mean_evidence
from harness.evaluation.statistics import estimate, over_new_draw, paired, paired_interval
from harness.tasks.clusters import block_count, window_clusters
from harness.tasks.documents import Documents

CONFIDENCES = (0.9, 0.95, 0.99)
QUESTIONS = 200  # of a sample of a task whose examples are independent
SAMPLED = {"wikitext": 20, "blimp": 12, "masked": 40, "seq2seq": 40, "lm_eval": 40}  # clusters of a sample
STRETCHES = (2400, 3200, 6400)  # windows of a text without headings: 3, 4 and 8 blocks
PACKED = ((8, 512), (60, 512), (20, 1024), (10, 2048))  # windows of a text of stories, and the tokens of each
SEQUENTIAL = ("wikitext", "blimp", "ioi", "masked")
ADAPTIVE = ("wikitext", "blimp", "lambada", "masked", "recall")
NEIGHBOURS = 1000  # windows of WikiText for the intervals of adaptive cells
FIRST_LOOK, GROWTH = 32, 1.1  # of an adaptive cell of a large task, which looks most often

Rows = list[dict[str, Any]]
Kinds = set[tuple[str, str]]  # names of null hypotheses and of metrics
Sample = tuple[np.ndarray, np.ndarray]  # the indices of examples, and the cluster of each


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
    ablated: ExampleScores, baseline: ExampleScores, sample: Sample, rng: np.random.Generator
) -> list[ExampleScores]:
    """The scores of a sample with and without an edit of no effect."""
    examples, groups = sample
    if ablated.bounds is not None:
        pair = exchanged(ablated.at(examples), baseline.at(examples), groups, rng)
    else:
        pair = [without_effect(ablated, baseline).at(examples), baseline.at(examples)]
    return [replace(scores, clusters=groups) for scores in pair]


def clusters_of(scores: ExampleScores) -> np.ndarray:
    return np.arange(len(scores.score)) if scores.clusters is None else scores.clusters


def drawn_clusters(clusters: np.ndarray, count: int, rng: np.random.Generator) -> Sample:
    """The examples of clusters that are drawn with replacement, each draw with a number of its own."""
    members = [np.flatnonzero(clusters == one) for one in np.unique(clusters)]
    drawn = [members[i] for i in rng.integers(0, len(members), count)]
    return np.concatenate(drawn), np.arange(count).repeat([len(one) for one in drawn])


def stretch(clusters: np.ndarray, n: int, blocks: int, rng: np.random.Generator) -> Sample:
    """n consecutive windows of a text of documents in random order, in blocks, as for a text without headings."""
    count = 2 + 4 * n // (len(clusters) // len(np.unique(clusters)))
    examples, _ = drawn_clusters(clusters, count, rng)
    begin = rng.integers(0, max(1, len(examples) - n))
    return examples[begin : begin + n], np.arange(n) * blocks // n


def ways(
    task: str, clusters: np.ndarray, characters: float
) -> Iterator[tuple[str, Callable[[np.random.Generator], Sample]]]:
    """The ways to draw a sample from a population, by name. characters: of a window of WikiText."""
    count = SAMPLED.get(task, QUESTIONS)
    yield f"{task}: {count} of {len(np.unique(clusters))} clusters", lambda rng: drawn_clusters(clusters, count, rng)
    if task == "wikitext":
        for n in STRETCHES:
            blocks = block_count(int(n * characters))
            yield f"{task}: {n} windows in {blocks} blocks", lambda rng, n=n, k=blocks: stretch(clusters, n, k, rng)


def populations(studies: Path) -> Iterator[tuple[int, str, str, ExampleScores, list[ExampleScores]]]:
    """A number of its own, task, metric, the scores of the baseline, and those of every ablation that changes some.

    A probe of attention in the last block, for example, does not see what is removed from the layer behind it.
    """
    tested = [(study, *one) for study, metrics in METRICS.items() if study != "draws" for one in metrics]
    for number, (study, task, metric) in enumerate(tested):
        baseline, ablations = scores_of(studies / study, task, metric)
        yield number, task, metric, baseline, [one for one in ablations if (one.score != baseline.score).any()]


def stream(*parts: int, seed: int) -> np.random.Generator:
    """The random numbers of one part of the experiment. seed: another one draws other samples."""
    return np.random.default_rng([*parts, seed] if seed else list(parts))


def effects(studies: Path, repetitions: int, seed: int = 0, only: Kinds | None = None) -> Rows:
    """One p-value under a true null for each population, way to draw a sample, ablation and repetition.

    With it the intervals of the same sample for the value and the delta of the real ablation: whether they hold those
    of the population. only: the names of the null hypotheses and metrics that are wanted; by default all.
    """
    found = []
    characters = float(scores_of(studies / "causal", "wikitext", "byte_perplexity")[0].weight.mean())
    for number, task, metric, baseline, ablations in populations(studies):
        for name, draw in ways(task, clusters_of(baseline), characters):
            if only is not None and (name, metric) not in only:
                continue
            for cell, ablated in enumerate(ablations):
                # each way draws samples of its own
                rng = stream(number, cell, *name.encode(), seed=seed)
                truth = truths(ablated, baseline)
                for _ in range(repetitions):
                    sample = draw(rng)
                    pair = null_pair(ablated, baseline, sample, rng)
                    of_sample = [replace(scores.at(sample[0]), clusters=sample[1]) for scores in (ablated, baseline)]
                    discrete = metric.startswith(COUNTS)
                    found.append({"null": name, "metric": metric, **compared(pair), "discrete": discrete,
                                  "held": held(*of_sample, truth)})
    return found


def compared(pair: list[ExampleScores]) -> dict[str, float | None]:
    """The p-value of a pair over clusters and without them, and the ratio of their standard errors."""
    robust, naive = paired(*pair), paired(*(replace(scores, clusters=None) for scores in pair))
    ratio = robust.stderr / naive.stderr if naive.stderr else None
    return {"p": robust.p_value, "naive": naive.p_value, "ratio": ratio}


def truths(ablated: ExampleScores, baseline: ExampleScores) -> dict[str, float]:
    """The value, the delta and, of a perplexity, the logarithm of the ratio."""
    found = {"value": estimate(ablated).value, "delta": paired(ablated, baseline).delta}
    if ablated.transform == "exp":
        found["ratio"] = paired(*(replace(scores, transform="identity") for scores in (ablated, baseline))).delta
    return found


def held(ablated: ExampleScores, baseline: ExampleScores, truth: dict[str, float]) -> dict[str, dict[float, bool]]:
    """Whether the intervals of a sample hold the truth of the population, at each confidence.

    That of a value is t times its standard error, for a perplexity on the scale of the logarithm (docs/precision.md).
    That of a ratio of perplexities is the one in figures, t times the standard error of the logarithm.
    """
    value, slack = estimate(ablated), 1e-12
    found: dict[str, dict[float, bool]] = {name: {} for name in truth}
    for confidence in CONFIDENCES:
        quantile = t.ppf((1 + confidence) / 2, value.freedom)
        half = quantile * value.stderr
        if ablated.transform == "exp":
            found["value"][confidence] = bool(abs(np.log(value.value / truth["value"])) <= half / value.value + slack)
            log = paired(*(replace(scores, transform="identity") for scores in (ablated, baseline)))
            found["ratio"][confidence] = bool(abs(log.delta - truth["ratio"]) <= quantile * log.stderr + slack)
        else:
            found["value"][confidence] = bool(abs(value.value - truth["value"]) <= half + slack)
        low, high = paired_interval(ablated, baseline, confidence)
        found["delta"][confidence] = bool(low - slack <= truth["delta"] <= high + slack)
    return found


def packed(studies: Path, repetitions: int, seed: int = 0, only: Kinds | None = None) -> Rows:
    """As `effects`, for windows of a text of short documents, which are stories drawn with replacement.

    Tokens keep the log-losses that they had in the text of all stories. A sample begins within a story, as a text may.
    Those of one or two clusters have no p-value and are left out.
    """
    lengths, nll = stories(studies)
    begins, found = np.cumsum([0, *lengths[:-1]]), []
    total = np.full(nll.shape[1], 1.0)
    whole = [ExampleScores(one, total, "exp") for one in nll]
    for n, window in PACKED:
        name = f"{STORIES}: {n} windows of {window} tokens"
        if only is not None and (name, "token_perplexity") not in only:
            continue
        for cell, ablated in enumerate(whole[1:]):
            rng, truth = stream(n, window, cell, seed=seed), truths(ablated, whole[0])
            effect = float((nll[cell + 1] - nll[0]).mean())
            for _ in range(repetitions):
                drawn = rng.integers(0, len(lengths), 10 + 3 * n * window // int(lengths.mean()))
                skipped = rng.integers(0, lengths[drawn[0]])
                tokens = np.concatenate([np.arange(begins[i], begins[i] + lengths[i]) for i in drawn])
                tokens = tokens[skipped : skipped + n * window]
                starts = np.cumsum([0, *lengths[drawn[:-1]]]) - skipped
                clusters, _ = window_clusters(Documents(np.maximum(starts, 0), "rows"), np.arange(n) * window)
                scores = [ExampleScores(nll[which][tokens].reshape(n, window).sum(axis=1), np.full(n, float(window)),
                                        "exp", clusters=clusters) for which in (cell + 1, 0)]
                pair = [replace(scores[0], score=scores[0].score - effect * window), scores[1]]
                if len(np.unique(clusters)) > 2:
                    found.append({"null": name, "metric": "token_perplexity", **compared(pair), "discrete": False,
                                  "held": held(*scores, truth)})
    return found


def controls(studies: Path, repetitions: int, seed: int = 0, only: Kinds | None = None) -> Rows:
    """p-values of one draw against others, by the test against a new draw and by that against their mean."""
    found = []
    for task, metric in METRICS["draws"]:
        _, cells = scores_of(studies / "draws", task, metric)
        for m in (3, 10):
            if only is not None and (f"{task}: {m} draws", metric) not in only:
                continue
            rng = stream(m, len(task), seed=seed)
            for _ in range(4 * repetitions):
                examples = rng.integers(0, len(cells[0].score), QUESTIONS)
                model, *draws = (cells[i].at(examples) for i in rng.permutation(len(cells))[: m + 1])
                mean = replace(model, score=np.mean([draw.score for draw in draws], axis=0))
                found.append({"null": f"{task}: {m} draws", "metric": metric, "p": over_new_draw(model, draws).p_value,
                              "naive": paired(model, mean).p_value, "ratio": None, "discrete": False})
    return found


def looks(n: int) -> list[int]:
    """The numbers of examples at which an adaptive cell is looked at, without the last, which is all."""
    found = [FIRST_LOOK]
    while found[-1] * GROWTH < n - 1:
        found.append(int(np.ceil(found[-1] * GROWTH)))
    return found


def intervals(studies: Path, repetitions: int) -> Rows:
    """Whether the intervals of adaptive cells hold the delta of all examples at every look, in random orders."""
    found = []
    seen = set()
    for _, task, metric, baseline, ablations in populations(studies):
        if task not in ADAPTIVE or task in seen:
            continue
        seen.add(task)
        first = np.arange(len(baseline.score))[: NEIGHBOURS if task == "wikitext" else None]
        baseline = baseline.at(first)
        for ablated in (one.at(first) for one in ablations):
            truth = paired(ablated, baseline).delta
            slack = 1e-9 * abs(truth)
            for seed in range(repetitions // 2):
                order = np.random.default_rng(seed).permutation(len(first))
                for confidence in CONFIDENCES:
                    ends = (delta_interval(ablated, baseline, order[:n], confidence) for n in looks(len(first)))
                    holds = all(one.low - slack <= truth <= one.high + slack for one in ends)
                    found.append({"task": task, "metric": metric, "confidence": confidence, "held": holds})
    return found


def sequential(studies: Path, repetitions: int) -> Rows:
    """The p-values of adaptive cells that are looked at until all examples are drawn, over clusters and without."""
    found = []
    seen = set()
    for _, task, metric, baseline, ablations in populations(studies):
        if task not in SEQUENTIAL or task in seen:
            continue
        seen.add(task)
        for cell, ablated in enumerate(ablations):
            rng = np.random.default_rng([7, cell])
            for _ in range(repetitions):
                sample = drawn_clusters(clusters_of(baseline), SAMPLED.get(task, QUESTIONS), rng)
                pair = null_pair(ablated, baseline, sample, rng)
                order = rng.permutation(len(sample[0]))
                drawn, of = (pair[0].score - pair[1].score)[order], sample[1][order]
                at = [*looks(len(order)), len(order)]
                robust = max(zero_mean_evidence(drawn[:n], 0.95, of[:n]) for n in at)
                naive = max(zero_mean_evidence(drawn[:n], 0.95) for n in at)
                found.append({"null": f"{task}: adaptive, to the end", "metric": metric, "p": min(1, 1 / robust),
                              "naive": min(1, 1 / naive), "ratio": None, "discrete": True})
    return found
