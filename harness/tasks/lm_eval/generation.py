"""Tasks that generate text (GSM8K): greedy decoding in left-padded batches, then the filters and metrics of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, ExampleScores, TaskContext
from harness.models.loading import LoadedModel
from harness.tasks import generation, tokenization
from harness.tasks.evaluate_metrics import MetricSet
from harness.tasks.fingerprint import Describer
from harness.tasks.generation import Decoding
from harness.tasks.lm_eval import metrics as lm_eval_metrics
from harness.tasks.lm_eval.part import Part

DEFAULT_NEW_TOKENS = 256  # the default of max_gen_toks in HFLM
# The names that lm-eval has for one setting; the first that is given counts.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


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
    prompts = generation.encoded_prompts(
        context.tokenizer, [instance.args[0] for doc in docs for instance in doc],
        context.context_length - decoding.new_tokens,
    )
    references = [lm_eval_metrics.target(task, doc[0].doc) for doc in docs] if metrics else []
    metrics.rehearse(references)

    def measure(loaded: LoadedModel, division: Division, batch_share: float) -> dict[str, ExampleScores]:
        generation.require_generation(loaded.model, context.generation)
        batch_tokens = int(context.generation_tokens * batch_share)
        texts = generation.written_texts(loaded, prompts, decoding, division, batch_tokens)
        found = lm_eval_metrics.example_scores(task, lm_eval_metrics.values(task, docs, texts), part.by_metric)
        for filter_name, answers in lm_eval_metrics.filtered_answers(docs).items() if metrics else ():
            for metric, scores in metrics.scores(answers, references).items():
                found[lm_eval_metrics.behind(metric, filter_name)] = scores
        return found

    how = {
        "decoding": "greedy", "max_gen_toks": decoding.new_tokens, "until": list(decoding.stops),
        **Describer().plain(decoding.extra), "generation": dict(context.generation),
        "batch_tokens": context.generation_tokens, "tokenizer": tokenization.tokenizer_digest(context.tokenizer),
    }  # fmt: skip
    ids = [str(i) for i in range(len(docs))]
    return DirectTask(name, {**protocol, **how, **metrics.protocol()}, ids, measure, inputs=prompts)


def _decoding(generation_kwargs: Mapping[str, Any]) -> Decoding:
    """Return the decoding that the generation_kwargs of lm-eval mean."""
    settings = dict(generation_kwargs)
    until = settings.pop("until", None) or []
    given = [settings.pop(key) for key in NEW_TOKENS if key in settings]
    new_tokens = next((int(value) for value in given if value is not None), DEFAULT_NEW_TOKENS)
    for key in ("do_sample", "temperature"):
        settings.pop(key, None)
    return Decoding(tuple([until] if isinstance(until, str) else until), new_tokens, settings)
