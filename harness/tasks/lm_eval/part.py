"""One task of lm-eval, prepared; a group or tag has several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.evaluation.requests import Request


@dataclass(frozen=True)
class Part:
    """One task of lm-eval, prepared.

    definition: a digest of its configuration and code, as `identity.definition` returns.
    docs: for each document its Instances, which are what lm-eval asks a model.
    by_metric: metric -> the name of its aggregation, or "" for a metric that is left out.
    requests, offsets: the requests of Instance i are requests[offsets[i]:offsets[i + 1]]. A rolling log-likelihood has
        one for each window, and may have none.
    """

    name: str
    task: Any
    definition: str
    docs: list[list[Any]]
    by_metric: dict[str, str]
    requests: list[Request]
    offsets: list[int]
