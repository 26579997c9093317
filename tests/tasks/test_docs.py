"""docs/tasks.md names every kind of task, every setting, every YAML file and every metric."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, TaskContext
from harness.models.families import family_of
from harness.models.loading import loaded_from
from harness.models.recall import recall_config
from harness.models.recall_training import initial_model
from harness.models.settings import RecallModelSettings
from harness.tasks.registry import TASKS
from tests import encoders
from tests.evaluation.reference import TEXT, tiny
from tests.models.tiny import tiny_model
from tests.tasks.asking import asked

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text()
SECTIONS = dict(re.findall(r"(?ms)^## `(\w+)`: [^\n]*\n(.*?)(?=^## |\Z)", PAGE))
SHARED = re.search(r"(?ms)^## Settings that several kinds share\n(.*?)^## ", PAGE).group(1)
ROWS = {
    "ioi": [{"prompt": "Anna and Ben sat. Ben gave it to", "answer": "Anna"}],
    "factual": [{"prompt": "The dog was named", "attribute": "Max"}],
    "lambada": [{"text": "Anna gave a ball to Ben"}],
    "open": [{"inputs": "The dog was named", "targets": ["Max"], "multiple_choice_targets": []}],
    "closed": [{"inputs": "The dog was named", "targets": ["Max"], "multiple_choice_targets": ["Max", "Ben"]}],
    "order": [{"sentence_good": "the cat sat", "sentence_bad": "cat the sat"}],
    "agreement": [{"sentence_good": "the cat ran", "sentence_bad": "the cat run"}],
    "masked": [{"text": "the cat sat on the mat"}],
    "classification": [{"sentence": "the cat sat", "label": 1}],
    "label_words": [{"sentence": "the cat sat", "label": 1}],
    "seq2seq": [{"source": "the cat sat", "target": "a dog ran"}],
    "arc_easy": [
        {"question": "Anna went to the", "choices": {"text": ["park", "ball"], "label": ["A", "B"]}, "answerKey": "A"}
    ],
    "humaneval": [{"prompt": "def f(a):\n", "test": "def check(f):\n    f(1)", "entry_point": "f"}],
    "gsm8k": [{"question": "Anna has a ball and Ben has two.", "answer": "They have three. #### 3"}],
}


@pytest.mark.parametrize("kind", TASKS)
def test_every_setting_is_named(kind: str) -> None:
    assert set(SECTIONS) == set(TASKS)
    text = SECTIONS[kind] + SHARED + (SECTIONS["recall"] if kind == "recall_probes" else "")
    missing = [f.name for f in fields(TASKS[kind]) if f"`{f.name}`" not in text]
    assert not missing


def table_rows() -> list[tuple[list[str], str, str]]:
    rows = re.findall(r"(?m)^\| (`[\w` ]+`) \| ([^|]+) \| ([^|]+) \|$", PAGE)
    return [(re.findall(r"`(\w+)`", kinds), names, models) for kinds, names, models in rows]


def test_every_yaml_is_named_with_its_kind() -> None:
    named = {}
    for kinds, names, _ in table_rows():
        for kind in kinds:
            named[kind] = {kind} if names == "the same" else set(re.findall(r"`(\w+)`", names))
    found: dict[str, set[str]] = {}
    for path in (ROOT / "conf" / "task").glob("*.yaml"):
        found.setdefault(yaml.safe_load(path.read_text())["kind"], set()).add(path.stem)
    assert {kind: named.get(kind) for kind in TASKS} == found


def test_every_kind_of_model_is_named() -> None:
    words = {"causal": "causal language models|the embedded model", "masked": "encoders(?! and decoders saved)",
             "classification": "sequence classification head", "seq2seq": "encoder-decoders"}  # fmt: skip
    for kinds, _, models in table_rows():
        said = {kind for kind, pattern in words.items() if re.search(pattern, models)}
        for kind in kinds:
            assert said == set(TASKS[kind].measured_on), kind


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """A tiny file of rows for every kind of task, a folder of two paradigms, a text."""
    (tmp_path / "blimp").mkdir()
    paths = {name: tmp_path / ("blimp" if name in ("order", "agreement") else ".") / f"{name}.jsonl" for name in ROWS}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    paths["text"] = tmp_path / "text.txt"
    paths["text"].write_text(TEXT)
    return {**{name: str(path) for name, path in paths.items()}, "blimp": str(tmp_path / "blimp")}


def emitted(kind: str, model: Any, context: TaskContext, **settings: Any) -> list[str]:
    """The metrics of a task, asked of the task itself: without a model, or by measuring a tiny one."""
    task = asked("t", kind=kind, **settings).prepare("t", context)
    if not isinstance(task, DirectTask):
        return list(blank_measure(task))
    return list(task.measure(loaded_from(model, context.tokenizer), Division(), 1.0))


def encoder(model_type: str, classifier: bool = False) -> tuple[Any, TaskContext]:
    model = encoders.tiny_classifier(model_type) if classifier else tiny_model(model_type)
    kind = "classification" if classifier else family_of(model.config).kind
    return model, TaskContext(encoders.tokenizer(model_type), model.config, 40, kind)


def recall() -> tuple[Any, TaskContext]:
    settings = RecallModelSettings(dim=32, hidden_dim=48, context_length=32)
    return initial_model(settings), TaskContext(None, recall_config(settings), 32, "causal")


def metrics_of(kind: str, files: dict[str, str]) -> list[list[str]]:
    """What each way of measuring a kind emits, in its order."""
    if kind in ("text", "ioi", "factual", "lambada"):
        return [emitted(kind, *tiny(), data_files=files[kind])]
    if kind == "blimp":
        return [emitted(kind, *model, data_files=files[kind]) for model in (tiny(), encoder("bert"))]
    if kind == "bigbench":
        return [emitted(kind, *tiny(), data_files=files[form]) for form in ("closed", "open")]
    if kind == "masked":
        return [emitted(kind, *encoder("bert"), data_files=files[kind])]
    if kind == "classification":
        return [emitted(kind, *encoder("bert", classifier=True), data_files=files[kind])]
    if kind == "label_words":  # signs, because they are one token of the tiny tokenizer
        of_kind = {"template": "{sentence}:", "words": {"0": "(", "1": ")"}, "data_files": files[kind]}
        return [emitted(kind, *tiny(), **of_kind)]
    if kind == "seq2seq":
        return [emitted(kind, *encoder("t5"), data_files=files[kind])]
    if kind in ("recall", "recall_probes"):
        return [emitted(kind, *recall())]
    if kind == "humaneval":
        return [emitted(kind, *tiny(), data_files=files[kind], execute=True, max_new_tokens=4)]
    if kind == "ruler":
        return [emitted(kind, *tiny(context_length=1000), task="vt", length=1000, n_examples=1, max_new_tokens=2)]
    assert kind == "lm_eval"
    return [
        emitted(kind, *tiny(context_length=512), task=task, num_fewshot=0, data_files={"test": files[task]})
        for task in ("arc_easy", "gsm8k")
    ]


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind != "lm_eval"])
def test_every_metric_is_named(kind: str, files) -> None:
    """The page names what tasks emit and nothing else, and first the metric that is emitted first."""
    found = metrics_of(kind, files)
    paragraph = re.search(r"(?ms)\bMetrics\b(.*?)(?=\n\n|\Z)", SECTIONS[kind]).group(1)
    named = [name for name in re.findall(r"`([^`]+)`", paragraph) if not name.endswith(".py")]
    generic = {re.sub("^accuracy_(order|agreement)$", "accuracy_<paradigm>", name) for one in found for name in one}
    assert set(named) == generic
    assert all(one[0] == named[0] for one in found)


def test_metrics_of_lm_eval_are_those_of_its_tasks(files) -> None:
    choices, generated = metrics_of("lm_eval", files)
    named = re.search(r"metrics are lm-eval's \(([^)]+)\)", SECTIONS["lm_eval"]).group(1)
    assert re.findall(r"`([^`]+)`", named) == [*choices, generated[0]]
    assert choices == ["acc", "acc_norm"] and generated == ["exact_match,strict-match", "exact_match,flexible-extract"]
