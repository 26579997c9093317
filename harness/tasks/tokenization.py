"""Turn contexts and continuations into tokens by the rules of lm-evaluation-harness, so that scores are comparable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import Request, TaskContext, continuation_request


def prefix_token(tokenizer: Any) -> int:
    """Return the token that precedes a sequence without context: BOS, or EOS for a tokenizer without BOS.

    Raises InputError if the tokenizer has neither.
    """
    # The test is "is not None", because 0 is the id of a token.
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("model: its tokenizer has neither a BOS nor an EOS token to begin a sequence with; set one")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of `text` after the tokenizer's own special tokens (BOS for Llama, none for GPT-2).

    A text that already begins with the prefix token gets no second one. If the tokenizer appends EOS, it is removed,
    because no text could follow it.
    """
    prefix = tokenizer.bos_token or tokenizer.eos_token
    special = not (prefix and text.startswith(prefix))
    tokens = list(tokenizer.encode(text, add_special_tokens=special))
    eos = tokenizer.eos_token
    if special and len(tokens) > 1 and eos and tokens[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        tokens.pop()
    return tokens


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation, as `TemplateLM._encode_pair` of lm-eval does.

    Spaces at the end of the context move to the continuation. Both are encoded as one text, which is cut after as many
    tokens as the context alone has. If the context is empty, it becomes the prefix token.
    Raises InputError if the context or the continuation has no token.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if context:
        first = encode(tokenizer, context)
        pair = first, encode(tokenizer, context + continuation)[len(first) :]
    else:
        tokens = list(tokenizer.encode(continuation, add_special_tokens=False))
        prefix = prefix_token(tokenizer)
        pair = (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
    if not pair[0] or not pair[1]:
        raise InputError(f"no tokens to score for {continuation!r} after {context[-40:]!r}")
    return pair


def request(context: Sequence[int], continuation: Sequence[int], context_length: int) -> Request:
    """Return the request for log p(continuation | context), in which at most `context_length` tokens are fed.

    The context loses its first tokens if both together are longer. The last token of the continuation is never fed.
    Raises InputError if the continuation alone is longer than `context_length`.
    """
    if len(continuation) > context_length:
        raise InputError(
            f"a continuation of {len(continuation)} tokens is longer than the model's context of {context_length}"
        )
    kept = context[max(0, len(context) + len(continuation) - 1 - context_length) :]
    return continuation_request(list(kept), list(continuation))


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise InputError if the model has no tokenizer. name: the name of the task."""
    if tokenizer is None:
        raise InputError(f"tasks.{name}: the model has no tokenizer, so it cannot read text; remove the task")


def require_embedded(name: str, tokens: Any, model_config: Any) -> None:
    """Raise InputError if one of the tokens has no row in the model's embedding. name: the name of the task.

    A tokenizer may have more tokens than the embedding, if no text of the task has them; None stands for no tokens.
    """
    text_config = model_config if hasattr(model_config, "vocab_size") else model_config.get_text_config()
    size = getattr(text_config, "vocab_size", None)
    if size is None or tokens is None or not len(tokens):
        return
    least, largest = int(np.min(tokens)), int(np.max(tokens))
    if 0 <= least and largest < size:
        return
    wrong = largest if largest >= size else least
    raise InputError(f"tasks.{name}: the tokenizer makes the token {wrong}, but the model has the tokens 0 to"
                     f" {size - 1} only; use the tokenizer that the model was trained with")


def adds_bos(tokenizer: Any) -> bool:
    """Return whether `encode` puts a BOS token before a text."""
    return tokenizer.bos_token_id is not None and encode(tokenizer, "a")[0] == tokenizer.bos_token_id


def pair_request(key: str, task: TaskContext, context: str, continuation: str) -> Request:
    """Return the `request` of the tokens that `encode_pair` gives for two texts.

    key: the beginning of messages, such as "tasks.lambada row 3". Raises InputError as these two do.
    """
    try:
        return request(*encode_pair(task.tokenizer, context, continuation), task.context_length)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
