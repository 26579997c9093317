"""Tiny checkpoints on disk, as a user would have them: a folder that `from_pretrained` loads, tokenizer included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.models.tiny import tiny_model

WORDS = [
    "the", "a", "cat", "dog", "bird", "sat", "ran", "on", "under", "mat", "tree", "house", "and", "then", "it", "was",
    "red", "blue", "big", "small", "John", "Mary", "gave", "book", "to", "of", "in", "went", "store", "said", ".", ",",
]  # fmt: skip


def tokenizer():
    """Words and characters of a 67-token vocabulary, the size of the tiny models'."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "<mask>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>",
    )


def save_checkpoint(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Save the tiny model of a family with its tokenizer; returns the folder."""
    model = tiny_model(model_type, dtype, seed, **overrides)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text_file(path: Path, n_words: int = 400) -> Path:
    """Rows of a deterministic text in the tiny tokenizer's words."""
    rows = [" ".join(WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(20)) for i in range(n_words // 20)]
    path.write_text("\n".join(rows) + "\n")
    return path


def ioi_file(path: Path, objects: Sequence[str] = ("book", "cat", "dog", "tree", "mat")) -> Path:
    """Prompts of indirect object identification in the tiny tokenizer's words: two pairs of names, four places."""
    rows = [{"prompt": f"then {a} and {b} went to the {place} . {b} gave a {thing} to", "answer": a}
            for a, b in (("John", "Mary"), ("Mary", "John")) for place in ("store", "house", "tree", "mat")
            for thing in objects]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
