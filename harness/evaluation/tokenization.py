"""Contexts and continuations as tokens, by the conventions of lm-evaluation-harness, so that scores can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.errors import InputError
from harness.evaluation.requests import Request, TaskContext, continuation_request


def prefix_token(tokenizer: Any) -> int:
    """The token that stands before a sequence without context: BOS, else EOS.

    Raises InputError where the tokenizer has neither.
    """
    # "is not None", because id 0 is a token
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("model: its tokenizer has neither a BOS nor an EOS token to begin a sequence with; set one")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` with the tokenizer's own special tokens in front (Llama: BOS, GPT-2: none).

    A text that already begins with the prefix token gets no second one. An EOS that the tokenizer appends is taken
    off: nothing could follow it.
    """
    prefix = tokenizer.bos_token or tokenizer.eos_token
    special = not (prefix and text.startswith(prefix))
    tokens = list(tokenizer.encode(text, add_special_tokens=special))
    eos = tokenizer.eos_token
    if special and len(tokens) > 1 and eos and tokens[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        tokens.pop()
    return tokens


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows it, neither empty; lm-eval's `TemplateLM._encode_pair`.

    Spaces at the end of the context move to the continuation; the whole is encoded and cut after as many tokens as the
    context alone has. Without a context the continuation is encoded alone, behind the prefix token.
    Raises InputError where no token is left to score.
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
    """The request for log p(continuation | context), the context cut from the left so that at most `context_length`
    tokens are fed (the last token of the continuation is not).

    Raises InputError where the continuation alone is longer.
    """
    if len(continuation) > context_length:
        raise InputError(
            f"a continuation of {len(continuation)} tokens is longer than the model's context of {context_length}"
        )
    kept = context[max(0, len(context) + len(continuation) - 1 - context_length) :]
    return continuation_request(list(kept), list(continuation))


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Raises InputError where a task of text meets a model that comes without a tokenizer."""
    if tokenizer is None:
        raise InputError(f"tasks.{name}: the model has no tokenizer, so it cannot read text; remove the task")


def adds_bos(tokenizer: Any) -> bool:
    """Whether `encode` puts a BOS token before a text."""
    return tokenizer.bos_token_id is not None and encode(tokenizer, "a")[0] == tokenizer.bos_token_id


def pair_request(key: str, task: TaskContext, context: str, continuation: str) -> Request:
    """`encode_pair`, then `request`; messages of InputError begin with `key`, e.g. "tasks.lambada row 3"."""
    try:
        return request(*encode_pair(task.tokenizer, context, continuation), task.context_length)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
