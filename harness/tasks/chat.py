"""The chat template of an aligned model: a prompt becomes the user's turn, and the answer begins the assistant's turn.

The text is that of `apply_chat_template` of the tokenizer, with the beginning of the assistant's turn at its end. It
holds all special tokens, so that none is added when it is encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import InputError, one_line, wrong
from harness.evaluation.requests import Request, TaskContext
from harness.tasks import tokenization
from harness.tasks.settings import Task

Message = Mapping[str, str]


@dataclass
class ChatTask(Task):
    """A task of text that may be asked in the chat template of the model."""

    chat: bool = False  # whether prompts are asked in the model's chat template
    system_prompt: str | None = None  # the text of the system's turn; null: what the template itself does without one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system_prompt is not None and not self.chat:
            raise wrong("system_prompt", self.system_prompt, "only chat=true reads it")
        if self.chat and getattr(self, "bos", "auto") != "auto":
            raise wrong("bos", getattr(self, "bos", "auto"), "the chat template says where BOS is; leave it at auto")

    def ask(
        self, key: str, context: TaskContext, prompt: str, answer: str, bos: bool | str = "auto"
    ) -> Request:
        """Return the request for an answer to a prompt. Both are without space at the place where they meet.

        Without a chat template a space joins them. With it the answer is the beginning of the assistant's turn.
        key: the beginning of messages, such as "tasks.lambada row 3". bos: as in `tokenization.pair_request`; a chat
        template has a BOS of its own. Raises InputError as `encode_pair` and `tokenization.request`.
        """
        if not self.chat:
            return tokenization.pair_request(key, context, prompt, " " + answer, bos)
        pair = self.encode_pair(key, context, prompt, answer)
        try:
            return tokenization.request(*pair, context.context_length)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None

    def encode_pair(self, key: str, context: TaskContext, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt in the chat template, and those of the answer after it. Raises InputError."""
        text = self.render(key, context, prompt)
        first = encode(context.tokenizer, text)
        answered = encode(context.tokenizer, text + answer)[len(first) :]
        if not answered:
            raise InputError(f"{key}: no tokens to score for {answer!r} after {text[-40:]!r}")
        return first, answered

    def render(self, key: str, context: TaskContext, prompt: str) -> str:
        """Return a prompt in the chat template, up to the beginning of the assistant's turn. Raises InputError."""
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return renderer(key, context)([*system, {"role": "user", "content": prompt}])

    def chat_protocol(self, context: TaskContext) -> dict[str, Any]:
        """Return what the protocol says of the template, which is nothing if there is none."""
        if not self.chat:
            return {}
        return {"chat": {"template": template_digest(context.tokenizer), "system_prompt": self.system_prompt}}


def renderer(key: str, context: TaskContext) -> Callable[..., str]:
    """Return a function from messages to their text in the chat template of a model's tokenizer.

    The function is called as `apply_chat_template` of lm-eval's models is. key: the beginning of messages, such as
    "tasks.lambada". Raises InputError if the tokenizer has no template, or the template refuses the messages.
    """
    task, tokenizer = key.split(" ")[0], context.tokenizer
    if context.kind != "causal":
        raise InputError(f"{task}.chat: true is wrong; only causal language models chat")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{task}.chat: true is wrong; the model's tokenizer has no chat template; use chat=false, or"
                         " the tokenizer of an aligned model")

    def render(messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program, which may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"{task}.chat: the chat template refuses the turns {roles} ({one_line(error)}); leave"
                             " system_prompt unset, or use chat=false") from error
        return str(text)

    return render


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that a chat template made, which holds all special tokens already."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def template_digest(tokenizer: Any) -> str:
    """Return a digest of the chat template of a tokenizer."""
    return hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8).hexdigest()
