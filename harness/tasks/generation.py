"""Greedy generation of text in batches, for the tasks that measure the text that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from harness.evaluation.division import Division

# Tokens of the prompts and the generated text of one batch, padding included. The ids of cells depend on it, because
# another padding changes the last bits of logits, and so a text in which two tokens are almost equally probable.
BATCH_TOKENS = 16384


def generated_in_batches(
    prompts: Sequence[list[int]], new_tokens: int, generate: Callable[[Sequence[list[int]]], list[list[int]]],
    division: Division, batch_tokens: int,
) -> list[list[int]]:
    """Return the tokens that a model writes after each prompt, in the order of the prompts.

    prompts: token ids. new_tokens: the largest number of tokens that are written after one prompt.
    generate: a function from some prompts, the longest first, to the new tokens of each.
    division: the processes that share the batches. Every process gets all answers.
    batch_tokens: as BATCH_TOKENS.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = []
    while order:
        count = max(1, batch_tokens // (len(prompts[order[0]]) + new_tokens))
        batches.append(order[:count])
        order = order[count:]

    def own() -> dict[int, list[int]]:
        answers: dict[int, list[int]] = {}
        for members in (batches[b] for b in division.own(len(batches))):
            answers.update(zip(members, generate([prompts[i] for i in members])))
        return answers

    answers = {i: tokens for part in division.together("generating", own) for i, tokens in part.items()}
    return [answers[i] for i in range(len(prompts))]


def padding_of(tokenizer: Any, model: Any) -> int:
    """Return the token that fills the rows of a batch. The attention mask hides it from the model.

    It has a row in the model's embedding, which a padding token that was added to a tokenizer may lack.
    """
    size = model.get_input_embeddings().num_embeddings
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None and token < size), 0)


def refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores unchanged, as a logits processor of transformers. Raises FloatingPointError for NaN."""
    if scores.isnan().any():
        raise FloatingPointError("the model's outputs are not numbers (NaN), so no text can be generated")
    return scores
