"""The registry of the kinds of tasks, and the preparation of the tasks of a study for one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from harness.errors import InputError, SettingError, wrong
from harness.evaluation.requests import PreparedTask, ScoredTask, TaskContext
from harness.registry import Registry
from harness.settings.plain_values import NAME_RULE, is_name
from harness.settings.validation import chosen
from harness.tasks import tokenization
from harness.tasks.fingerprint import OURS, digest_of
from harness.tasks.settings import Task

# A kind is imported only when a study uses it, because the import of lm_eval alone takes seconds.
TASKS: Registry[type[Task]] = Registry("harness.tasks", "a kind of task", {
    "text": "harness.tasks.text:TextTask",
    "recall": "harness.tasks.recall:RecallTask",
    "recall_probes": "harness.tasks.recall_probes:RecallProbesTask",
    "ioi": "harness.tasks.ioi:IoiTask",
    "factual": "harness.tasks.factual:FactualTask",
    "lambada": "harness.tasks.lambada:LambadaTask",
    "blimp": "harness.tasks.blimp:BlimpTask",
    "bigbench": "harness.tasks.bigbench:BigbenchTask",
    "humaneval": "harness.tasks.humaneval:HumanevalTask",
    "ruler": "harness.tasks.ruler:RulerTask",
    "lm_eval": "harness.tasks.lm_eval.task:LmEvalTask",
    "masked": "harness.tasks.masked:MaskedTask",
    "classification": "harness.tasks.classification:ClassificationTask",
    "label_words": "harness.tasks.label_words:LabelWordsTask",
    "seq2seq": "harness.tasks.seq2seq:Seq2SeqTask",
})  # fmt: skip

CALLED = {"causal": "a causal language model", "masked": "a masked encoder", "seq2seq": "an encoder-decoder"}


def task_of(values: Any, name: str = "") -> Task:
    """Return the settings of one task from plain values with the key `kind`. A Task is returned unchanged.

    name: the name of the task, for messages. Raises SettingError for an unknown kind, an unknown key or a wrong value.
    """
    if isinstance(values, Task):
        return values
    if not isinstance(values, Mapping):
        raise wrong("", values, f"it must be a task's settings, for example +tasks.{name}.kind=text")
    return chosen(TASKS, "kind", values)


def require_name(name: str) -> None:
    """Raise SettingError if this cannot be the name of a task in a study."""
    if not is_name(name):
        raise wrong("", name, f"it is the name of a task; {NAME_RULE}")


def tasks_of(values: Any) -> dict[str, Task]:
    """Return the settings of all tasks of a study by name. Raises SettingError as `task_of` does."""
    if not isinstance(values, Mapping):
        raise wrong("", values, "it must be names with the settings of tasks")
    tasks = {}
    for name, one in values.items():
        require_name(str(name))
        try:
            tasks[str(name)] = task_of(one, str(name))
        except SettingError as error:
            raise error.below(str(name)) from None
    return tasks


def wants_classifier(tasks: Mapping[str, Task]) -> bool:
    """Return whether the model of a study must be loaded with a classification head."""
    return any("classification" in task.measured_on for task in tasks.values())


def check_kinds(tasks: Mapping[str, Task], model_config: Any, kind: str) -> None:
    """Raise InputError if this type of model cannot answer one of the tasks. No weights are needed.

    model_config: the config of transformers. kind: the kind of the model's family, "causal", "masked" or "seq2seq".
    """
    classifier = wants_classifier(tasks)
    if classifier:
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

        if type(model_config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise InputError(f"tasks: kind classification needs a model with a classification head; transformers has"
                             f" none for {model_config.model_type}")
    for name, task in tasks.items():
        if ("classification" if classifier else kind) in task.measured_on:
            continue
        if classifier:
            raise InputError(
                f"tasks.{name}: kind {task.kind} cannot be measured in one study with kind classification, which loads"
                " the model with another head; run two studies"
            )
        usable = [other for other, one in TASKS.items() if kind in one.measured_on]
        use = [*usable, "classification"] if kind == "masked" else usable
        raise InputError(
            f"tasks.{name}: kind {task.kind} cannot be measured on a {model_config.model_type} model, which is"
            f" {CALLED[kind]}; use a task of kind {' or '.join(use) if len(use) < 3 else ', '.join(use)}"
        )


def prepare_tasks(tasks: Mapping[str, Task], context: TaskContext) -> dict[str, PreparedTask]:
    """Return every task of a study prepared for one model. Raises InputError if data or settings do not fit it."""
    return {name: prepare_task(name, task, context) for name, task in tasks.items()}


def prepare_task(name: str, task: Task, context: TaskContext) -> PreparedTask:
    """Return one task prepared for one model. The code of a kind of another package is in its protocol.

    Raises InputError if its data or settings do not fit the model.
    """
    prepared = task.prepare(name, context)
    if isinstance(prepared, ScoredTask):
        # The targets of a classifier are classes.
        asked = "tokens source" if "classification" in task.measured_on else "tokens source targets"
        fed = [getattr(request, part) for request in prepared.requests for part in asked.split()]
    else:
        fed = list(prepared.inputs)
    for tokens in fed if context.tokenizer is not None else ():
        tokenization.require_embedded(name, tokens, context.model_config)
    if type(task).__module__.split(".")[0] == OURS:
        return prepared
    return dataclasses.replace(prepared, protocol={**prepared.protocol, "code": digest_of(type(task))})
