"""A task of lm-eval in a folder of a user, with everything that it may depend on, for tests of its identity."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from harness.tasks.lm_eval.task import LmEvalTask
from tests.evaluation.reference import tiny_tokenizer

UTILS = '''
from functools import partial
from somewhere_else import scale  # a module that is neither here nor installed


def judge(doc, results):
    return {"hit": float(results[0].strip() == doc["a"]) * scale(doc["level"])}


def judge_other(doc, results):
    return {"hit": float(results[0] == doc["a"])}


def made(weight):
    def judge_made(doc, results):
        return {"hit": weight * float(results[0] == doc["a"])}
    return judge_made


def of(weight, doc, results):
    return {"hit": weight * float(results[0] == doc["a"])}


class Judge:
    def __init__(self, weight):
        self.weight = weight

    def of(self, doc, results):
        return {"hit": self.weight * float(results[0] == doc["a"])}


made_1, made_2 = made(1), made(2)
partial_1, partial_2 = partial(of, 1), partial(of, 2)
method_1, method_2 = Judge(1).of, Judge(2).of
lambda_1, lambda_2 = (lambda doc, results: {"hit": 1.0}), (lambda doc, results: {"hit": 2.0})


def same(docs):
    return docs


def first_word(resps, docs):
    return [[text.split(" ")[0] for text in one] for one in resps]


def last_word(resps, docs):
    return [[text.split(" ")[-1] for text in one] for one in resps]


def right(items=None, references=None, predictions=None, **kwargs):
    return float(references[0] == predictions[0])


def wrong(items=None, references=None, predictions=None, **kwargs):
    return float(references[0] != predictions[0])


def shown():
    return [{"q": "Ben", "a": "ball", "level": 1}]
'''
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": False}
SAY = {
    "task": "say", "tag": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": "nowhere.jsonl"},
    "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
    "target_delimiter": " ", "fewshot_delimiter": "\n\n", "num_fewshot": 0, "repeats": 1, "description": "",
    "metric_list": [EXACT], "generation_kwargs": {"max_gen_toks": 8, "until": ["."], "do_sample": False},
    "filter_list": [
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
        {"name": "whole", "filter": [{"function": "take_first"}]},
    ],
    "metadata": {"version": 1},
}
HIT = {"metric": "hit", "aggregation": "mean", "higher_is_better": True}
JUDGED = {**SAY, "process_results": "!function utils.judge", "metric_list": [HIT]}
CUSTOM = {**SAY, "filter_list": [
    {"name": "own", "filter": [{"function": "custom", "filter_fn": "!function utils.first_word"}]},
]}
CALLED = {**SAY, "metric_list": [{**HIT, "metric": "!function utils.right"}]}
CHOOSE = {
    **{key: value for key, value in SAY.items() if key not in ("generation_kwargs", "filter_list")},
    "output_type": "multiple_choice", "doc_to_target": "level", "doc_to_choice": "{{[a, q]}}",
    "metric_list": [{**EXACT, "metric": "acc"}],
}
LAMBDA = {**JUDGED, "process_results": "!function utils.lambda_1"}
ROWS = [{"q": "Anna went to the", "a": "park", "level": 0}, {"q": "Max liked to", "a": "run", "level": 1}]
REGISTERED = '''
from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter, register_metric


@register_filter("own_filter")
class OwnFilter(Filter):
    def apply(self, resps, docs):
        return [[text.upper() for text in one] for one in resps]


@register_metric(metric="own_metric", higher_is_better=True, aggregation="mean")
def own_metric(references, predictions, **kwargs):
    return float(references[0] == predictions[0])


def same(docs):
    return docs
'''


@dataclass
class World:
    """Everything that a task may depend on. place: the folder in which it is written down."""

    yaml: dict[str, Any]
    utils: str = UTILS
    elsewhere: str = "def scale(level):\n    return 1.0\n"
    files: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=lambda: copy.deepcopy(ROWS))
    settings: dict[str, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerFast = field(default_factory=tiny_tokenizer)
    generation: dict[str, Any] = field(default_factory=lambda: {"eos_token_id": 1})
    context_length: int = 64


def write(world: World, place: Path) -> LmEvalTask:
    """The settings of the task, whose files are written."""
    tasks, elsewhere = place / "tasks", place / "elsewhere"
    tasks.mkdir(parents=True)
    elsewhere.mkdir()
    text = re.sub(r'"(!function [\w.]+)"', r"\1", json.dumps(world.yaml))
    (tasks / "say.yaml").write_text(text)  # JSON is YAML, but for the tags
    (tasks / "utils.py").write_text(world.utils)
    (elsewhere / "somewhere_else.py").write_text(world.elsewhere)
    for name, content in world.files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in world.rows))
    files = {"test": str(place / "rows.jsonl")}
    return LmEvalTask(task="say", include_path=str(tasks), data_files=files, **world.settings)
