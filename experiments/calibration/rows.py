"""How alike neighbouring rows are: rows that are documents, and rows that are pieces of longer documents."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from populations import lines

from harness.tasks.documents import are_pieces, likeness

SIZES = (10, 30, 100, 500)  # rows of a sample, which follow each other
SAMPLES = 8


def kinds(assets: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and rows."""
    data = assets / "data"
    told = [row["text"] for row in lines(data / "tinystories/tinystories_1000_train.jsonl")]
    rng = np.random.default_rng(0)
    yield "documents: stories in the order of the file", told
    yield "documents: stories in random order", [told[i] for i in rng.permutation(len(told))]
    passages = list(dict.fromkeys(row["passage"] for row in lines(data / "boolq/validation.jsonl")))
    yield "documents: passages of BoolQ", [one for one in passages if len(one) > 400]
    wiki = [row["text"] for row in lines(data / "wikitext-2-raw/test.jsonl")]
    yield "pieces: paragraphs of WikiText", [row for row in wiki if row.strip() and not row.startswith(" =")]
    play = (data / "tinyshakespeare/input.txt").read_text()
    yield "pieces: 1000 characters of Shakespeare", [play[i : i + 1000] for i in range(0, len(play), 1000)]
    yield "pieces: lines of Shakespeare", [line for line in play.split("\n") if line.strip()]
    yield "pieces: sentences of stories", re.split(r"(?<=[.!?])\s+", " ".join(told[:400]))


def likeness_of_rows(assets: Path) -> list[dict[str, Any]]:
    """One line for each kind of rows and size of a sample: its likeness, and how often rows are taken for pieces."""
    found = []
    for name, rows in kinds(assets):
        for size in SIZES:
            samples = list(samples_of(rows, size))
            alike = np.array([likeness(sample) for sample in samples])
            found.append({"rows": name, "of a sample": size, "samples": len(samples),
                          "likeness, mean": float(alike.mean()), "smallest": float(alike.min()),
                          "largest": float(alike.max()),
                          "taken for pieces": float(np.mean([are_pieces(sample) for sample in samples]))})
    return found


def samples_of(rows: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for begin in np.unique(np.linspace(0, max(0, len(rows) - size), SAMPLES).astype(int)).tolist():
        yield rows[begin : begin + size]
