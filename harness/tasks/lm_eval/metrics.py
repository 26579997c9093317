"""Compute example scores from a model's answers with the filters and metrics of lm-eval.

An aggregation of lm-eval reduces the values of all documents to one number. If that is a ratio of sums, or the
exponential of one, every example keeps its own term, because paired statistics need it. With any other aggregation (F1,
Matthews correlation, BLEU, a function of the task) an example has no score, and the metric is left out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores

# Metrics whose value for a document is between 0 and 1.
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em")


def documents(task: Any, limit: int | None, chat: Mapping[str, Any] | None = None) -> list[list[Any]]:
    """Return the Instances of lm-eval for the first `limit` documents (null: all), one list for each, with prompts.

    chat: arguments of `fewshot_context` by which the prompts are in a chat template; None or empty: plain text. This
    changes the task, and must be called only once for each.
    """
    chat, found = chat or {}, []
    _remember_documents(task)
    with _templates_compiled_once():
        for doc_id, doc in enumerate(itertools.islice(task.task_docs, limit)):
            context = task.fewshot_context(
                doc, num_fewshot=task.config.num_fewshot, gen_prefix=task.doc_to_prefix(doc), **chat
            )
            instances = task.construct_requests(
                doc=doc, ctx=context, metadata=(task.config.task, doc_id, task.config.repeats),
                apply_chat_template=bool(chat), chat_template=chat.get("chat_template"),
            )
            found.append(instances if isinstance(instances, list) else [instances])
    return found


def check_answers(key: str, task: Any, docs: Sequence[list[Any]]) -> None:
    """Raise InputError for the first document without a right answer that can be scored.

    lm-eval counts every answer to such a document as wrong, or gives an empty answer a score like any other.
    key: "tasks.<name>".
    """
    own = task.config.process_results is not None or not hasattr(task, "multiple_input")  # the task's own code scores
    for number, instances in enumerate(docs):
        place, doc = f"{key} document {number}", instances[0].doc
        asked = [instance.args[1] for instance in instances if instance.request_type == "loglikelihood"]
        if not all(isinstance(text, str) and text.strip() for text in asked):
            raise InputError(f"{place}: one of the answers that are scored is empty; fill it in or remove the document")
        if own:
            continue
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if task.OUTPUT_TYPE == "multiple_choice":
            choices = task.doc_to_choice(doc)
            if len(choices) < 2:
                raise InputError(f"{place}: it has {len(choices)} choices; at least two are needed")
            right = gold if isinstance(gold, (list, tuple)) else [gold]
            # The comparison with the range also refuses NaN, and accepts 1.0 of a data frame.
            if not right or not all(one in choices if isinstance(one, str) else one in range(len(choices))
                                    for one in right):
                raise InputError(f"{place}: its right answer {gold!r} is none of its {len(choices)} choices; use a"
                                 " split with labels, or correct it")
        elif isinstance(gold, str) and not gold.strip() and task.OUTPUT_TYPE == "generate_until":
            raise InputError(f"{place}: its right answer is empty; fill it in or remove the document")


@contextlib.contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Keep compiled templates: lm-eval compiles one for every document, which takes most of the time of the prompts."""
    from lm_eval.utils import env

    env.from_string = functools.cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # deletes the attribute of the instance; the class still has the original


def _remember_documents(task: Any) -> None:
    """Make the task render the templates of a document once instead of in every measurement."""
    for method in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        setattr(task, method, _remembering(getattr(task, method)))


def _remembering(render: Callable) -> Callable:
    # The document is kept with its text, so that no other object can get its id.
    known: dict[int, tuple[Any, Any]] = {}

    def rendered(doc: Any, template: Any = None) -> Any:
        if template is not None:
            return render(doc, template)
        if id(doc) not in known:
            known[id(doc)] = doc, render(doc)
        return known[id(doc)][1]

    return rendered


def values(task: Any, docs: Sequence[list[Any]], answers: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    """Return for each (metric, filter) the value that lm-eval gives to each document, or None if it gives none.

    answers: one for each Instance, in order: (log-likelihood, whether all tokens are greedy); the log-likelihood alone
        if it is rolling; or the generated text.
    """
    instances = [instance for doc in docs for instance in doc]
    for instance, answer in zip(instances, answers):
        instance.resps = [answer] * (instance.repeats or 1)
        instance.filtered_resps = {}
    task._instances = instances
    task.apply_filters()
    found: dict[tuple[str, str], list[Any]] = {}
    for name in instances[0].filtered_resps:
        for i, doc in enumerate(docs):
            ordered = sorted(doc, key=lambda instance: instance.idx)
            results = task.process_results(doc[0].doc, [instance.filtered_resps[name] for instance in ordered])
            for metric, value in results.items():
                found.setdefault((metric, name), [None] * len(docs))[i] = value
    return found


def aggregations(task: Any, found: dict[tuple[str, str], list[Any]]) -> dict[str, str]:
    """Return for each metric the name of its aggregation, or "" if examples have no score under it.

    found: what `values` gives for some documents, which shows the type of the values.
    """
    from lm_eval.api import metrics

    known = {getattr(metrics, name): name for name in _TERMS}
    by_metric = {}
    for (metric, _), of_documents in found.items():
        name = known.get(task.aggregation().get(metric, metrics.mean), "")
        try:
            for value in of_documents:
                if value is not None and name:
                    _TERMS[name](value)
        except (TypeError, ValueError, IndexError):
            name = ""
        by_metric[metric] = name
    return by_metric


def example_scores(
    task: Any, found: dict[tuple[str, str], list[Any]], by_metric: dict[str, str]
) -> dict[str, ExampleScores]:
    """Return the ExampleScores of each metric by its name, "acc" or, after a filter, "exact_match,strict-match".

    found: as `values` returns. by_metric: as `aggregations` returns; metrics without an aggregation are left out. The
    score and the weight of a document without a value are 0.
    """
    scores = {}
    for (metric, name), of_documents in found.items():
        aggregation = by_metric.get(metric)
        if not aggregation:
            continue
        terms = [(0.0, 0.0) if value is None else _TERMS[aggregation](value) for value in of_documents]
        score, weight = np.array(terms, dtype=np.float64).T
        scores[behind(metric, name)] = ExampleScores(
            score, weight, "exp" if aggregation.endswith("perplexity") else "identity",
            bool(task.higher_is_better().get(metric, True)),
            (0.0, 1.0) if metric in ACCURACIES and aggregation == "mean" else None,
        )
    return scores


def behind(metric: str, filter_name: str) -> str:
    """Return the name that lm-eval gives to a metric of the answers after a filter."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def filtered_answers(docs: Sequence[list[Any]]) -> dict[str, list[str]]:
    """Return for each filter what it left of the answer to each document. `values` must have run before."""
    return {name: [str(doc[0].filtered_resps[name]) for doc in docs] for name in docs[0][0].filtered_resps}


def target(task: Any, doc: Any) -> str | list[str]:
    """Return the right answer or the list of right answers of a document, as the metrics of lm-eval read it."""
    gold = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        gold = task.doc_to_choice(doc)[gold]
    return [str(one) for one in gold] if isinstance(gold, (list, tuple)) else str(gold)


def _mean(value: Any) -> tuple[float, float]:
    return float(value), 1.0


def _nanmean(value: Any) -> tuple[float, float]:
    return (0.0, 0.0) if math.isnan(value) else (float(value), 1.0)


def _perplexity(value: Any) -> tuple[float, float]:
    return -float(value), 1.0


def _weighted_perplexity(value: Any) -> tuple[float, float]:
    loglikelihood, weight = value
    return -float(loglikelihood), float(weight)


def _bits_per_byte(value: Any) -> tuple[float, float]:
    loglikelihood, weight = value
    return -float(loglikelihood) / math.log(2), float(weight)


def _brier_score(value: Any) -> tuple[float, float]:
    gold, probabilities = value
    return float(np.sum((probabilities - np.eye(len(probabilities))[gold]) ** 2)), 1.0


# Name of an aggregation of lm-eval -> function from the value of a document to its (score, weight).
_TERMS = {
    "mean": _mean,
    "nanmean": _nanmean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits_per_byte,
    "brier_score": _brier_score,
}
