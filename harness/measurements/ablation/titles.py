"""The titles of the figures of a study."""

from __future__ import annotations

import json
from typing import Any

from harness.measurements.ablation.summary import MeasuredMetric
from harness.tables.labels import model_name
from harness.tables.text import count, figure_text, is_missing, shorten


def figure_title(one: MeasuredMetric, more: str = "", bars: str = "") -> str:
    """Return the title of a figure of a metric in two lines: the metric, and the model with its data.

    more: words that follow the first line. bars: words that follow the second line and explain the error bars.
    """
    return f"{figure_text(one.title + more)}\n{figure_text(f'{measured_on(one)}{bars}')}"


def measured_on(one: MeasuredMetric) -> str:
    """Return the model, the text or the data, and the number of examples, for titles and captions."""
    parts = [model_name(one.cells["model"].iloc[0], one.cells["gguf_file"].iloc[0])]
    if one.baseline is not None:
        parts += [name] if (name := _data_name(one.baseline["protocol"])) else []
        parts += [] if is_missing(one.baseline["n"]) else [count(int(one.baseline["n"]), "example")]
    return ", ".join(parts)


def _data_name(protocol: Any) -> str | None:
    data = json.loads(protocol).get("data") if isinstance(protocol, str) else None
    return shorten(data, 40) if isinstance(data, str) else None
