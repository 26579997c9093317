"""The settings of `harness search`: which cells of a grid are tried, and what is done with the best ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from harness.checks import at_least, fail, one_of

CHOICES = ("exhaustive", "gradient", "compare")
COMPOSITIONS = ("none", "greedy")


@dataclass
class SearchConfig:
    """Only `harness search` reads these. The grid is target x region; tasks with a `part` are searched on their
    selection part and judged on their report part, the others are measured beside the best cells."""

    metrics: list[str] = field(default_factory=lambda: ["accuracy", "logprob", "perplexity"])  # a task's own of these
    choice: str = "exhaustive"  # gradient: the targets it favours; compare: all of them, and how well it ranks them
    keep: float = 0.1  # gradient: share of the targets of which every region is measured
    gradient_examples: int = 100  # gradient and compare
    report_limit: int | None = None  # examples of each report part (per paradigm where a task's limit is)
    control_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of the random controls of each best cell
    compose: str = "none"  # greedy: block after block from the last, accepted on held-out selection examples


def validate_search(search: SearchConfig) -> None:
    """Raises InputError with one line."""
    if not search.metrics:
        fail("search.metrics", [], "name at least one, for example [accuracy]")
    for key, known in (("choice", CHOICES), ("compose", COMPOSITIONS)):
        one_of(f"search.{key}", getattr(search, key), known)
    if not 0 < search.keep <= 1 or math.isnan(search.keep):
        fail("search.keep", search.keep, "it must be above 0 and at most 1")
    at_least("search.gradient_examples", search.gradient_examples, 1)
    if search.report_limit is not None and not search.report_limit >= 2:
        fail("search.report_limit", search.report_limit, "it must be at least 2 or null")
    if not search.control_seeds:
        fail("search.control_seeds", [], "name at least one, for example [0]")
    for seed in search.control_seeds:
        at_least("search.control_seeds", seed, 0)
