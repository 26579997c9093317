"""Greedy generation of text in batches, for the tasks that measure the text that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import GENERATION_TOKENS
from harness.models.description import generation_values
from harness.tasks import tokenization


@dataclass(frozen=True)
class Decoding:
    """How a model writes a text: greedily, until an end is reached.

    stops: a text ends before the first of these strings. new_tokens: the largest number of tokens of a text.
    extra: further arguments of `generate` of transformers.
    """

    stops: Sequence[str]
    new_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


def generated_in_batches(
    prompts: Sequence[list[int]], new_tokens: int, generate: Callable[[Sequence[list[int]]], list[list[int]]],
    division: Division, batch_tokens: int,
) -> list[list[int]]:
    """Return the tokens that a model writes after each prompt, in the order of the prompts.

    prompts: token ids. new_tokens: the largest number of tokens that are written after one prompt.
    generate: a function from some prompts, the longest first, to the new tokens of each.
    division: the processes that share the batches. Every process gets all answers.
    batch_tokens: as `TaskContext.generation_tokens`.
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


def require_room(key: str, new_tokens: int, context_length: int) -> None:
    """Raise InputError if new tokens leave no room for a prompt in the model's context. key: "tasks.<name>"."""
    if new_tokens >= context_length:
        raise InputError(
            f"{key}.max_new_tokens: {new_tokens} tokens leave no room for a prompt in the model's context of"
            f" {context_length}; choose a smaller number"
        )


def require_generation(model: Any, known: Mapping[str, Any]) -> None:
    """Raise InputError if a model would not generate with the settings that the id of its cells depends on."""
    present = generation_values(getattr(model, "generation_config", None))
    other = sorted(key for key in {*present, *known} if present.get(key) != known.get(key))
    if other:
        raise InputError(
            f"model: its generation_config has another {other[0]} ({present.get(other[0])!r}) than when the task was"
            f" prepared ({known.get(other[0])!r}); prepare the task again"
        )


def continuations(
    loaded: Any, contexts: Sequence[str], decoding: Decoding, division: Division | None = None,
    batch_tokens: int = GENERATION_TOKENS,
) -> list[str]:
    """Return the greedy continuation of each context, as HFLM generates it. The EOS token also ends a text.

    loaded: an object with model, tokenizer, context_length and device. A context loses its first tokens if it would
    leave no room for the new ones. division: the processes that share the batches. batch_tokens: as
    `TaskContext.generation_tokens`.
    Raises FloatingPointError if the model's outputs are NaN.
    """
    prompts = encoded_prompts(loaded.tokenizer, contexts, loaded.context_length - decoding.new_tokens)
    return written_texts(loaded, prompts, decoding, division or Division(), batch_tokens)


def encoded_prompts(tokenizer: Any, contexts: Sequence[str], room: int) -> list[list[int]]:
    """Return the tokens of each context, of which only the last `room` are kept."""
    return [tokenization.encode(tokenizer, text)[-room:] for text in contexts]


def written_texts(
    loaded: Any, prompts: Sequence[list[int]], decoding: Decoding, division: Division, batch_tokens: int
) -> list[str]:
    """Return the text that a model writes after each prompt, as `continuations` does for prompts of tokens."""
    tokenizer = loaded.tokenizer
    eos = tokenizer.eos_token_id
    if eos is not None:
        decoding = replace(decoding, stops=[*decoding.stops, tokenizer.decode([eos])])

    def generate(members: Sequence[list[int]]) -> list[list[int]]:
        return _generate(loaded, members, decoding)

    answers = generated_in_batches(prompts, decoding.new_tokens, generate, division, batch_tokens)
    return [_cut(tokenizer.decode(tokens, skip_special_tokens=True), decoding.stops) for tokens in answers]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


@torch.inference_mode()
def _generate(loaded: Any, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
    """Return the new tokens after each prompt of a batch. The longest prompt is first."""
    tokenizer, width = loaded.tokenizer, len(prompts[0])
    pad = padding_of(tokenizer, loaded.model)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generated = loaded.model.generate(
        input_ids=input_ids.to(loaded.device), attention_mask=mask.to(loaded.device),
        max_new_tokens=decoding.new_tokens, do_sample=False, use_cache=True, pad_token_id=pad,
        stopping_criteria=[_stopping(tokenizer, decoding.stops, width)], logits_processor=[refuse_nan],
        **decoding.extra,
    )
    return generated[:, width:].tolist()


def _stopping(tokenizer: Any, stops: Sequence[str], width: int) -> Callable:
    """Return a criterion that ends each row at its own first stop, so that a batch ends when its last row does."""
    # Two tokens more than the longest stop has, because a text may be divided into tokens in more than one way.
    tail = 2 + max((len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops), default=0)

    def stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - tail) :])
        found = np.array([any(stop in text for stop in stops if stop) for text in texts], dtype=bool)
        return torch.from_numpy(found).to(input_ids.device)

    return stopped
