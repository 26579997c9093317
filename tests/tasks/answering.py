"""Models that write what a test wants, so that scores above zero are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Answering:
    """A loaded model whose `generate` writes answer(prompt) after each prompt, and then what a model would ramble."""

    def __init__(self, tokenizer: Any, context_length: int, answer: Callable[[str], str]) -> None:
        self.tokenizer, self.context_length, self.device = tokenizer, context_length, torch.device("cpu")
        self.model, self.answer, self.generation_config = self, answer, None

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(len(self.tokenizer), 1)

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int, **_: Any):
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            answer = self.answer(self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True))
            tokens = self.tokenizer.encode(answer, add_special_tokens=False)[:max_new_tokens]
            rows.append(tokens + [self.tokenizer.eos_token_id] * (max_new_tokens - len(tokens)))
        return torch.cat([input_ids, torch.tensor(rows)], 1)
