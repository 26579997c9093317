"""Turn contexts and continuations into tokens by the rules of lm-evaluation-harness, so that scores are comparable."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import Request, TaskContext, continuation_request
from harness.tasks.fingerprint import digest_of


def prefix_token(tokenizer: Any) -> int:
    """Return the token that precedes a sequence without context: BOS, or EOS for a tokenizer without BOS.

    Raises InputError if the tokenizer has neither.
    """
    # The test is "is not None", because 0 is the id of a token.
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("model: its tokenizer has neither a BOS nor an EOS token to begin a sequence with; set one")


def prefix_of(name: str, tokenizer: Any, bos: bool | str) -> list[int]:
    """Return the token that precedes a text under the setting `bos` of a task, as a list of one or none.

    bos: "auto", True or False. Raises InputError if it is True and the tokenizer has no such token. name: the name of
    the task.
    """
    if not (adds_bos(tokenizer) if bos == "auto" else bos):
        return []
    try:
        return [prefix_token(tokenizer)]
    except InputError:
        raise InputError(f"tasks.{name}.bos: true needs a BOS or an EOS token, and the tokenizer has neither") from None


def encode(tokenizer: Any, text: str, bos: bool | str = "auto") -> list[int]:
    """Return the token ids of `text` after the tokenizer's own special tokens (BOS for Llama, none for GPT-2).

    bos: True puts the prefix token before the text if the tokenizer does not, and False leaves all special tokens out.
    A text that already begins with the prefix token gets no second one. If the tokenizer appends EOS, it is removed,
    because no text could follow it.
    """
    if bos is True:
        tokens, first = encode(tokenizer, text), prefix_token(tokenizer)
        return tokens if tokens[:1] == [first] else [first, *tokens]
    prefix = tokenizer.bos_token or tokenizer.eos_token
    special = bos == "auto" and not (prefix and text.startswith(prefix))
    tokens = list(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    eos = tokenizer.eos_token
    if special and len(tokens) > 1 and eos and tokens[-1] == tokenizer.eos_token_id and not text.endswith(eos):
        tokens.pop()
    return tokens


def encode_pair(
    tokenizer: Any, context: str, continuation: str, bos: bool | str = "auto"
) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation, as `TemplateLM._encode_pair` of lm-eval does.

    bos: as in `encode`; lm-eval's is "auto".

    Spaces at the end of the context move to the continuation. Both are encoded as one text, which is cut after as many
    tokens as the context alone has. If the context is empty, it becomes the prefix token.
    Raises InputError if the context or the continuation has no token.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    if context:
        first = encode(tokenizer, context, bos)
        pair = first, encode(tokenizer, context + continuation, bos)[len(first) :]
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


# Settings of a tokenizer that its call or its caller may have changed, so that they are read from the object.
OF_TEXTS = (
    "clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space", "add_bos_token", "add_eos_token",
)
# Settings that change no token: places, padding and cutting (both are done here), and chats.
NOT_OF_TEXTS = (
    "name_or_path", "backend", "tokenizer_class", "auto_map", "model_max_length", "chat_template", "is_local",
    "local_files_only", "trust_remote_code", "added_tokens_decoder", "padding_side", "truncation_side",
    "tokenizer_file",
)


def settings_of(tokenizer: Any) -> dict[str, Any]:
    """Return what a tokenizer's tokens depend on, apart from the content of its backend or of its files."""
    named = getattr(tokenizer, "init_kwargs", None) or {}
    without = {*NOT_OF_TEXTS, *(getattr(tokenizer, "vocab_files_names", None) or {})}
    settings = {key: getattr(tokenizer, key, named.get(key)) for key in {*named, *OF_TEXTS}
                if key not in without and not key.startswith("_")}
    return {
        "class": _class_of(tokenizer),
        "settings": {key: value if isinstance(value, (bool, int, float, list, dict)) else str(value)
                     for key, value in settings.items() if value is not None},
        "special": {key: str(value) for key, value in getattr(tokenizer, "special_tokens_map", {}).items()},
        "special_ids": sorted(getattr(tokenizer, "all_special_ids", ())),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of everything of a tokenizer on which the tokens of a text and the text of tokens depend."""
    found = settings_of(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        return digest_of({**found, "content": {**content, "truncation": None, "padding": None}})
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return digest_of({
        **found, "added": {str(key): repr(value) for key, value in added.items()}, "files": _vocabulary_of(tokenizer),
    })


def _vocabulary_of(tokenizer: Any) -> dict[str, bytes]:
    """Return the content of the files of a slow tokenizer, which it writes from what it has in memory."""
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        if hasattr(tokenizer, "save_vocabulary"):
            tokenizer.save_vocabulary(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _class_of(tokenizer: Any) -> Any:
    # The version of transformers is left out: what it says of a tokenizer is in its content.
    kind = type(tokenizer)
    return kind.__qualname__ if kind.__module__.startswith("transformers.") else kind


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


def pair_request(
    key: str, task: TaskContext, context: str, continuation: str, bos: bool | str = "auto"
) -> Request:
    """Return the `request` of the tokens that `encode_pair` gives for two texts.

    bos: as in `encode`. key: the beginning of messages, such as "tasks.lambada row 3". Raises InputError as the other
    two do.
    """
    try:
        return request(*encode_pair(task.tokenizer, context, continuation, bos), task.context_length)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
