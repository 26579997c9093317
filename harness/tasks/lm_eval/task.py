"""Any task of lm-evaluation-harness: its prompts and its metrics, with the log-likelihoods of our scoring pass.

The tokens are those of HFLM of lm-eval: spaces at the end of a context move to the continuation, both are encoded as
one text that is then cut, an empty context is the prefix token, and a text that is too long loses its first tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.optional import require
from harness.tasks import tokenization
from harness.tasks.chat import renderer
from harness.tasks.clusters import by_column, cluster_numbers
from harness.tasks.evaluate_metrics import MetricSet
from harness.tasks.lm_eval import generation, identity, index
from harness.tasks.lm_eval import metrics as lm_eval_metrics
from harness.tasks.lm_eval.part import Part
from harness.tasks.lm_eval.settings import LmEvalSettings

SCORED = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")


@dataclass(kw_only=True)
class LmEvalTask(LmEvalSettings):
    """A task, group or tag of lm-evaluation-harness. task: its name there."""

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one example for each document.

        Metrics have the names of lm-eval: "acc" or, after a filter, "exact_match,strict-match". A task that generates
        text also has those of `metrics`, which compare the text after each filter with the task's own target.
        A group or tag becomes one task with the metrics "<subtask>/acc" and "<group>/acc", and with "acc" if the group
        itself states how its tasks are averaged. A metric that has no value for each example is left out, and the
        protocol lists it.

        Raises InputError if lm-eval is not installed, the model is not causal or has no tokenizer, the task or its data
        cannot be found, there are fewer few-shot examples than asked for or the task allows none, no metric can be
        kept, or the task's own code raises an exception.
        """
        require("lm_eval", "tasks", f"tasks.{name}: kind lm_eval")
        tokenization.require_tokenizer(name, context.tokenizer)
        if context.kind != "causal":
            raise InputError(f"tasks.{name}: lm-eval's tasks need a causal language model; remove the task")
        found = index.load(name, self)
        for task in found.tasks.values():
            _check(name, task, self, alone=found.single)
        parts = [_part(name, task_name, task, self, context) for task_name, task in found.tasks.items()]
        protocol = identity.protocol(self, parts, found.groups) | self.chat_protocol(context)
        if found.single and parts[0].task.OUTPUT_TYPE == "generate_until":
            clusters = cluster_numbers(f"tasks.{name}", self.cluster_column, _rows(parts)) if self.metrics else None
            metrics = MetricSet(f"tasks.{name}", self.metrics, parts[0].by_metric, clusters)
            written = generation.prepare(name, parts[0], metrics, protocol, context)
            return by_column(written, f"tasks.{name}", self.cluster_column, _rows(parts))
        if self.metrics:
            raise InputError(
                f"tasks.{name}.metrics: {self.task!r} scores given answers and has lm-eval's metrics; metrics of"
                " Hugging Face evaluate are for tasks that generate text, and for kind classification and seq2seq"
            )

        requests = [request for part in parts for request in part.requests]
        owners, first = [], 0
        for part in parts:
            owners.append(first + _documents_of_requests(part))
            first += len(part.docs)
        ids = [f"{i}" if found.single else f"{part.name}/{i}" for part in parts for i in range(len(part.docs))]

        if self.cluster_column is None and len(parts) > 1:
            protocol["clusters"] = "subtasks"

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            loglikelihood, greedy = scores.request_logprob(), scores.request_greedy()
            results, start = [], 0
            for part in parts:
                stop = start + len(part.requests)
                results.append(_results(part, loglikelihood[start:stop], greedy[start:stop]))
                start = stop
            return results[0] if found.single else _combined(parts, results, found.groups, self.task)

        task = ScoredTask(name, protocol, requests, ids, measure, example_of=np.concatenate(owners))
        return by_column(task, f"tasks.{name}", self.cluster_column, _rows(parts))


def _check(name: str, task: Any, asked: LmEvalSettings, alone: bool) -> None:
    """Raise InputError if the task cannot be scored; set the number and the seed of its few-shot examples.

    alone: whether the task was named itself, and not as a part of a group or tag.
    """
    key, label = f"tasks.{name}", task.config.task
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{key}.task: {label!r} shows images or sound; only tasks of text can be scored")
    if task.OUTPUT_TYPE not in (*SCORED, "generate_until"):
        raise InputError(f"{key}.task: {label!r} has output type {task.OUTPUT_TYPE!r}; use one of {', '.join(SCORED)}")
    if task.OUTPUT_TYPE == "generate_until" and not alone:
        raise InputError(f"{key}.task: {asked.task!r} holds {label!r}, which generates text; name its tasks singly")
    stated = task.config.num_fewshot
    if asked.num_fewshot and (stated == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"):
        raise InputError(f"{key}.num_fewshot: {label!r} takes no examples; set it to null or 0")
    task.set_config("num_fewshot", (stated or 0) if asked.num_fewshot is None else asked.num_fewshot)
    task.set_fewshot_seed(asked.seed)


def _part(name: str, task_name: str, task: Any, asked: LmEvalSettings, context: TaskContext) -> Part:
    key = f"tasks.{name}"
    try:
        definition = identity.definition(task)
        docs = lm_eval_metrics.documents(task, asked.limit, _chat(key, asked, context))
        if not docs:
            raise InputError(f"{key}: {task_name!r} has no documents")
        lm_eval_metrics.check_answers(key, task, docs)
        types = {instance.request_type for doc in docs for instance in doc}
        if "generate_until" in types and len(types) > 1:
            raise InputError(f"{key}.task: {task_name!r} both generates and scores; only one of them can be measured")
        dummies = [_dummy(instance.request_type) for instance in docs[0]]
        by_metric = lm_eval_metrics.aggregations(task, lm_eval_metrics.values(task, docs[:1], dummies))
    except InputError:
        raise
    except Exception as error:  # templates and the code of a task may raise anything
        reason = index.reason(error)
        raise InputError(f"{key}: lm-eval cannot build the prompts of {task_name!r}: {reason}") from error
    if not any(by_metric.values()) and not asked.metrics:
        left_out = ", ".join(by_metric)
        raise InputError(f"{key}.task: {task_name!r} has no metric that is a mean over its documents, only {left_out}")
    requests: list[Request] = []
    offsets = [0]
    if types != {"generate_until"}:
        context = _remembering_contexts(context)
        for doc in docs:
            for instance in doc:
                requests += _requests(key, instance, context)
                offsets.append(len(requests))
        if not requests:
            raise InputError(f"{key}: the documents of {task_name!r} hold no text to score")
    return Part(task_name, task, definition, docs, by_metric, requests, offsets)


def _chat(key: str, asked: LmEvalSettings, context: TaskContext) -> dict[str, Any]:
    """Return the arguments by which lm-eval asks in a chat template, or nothing."""
    if not asked.chat:
        return {}
    return {"system_instruction": asked.system_prompt, "apply_chat_template": True,
            "fewshot_as_multiturn": asked.fewshot_as_turns, "chat_template": renderer(key, context)}


def _documents_of_requests(part: Part) -> np.ndarray:
    """Return the index of the document to which each of the R requests belongs, int64 [R]."""
    of_instance = np.arange(len(part.docs)).repeat([len(doc) for doc in part.docs])
    return of_instance.repeat(np.diff(part.offsets))


def _rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return the document of each example. In a group, a document of one subtask is in no cluster of another."""
    rows = [(part.name, doc[0].doc) for part in parts for doc in part.docs]
    if len(parts) == 1:
        return [row for _, row in rows]
    return [{column: f"{name}/{value}" for column, value in row.items()} for name, row in rows]


def _dummy(request_type: str) -> Any:
    return {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}[request_type]


def _remembering_contexts(context: TaskContext) -> TaskContext:
    """Return the context with a tokenizer that remembers the last texts, as the choices of a question share one."""
    tokenizer = context.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_id")}
    return replace(context, tokenizer=SimpleNamespace(encode=functools.lru_cache(8)(tokenizer.encode), **special))


def _requests(key: str, instance: Any, context: TaskContext) -> list[Request]:
    where = f"{key} document {instance.doc_id}"
    if instance.request_type == "loglikelihood":
        return [tokenization.pair_request(where, context, *instance.args[:2])]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        tokenization.encode(context.tokenizer, instance.args[0]), tokenization.prefix_token(context.tokenizer),
        context.context_length, 1,
    )
    disjoint = [make_disjoint_window(window) for window in windows]
    return [tokenization.request(before, scored, context.context_length) for before, scored in disjoint]


def _results(part: Part, loglikelihood: np.ndarray, greedy: np.ndarray) -> dict[str, ExampleScores]:
    instances = [instance for doc in part.docs for instance in doc]
    answers = [
        (float(loglikelihood[start]), bool(greedy[start])) if instance.request_type == "loglikelihood"
        else float(loglikelihood[start:stop].sum())
        for instance, start, stop in zip(instances, part.offsets, part.offsets[1:])
    ]
    found = lm_eval_metrics.values(part.task, part.docs, answers)
    return lm_eval_metrics.example_scores(part.task, found, part.by_metric)


def _combined(
    parts: Sequence[Part], results: Sequence[dict[str, ExampleScores]], groups: Sequence[Any], top: str
) -> dict[str, ExampleScores]:
    """Return the metrics of the parts and of the groups that hold them, over the documents of all parts.

    top: the name that was asked for.
    """
    starts = np.cumsum([0, *(len(part.docs) for part in parts)])
    metrics: dict[str, ExampleScores] = {}
    for i, (part, found) in enumerate(zip(parts, results)):
        for metric, scores in found.items():
            metrics[f"{part.name}/{metric}"] = _placed(starts, {i: (scores, 1.0)})
    of_part = {part.name: i for i, part in enumerate(parts)}
    for group in groups:
        inside = [of_part[task.config.task] for task in group.get_all_tasks() if task.config.task in of_part]
        for aggregate in group.aggregate_metric_list or []:
            names = {metric for i in inside for metric in results[i]}
            for metric in sorted(names & _filtered(aggregate, names)):
                members = {i: results[i][metric] for i in inside if metric in results[i]}
                # A mean of the perplexities of tasks is not transform(sum of scores / sum of weights).
                if all(scores.transform == "identity" for scores in members.values()):
                    label = metric if group.name == top else f"{group.name}/{metric}"
                    metrics[label] = _placed(starts, {
                        i: (scores, (len(scores.score) if aggregate.weight_by_size else 1.0) / scores.weight.sum())
                        for i, scores in members.items()
                    })
    return metrics


def _filtered(aggregate: Any, names: Iterable[str]) -> set[str]:
    """Return the metrics that an entry of aggregate_metric_list means. Without a filter_list it means any filter."""
    if aggregate.filter_list is None:
        return {name for name in names if name.split(",")[0] == aggregate.metric}
    return {aggregate.metric if name == "none" else f"{aggregate.metric},{name}" for name in aggregate.filter_list}


def _placed(starts: np.ndarray, members: Mapping[int, tuple[ExampleScores, float]]) -> ExampleScores:
    """Return the scaled scores of some parts over the documents of all parts; score and weight are 0 in the others.

    starts: the index of the first document of each part. members: index of a part -> its scores and the scale.
    """
    score, weight = np.zeros(starts[-1]), np.zeros(starts[-1])
    for i, (scores, scale) in members.items():
        score[starts[i] : starts[i + 1]] = scores.score * scale
        weight[starts[i] : starts[i + 1]] = scores.weight * scale
    first = next(iter(members.values()))[0]
    bounds = {scores.bounds for scores, _ in members.values()}
    common = first.bounds if len(bounds) == 1 else None
    # The documents of one subtask are independent as examples of itself, and a cluster of a group of subtasks.
    clusters = np.arange(len(starts) - 1).repeat(np.diff(starts)) if len(members) > 1 else None
    return ExampleScores(score, weight, first.transform, first.higher_is_better, common, clusters)
