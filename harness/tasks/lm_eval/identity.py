"""What a task of lm-eval is, beside its requests: its definition with the code of its functions, and its documents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.files import hash_file
from harness.tasks.fingerprint import Describer, digest_of
from harness.tasks.lm_eval.part import Part
from harness.tasks.lm_eval.settings import LmEvalSettings

# Keys of a task's configuration that cannot change a number, because its documents and prompts are hashed as a whole,
# and the keys that the protocol states itself.
NOT_IN_DEFINITION = {
    "task", "task_alias", "tag", "metadata", "unsafe_code", "should_decontaminate", "doc_to_decontamination_query",
    "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "num_fewshot",
}


def definition(task: Any) -> str:
    """Return a digest of the resolved configuration of a task: templates, stopping, filters, metrics and all code.

    It must be computed before the task is used, because its functions may keep what they have computed.
    """
    config = task.config
    keys = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else list(config)
    return digest_of({
        "config": {key: config[key] for key in keys if key not in NOT_IN_DEFINITION},
        "class": type(task),
        "output_type": task.OUTPUT_TYPE,
        "filters": [[one.name, one.filters] for one in getattr(task, "_filters", [])],
        "metrics": getattr(task, "_metric_fn_list", {}),
        "metric_arguments": getattr(task, "_metric_fn_kwargs", {}),
        "aggregation": task.aggregation(),
        "higher_is_better": task.higher_is_better(),
    })


def protocol(asked: LmEvalSettings, parts: Sequence[Part], groups: Sequence[Any]) -> dict[str, Any]:
    """Return the protocol of a task, group or tag. groups: the Groups of lm-eval that hold the parts."""
    import lm_eval

    left_out = sorted({metric for part in parts for metric, name in part.by_metric.items() if not name})
    tasks = {part.name: part.task for part in parts}
    return {
        "lm_eval": lm_eval.__version__,
        "task": asked.task,
        "task_version": _common(str(task.VERSION) for task in tasks.values()),
        "num_fewshot": _common(task.config.num_fewshot for task in tasks.values()),
        "fewshot_seed": asked.seed,
        "limit": asked.limit,
        "split": _common(task.config.test_split or task.config.validation_split for task in tasks.values()),
        "data_files": {split: _file_digest(path) for split, path in asked.data_files.items()},
        "documents": _documents_digest(parts),
        "definition": digest_of([_of_parts(parts), _of_groups(groups)]),
        "n_examples": sum(len(part.docs) for part in parts),
        "metrics_left_out": left_out,
    }


def _of_parts(parts: Sequence[Part]) -> list[Any]:
    return [[part.name, part.definition, part.by_metric, list(part.by_metric)] for part in parts]


def _of_groups(groups: Sequence[Any]) -> list[Any]:
    return [
        [group.name, [task.config.task for task in group.get_all_tasks()], group.aggregate_metric_list or []]
        for group in groups
    ]


def _common(found: Iterable[Any]) -> Any:
    """Return the value if all are equal, else the sorted list of the distinct values."""
    distinct = set(found)
    return distinct.pop() if len(distinct) == 1 else sorted(distinct, key=str)


def _file_digest(path: str) -> str:
    with Path(path).expanduser().open("rb") as file:
        return hash_file(file, hashlib.blake2b(digest_size=8))


def _documents_digest(parts: Sequence[Part]) -> str:
    """Return a digest of every prompt and right answer that lm-eval built, and of every field of every document.

    The code of a task may read any field when it judges an answer.
    """
    digest, describer = hashlib.blake2b(digest_size=8), Describer()
    for part in parts:
        digest.update(f"{len(part.docs)} documents".encode())
        for doc in part.docs:
            asked = [[one.request_type, one.args, one.idx, one.repeats] for one in doc]
            content = describer.plain([asked, part.task.doc_to_target(doc[0].doc), _fields(doc[0].doc)])
            digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _fields(document: Any) -> Any:
    return dict(document) if isinstance(document, Mapping) else document
