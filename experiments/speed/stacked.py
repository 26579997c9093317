"""What passes of several variants at once could gain: a batch of V times the rows beside V batches.

    HARNESS_ASSETS=../shared python experiments/speed/stacked.py     # about two minutes of one CPU; writes stacked.csv

V cells of one task differ in one matrix. Stacked into one pass, everything but the product with this matrix is the same
work on V times the rows. The script measures the model's forward on a batch and on V copies of it, with equal weights.
This is the most that stacking can gain, because the edited product, the reading of the head, the statistics and the
rows would still be made for each variant. It also compares the hidden states bit by bit, and the forward of compiled
blocks (runtime.compile) with that of the usual ones.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from harness.models.recall import RecallConfig, RecallForCausalLM

HERE = Path(__file__).resolve().parent
VARIANTS = (2, 4, 8, 16)
ROWS = (1, 2, 4, 16, 64)
MOST_TOKENS = 20_000
COLUMNS = ("model", "rows", "length", "tokens", "ms", *(f"gain_{v}" for v in VARIANTS), "equal_bits", "compiled_gain")


def milliseconds(model: Any, ids: torch.Tensor, repeats: int) -> float:
    """Processor time of a forward pass in this thread, the least of some repeats."""
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        model(ids)
        times.append(time.thread_time() - started)
    return 1000 * min(times)


@torch.inference_mode()
def measured(name: str, model: Any, length: int) -> list[dict[str, Any]]:
    """The rows of the table for one model and one length of its sequences."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for n in ROWS:
        ids = torch.randint(3, 60, (n, length), generator=generator)
        one, out = milliseconds(model, ids, 6), model(ids).logits
        row: dict[str, Any] = {"model": name, "rows": n, "length": length, "tokens": ids.numel(), "ms": one}
        equal = True
        for variants in VARIANTS:
            stacked = ids.repeat(variants, 1)
            if stacked.numel() <= MOST_TOKENS:
                row[f"gain_{variants}"] = variants * one / milliseconds(model, stacked, 4)
                equal &= bool((model(stacked).logits.view(variants, *out.shape) == out).all())
        rows.append(row | {"equal_bits": equal})
    return rows


@torch.inference_mode()
def compiled(model: Any, rows: list[dict[str, Any]]) -> None:
    """Adds to the rows how much faster compiled blocks are, which are compiled as runtime.compile does."""
    blocks = model.layers if hasattr(model, "layers") else model.model.layers
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)
    for row in rows:
        ids = torch.randint(3, 60, (row["rows"], row["length"]))
        model(ids)
        row["compiled_gain"] = row["ms"] / milliseconds(model, ids, 6)
    for block in blocks:
        del block.forward


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the page."""
    heads = ["model", "tokens of a pass", "ms", *(f"{v} variants" for v in VARIANTS), "equal bits", "compiled"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in rows:
        gains = [f"{row[key]:.2f}" if key in row else "-" for key in (*(f"gain_{v}" for v in VARIANTS),)]
        lines.append(f"| {row['model']} | {row['rows']} x {row['length']} | {row['ms']:.2f} | {' | '.join(gains)} |"
                     f" {'yes' if row['equal_bits'] else 'no'} | {row['compiled_gain']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("HARNESS_ASSETS", "../shared")))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stories = AutoModelForCausalLM.from_pretrained(arguments.assets / "models" / "stories260K").eval()
    stories.config.use_cache = False
    embedded = RecallForCausalLM(RecallConfig()).eval()
    rows = []
    for name, model, lengths in (("stories260K", stories, (32, 256)), ("embedded", embedded, (64,))):
        of_model = [row for length in lengths for row in measured(name, model, length)]
        compiled(model, of_model)
        rows += of_model
    with (HERE / "stacked.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
