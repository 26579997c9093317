"""A small Llama trained from a seed on TinyStories, with checkpoints that `harness coupling` reads as revisions."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

STEPS = (0, 3, 10, 20, 30, 50, 100, 200)
BATCH, WINDOW = 16, 64
WARMUP, RATE = 20, 3e-3


def tokens_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """Stories one after the other, each beginning with BOS, cut into windows: int64 [n, WINDOW]."""
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    n = len(ids) // WINDOW
    return torch.tensor(ids[: n * WINDOW]).view(n, WINDOW)


@torch.no_grad()
def loss_of(model, windows: torch.Tensor) -> float:
    """Nats per token."""
    losses = [float(model(part, labels=part).loss) * len(part) for part in windows.split(BATCH)]
    return sum(losses) / len(windows)


def train(architecture: Path, stories: Path, out: Path, seed: int) -> None:
    """Train a model from `seed` and save `step<n>` below `out` for each of STEPS.

    The architecture is that of a folder, the weights are new. Warm-up, then a constant rate, AdamW, clipped gradients.
    """
    tokenizer = AutoTokenizer.from_pretrained(architecture)
    windows = tokens_of(tokenizer, [json.loads(line)["text"] for line in stories.read_text().splitlines()])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(architecture), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            model.save_pretrained(out / f"step{step}")
            tokenizer.save_pretrained(out / f"step{step}")
        batch = windows[torch.randint(len(windows), (BATCH,), generator=order)]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP)
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def losses(folder: Path, validation: Path, seed: int) -> pd.DataFrame:
    """The validation loss of each checkpoint."""
    rows = []
    for step in STEPS:
        model = AutoModelForCausalLM.from_pretrained(folder / f"step{step}", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / f"step{step}")
        windows = tokens_of(tokenizer, [validation.read_text()])[:64]
        rows.append({"seed": seed, "step": step, "tokens": step * BATCH * WINDOW, "nll": loss_of(model, windows)})
    return pd.DataFrame(rows)
