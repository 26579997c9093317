"""The outcome of measuring one cell: the scores of all examples or of a sample of them, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.evaluation.adaptive import Sampled
from harness.evaluation.requests import ExampleScores


@dataclass(frozen=True)
class Scored:
    """All examples were scored.

    metrics: name of a metric -> its scores, example by example. used: settings that differ from the study's, such as
        the smaller batches of a cell that ran out of memory.
    """

    metrics: Mapping[str, ExampleScores]
    used: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SampledPart:
    """A sample of the examples was scored, as large as the adaptive precision asked for. used: as in `Scored`."""

    sampled: Sampled
    used: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The cell could not be measured. used: as in `Scored`."""

    error: Exception
    used: Mapping[str, Any] = field(default_factory=dict)


Outcome = Scored | SampledPart | Failed
