"""Studies made of numbers that nobody measured, for the tests of the tables."""

from __future__ import annotations

from harness.tables.schema import blank_row


def metric_row(cell: str, metric: str = "token_perplexity", **columns) -> dict:
    """A complete metrics row of a cell on the task `text`; `columns` overrides."""
    row = blank_row()
    row.update(
        study_id="study",
        cell_id=cell,
        task="text",
        metric=metric,
        status="ok",
        value=20.0,
        stderr=0.5,
        n=64,
        higher_is_better=False,
        model="model",
        target="0.q_proj",
        target_kind="matrix",
        block=0,
        layer_type="q_proj",
        region="small 0.1",
        protocol='{"window": 128}',
        settings="{}",
        seed=0,
    )
    row.update(columns)
    return row


def example_columns(cell: str, n: int = 5, metric: str = "token_perplexity") -> dict:
    return {
        "study_id": "study",
        "cell_id": cell,
        "task": "text",
        "metric": metric,
        "example_id": [f"e{i}" for i in range(n)],
        "score": [float(i) for i in range(n)],
        "weight": [1.0] * n,
    }


def error_row(cell: str, **columns) -> dict:
    error = "Traceback (most recent call last):\n  ...\nRuntimeError: boom"
    return metric_row(cell, status="error", value=None, stderr=None, error=error, **columns)
