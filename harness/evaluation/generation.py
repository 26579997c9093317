"""Tasks that generate text (GSM8K): greedy decoding in left-padded batches, then lm-eval's filters and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from harness.errors import InputError
from harness.evaluation import lm_eval_metrics, tokenization
from harness.evaluation.division import Division
from harness.evaluation.requests import ExampleScores, PreparedTask, TaskContext

BATCH_TOKENS = 16384  # prompts and generated text of one batch, padded
DEFAULT_NEW_TOKENS = 256  # as HFLM's max_gen_toks
# lm-eval's names for one setting, in its order of precedence
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def prepare(
    name: str, task: Any, docs: Sequence[Sequence[Any]], by_metric: Mapping[str, str], protocol: Mapping[str, Any],
    context: TaskContext,
) -> PreparedTask:
    """The generating path of `lm_eval_tasks.prepare`: lm-eval Instances per document become one generation each.

    Raises InputError: a task that samples, or one whose answers leave no room for a prompt.
    """
    settings = dict(docs[0][0].args[1])
    label, sample = task.config.task, settings.get("do_sample")
    if sample or (sample is None and float(settings.get("temperature") or 0) > 0):
        raise InputError(f"tasks.{name}: {label!r} samples its answers; only greedy decoding is measured here")
    stops, new_tokens, extra = _settings(settings)
    if not 0 < new_tokens < context.context_length:
        raise InputError(
            f"tasks.{name}: {label!r} generates {new_tokens} tokens, which leaves no room for a prompt in the model's"
            f" context of {context.context_length}; set generation_kwargs.max_gen_toks in a task YAML of your own"
        )
    contexts = [instance.args[0] for doc in docs for instance in doc]

    def generate(loaded: Any, division: Division | None = None, batch_share: float = 1.0) -> dict[str, ExampleScores]:
        batch_tokens = int(BATCH_TOKENS * batch_share)
        texts = continuations(loaded, contexts, stops, new_tokens, extra, division, batch_tokens)
        return lm_eval_metrics.example_scores(task, lm_eval_metrics.values(task, docs, texts), dict(by_metric))

    decoding = {"decoding": "greedy", "max_gen_toks": new_tokens, "until": list(stops), **extra}
    ids = [str(i) for i in range(len(docs))]
    return PreparedTask(name, {**protocol, **decoding}, [], ids, None, generate=generate)


def _settings(settings: dict[str, Any]) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """lm-eval's generation_kwargs as (strings that end a text, most new tokens, what `generate` takes besides)."""
    until = settings.pop("until", None) or []
    given = [settings.pop(key) for key in NEW_TOKENS if key in settings]
    new_tokens = next((int(value) for value in given if value is not None), DEFAULT_NEW_TOKENS)
    for key in ("do_sample", "temperature"):
        settings.pop(key, None)
    return tuple([until] if isinstance(until, str) else until), new_tokens, settings


def continuations(
    loaded: Any, contexts: Sequence[str], stops: Sequence[str], new_tokens: int,
    extra: Mapping[str, Any] | None = None, division: Division | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Greedy continuations of texts, each cut before the first of `stops` or the EOS token, as HFLM generates them.

    loaded: has model, tokenizer, context_length and device. A context that leaves no room for `new_tokens` loses tokens
    on the left. division: the processes that generate them together, some batches each. Raises FloatingPointError where
    the model's outputs are not numbers.
    """
    tokenizer = loaded.tokenizer
    room = loaded.context_length - new_tokens
    prompts = [tokenization.encode(tokenizer, text)[-room:] for text in contexts]
    eos = tokenizer.eos_token_id
    stops = [*stops, *([tokenizer.decode([eos])] if eos is not None else [])]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = []
    while order:
        count = max(1, batch_tokens // (len(prompts[order[0]]) + new_tokens))
        batches.append(order[:count])
        order = order[count:]
    division = division or Division()

    def own_texts() -> dict[int, str]:
        texts = {}
        for members in (batches[b] for b in division.own(len(batches))):
            answers = _generate(loaded, [prompts[i] for i in members], stops, new_tokens, extra or {})
            for i, tokens in zip(members, answers):
                texts[i] = _cut(tokenizer.decode(tokens, skip_special_tokens=True), stops)
        return texts

    texts = {i: text for part in division.together("generating", own_texts) for i, text in part.items()}
    return [texts[i] for i in range(len(prompts))]


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


@torch.inference_mode()
def _generate(
    loaded: Any, prompts: Sequence[Sequence[int]], stops: Sequence[str], new_tokens: int, extra: Mapping[str, Any]
) -> list[list[int]]:
    """New tokens of a batch of prompts, the longest first."""
    tokenizer, width = loaded.tokenizer, len(prompts[0])
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    pad = next((token for token in known if token is not None), 0)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generated = loaded.model.generate(
        input_ids=input_ids.to(loaded.device), attention_mask=mask.to(loaded.device), max_new_tokens=new_tokens,
        do_sample=False, use_cache=True, pad_token_id=pad, stopping_criteria=[_stopping(tokenizer, stops, width)],
        logits_processor=[_refuse_nan], **extra,
    )
    return generated[:, width:].tolist()


def _stopping(tokenizer: Any, stops: Sequence[str], width: int) -> Callable:
    """A criterion that ends each row at its own first stop, so that a batch ends with its last row."""
    # two tokens more than a stop has, because a text may be cut into tokens in more than one way
    tail = 2 + max((len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops), default=0)

    def stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = tokenizer.batch_decode(input_ids[:, max(width, input_ids.shape[1] - tail) :])
        found = np.array([any(stop in text for stop in stops if stop) for text in texts], dtype=bool)
        return torch.from_numpy(found).to(input_ids.device)

    return stopped


def _refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if scores.isnan().any():
        raise FloatingPointError("the model's outputs are not numbers (NaN), so no text can be generated")
    return scores
