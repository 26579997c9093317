"""Tasks that generate text (GSM8K): greedy decoding in left-padded batches, then the filters and metrics of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, ExampleScores, TaskContext
from harness.models.description import generation_values
from harness.models.loading import LoadedModel
from harness.tasks import tokenization
from harness.tasks.fingerprint import Describer
from harness.tasks.generation import BATCH_TOKENS, generated_in_batches, padding_of, refuse_nan
from harness.tasks.lm_eval import metrics as lm_eval_metrics

if TYPE_CHECKING:
    from harness.tasks.evaluate_metrics import MetricSet
    from harness.tasks.lm_eval.task import Part

DEFAULT_NEW_TOKENS = 256  # the default of max_gen_toks in HFLM
# The names that lm-eval has for one setting; the first that is given counts.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Decoding:
    """How a model writes a text: greedily, until an end is reached.

    stops: a text ends before the first of these strings. new_tokens: the largest number of tokens of a text.
    extra: further arguments of `generate` of transformers.
    """

    stops: Sequence[str]
    new_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    name: str, part: Part, metrics: MetricSet, protocol: Mapping[str, Any], context: TaskContext
) -> DirectTask:
    """Return the prepared task of `LmEvalTask.prepare` if the task generates text, with one generation per Instance.

    metrics: metrics of Hugging Face evaluate, in addition to the task's own. protocol: the entries of every task.
    Raises InputError if the task samples, its answers leave no room for a prompt, or a metric cannot be computed.
    """
    task, docs = part.task, part.docs
    settings = dict(docs[0][0].args[1])
    label, sample = task.config.task, settings.get("do_sample")
    if sample or (sample is None and float(settings.get("temperature") or 0) > 0):
        raise InputError(f"tasks.{name}: {label!r} samples its answers; only greedy decoding is measured here")
    decoding = _decoding(settings)
    if not 0 < decoding.new_tokens < context.context_length:
        raise InputError(
            f"tasks.{name}: {label!r} generates {decoding.new_tokens} tokens, which leaves no room for a prompt in the"
            f" model's context of {context.context_length}; set generation_kwargs.max_gen_toks in a task YAML of your"
            " own"
        )
    prompts = _prompts(
        context.tokenizer, [instance.args[0] for doc in docs for instance in doc],
        context.context_length - decoding.new_tokens,
    )
    references = [lm_eval_metrics.target(task, doc[0].doc) for doc in docs] if metrics else []
    metrics.rehearse(references)

    def measure(loaded: LoadedModel, division: Division, batch_share: float) -> dict[str, ExampleScores]:
        require_generation(loaded.model, context.generation)
        texts = _texts(loaded, prompts, decoding, division, int(BATCH_TOKENS * batch_share))
        found = lm_eval_metrics.example_scores(task, lm_eval_metrics.values(task, docs, texts), part.by_metric)
        for filter_name, answers in lm_eval_metrics.filtered_answers(docs).items() if metrics else ():
            for metric, scores in metrics.scores(answers, references).items():
                found[lm_eval_metrics.behind(metric, filter_name)] = scores
        return found

    how = {
        "decoding": "greedy", "max_gen_toks": decoding.new_tokens, "until": list(decoding.stops),
        **Describer().plain(decoding.extra), "generation": dict(context.generation), "batch_tokens": BATCH_TOKENS,
        "tokenizer": tokenization.tokenizer_digest(context.tokenizer),
    }  # fmt: skip
    ids = [str(i) for i in range(len(docs))]
    return DirectTask(name, {**protocol, **how, **metrics.protocol()}, ids, measure, inputs=prompts)


def require_generation(model: Any, known: Mapping[str, Any]) -> None:
    """Raise InputError if a model would not generate with the settings that the id of its cells depends on."""
    present = generation_values(getattr(model, "generation_config", None))
    other = sorted(key for key in {*present, *known} if present.get(key) != known.get(key))
    if other:
        raise InputError(
            f"model: its generation_config has another {other[0]} ({present.get(other[0])!r}) than when the task was"
            f" prepared ({known.get(other[0])!r}); prepare the task again"
        )


def _decoding(generation_kwargs: Mapping[str, Any]) -> Decoding:
    """Return the decoding that the generation_kwargs of lm-eval mean."""
    settings = dict(generation_kwargs)
    until = settings.pop("until", None) or []
    given = [settings.pop(key) for key in NEW_TOKENS if key in settings]
    new_tokens = next((int(value) for value in given if value is not None), DEFAULT_NEW_TOKENS)
    for key in ("do_sample", "temperature"):
        settings.pop(key, None)
    return Decoding(tuple([until] if isinstance(until, str) else until), new_tokens, settings)


def continuations(
    loaded: Any, contexts: Sequence[str], decoding: Decoding, division: Division | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[str]:
    """Return the greedy continuation of each context, as HFLM generates it. The EOS token also ends a text.

    loaded: an object with model, tokenizer, context_length and device. A context loses its first tokens if it would
    leave no room for the new ones. division: the processes that share the batches. batch_tokens: as BATCH_TOKENS.
    Raises FloatingPointError if the model's outputs are NaN.
    """
    prompts = _prompts(loaded.tokenizer, contexts, loaded.context_length - decoding.new_tokens)
    return _texts(loaded, prompts, decoding, division or Division(), batch_tokens)


def _prompts(tokenizer: Any, contexts: Sequence[str], room: int) -> list[list[int]]:
    return [tokenization.encode(tokenizer, text)[-room:] for text in contexts]


def _texts(
    loaded: Any, prompts: Sequence[list[int]], decoding: Decoding, division: Division, batch_tokens: int
) -> list[str]:
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
