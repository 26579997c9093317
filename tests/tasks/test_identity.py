"""The digest of a task, which is in the id of every cell: it changes with everything that makes the task's numbers.

Each case changes one thing of a task of lm-eval in a folder of a user (YAML, utils.py, a data file), of its model, or
of another kind of task.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from harness.evaluation.requests import TaskContext, task_digest
from harness.tasks.lm_eval.task import LmEvalTask
from tests.evaluation.reference import tiny_model, tiny_tokenizer
from tests.tasks.own_task import (
    CALLED,
    CHOOSE,
    CUSTOM,
    EXACT,
    HIT,
    JUDGED,
    LAMBDA,
    REGISTERED,
    SAY,
    World,
    write,
)


@pytest.fixture(scope="module")
def model_config():
    return tiny_model().config


@pytest.fixture
def digest(tmp_path, monkeypatch, model_config) -> Callable[..., str]:
    """The digest of a task in a new folder."""
    n = 0

    def of(world: World) -> str:
        nonlocal n
        place = tmp_path / f"{n}"
        n += 1
        task = write(world, place)
        with monkeypatch.context() as context:
            context.syspath_prepend(str(place / "elsewhere"))
            context.delitem(sys.modules, "somewhere_else", raising=False)
            known = TaskContext(
                world.tokenizer, model_config, world.context_length, "causal", generation=world.generation
            )
            return task_digest(task.prepare("say", known))

    return of


def put(*path: Any) -> Callable[[World], None]:
    """A change of the YAML file: the last item is put at the keys before it."""
    *keys, last, value = path

    def change(world: World) -> None:
        inner = world.yaml
        for key in keys:
            inner = inner[key]
        inner[last] = value

    return change


def replace(attribute: str, old: str, new: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        text = getattr(world, attribute)
        assert old in text
        setattr(world, attribute, text.replace(old, new))

    return change


def be(attribute: str, value: Any) -> Callable[[World], None]:
    return lambda world: setattr(world, attribute, value)


def field_of_row(row: int, key: str, value: Any) -> Callable[[World], None]:
    return lambda world: world.rows[row].update({key: value})


def other_text(world: World) -> None:
    """The last token of the tokenizer, which no prompt holds and only an answer can show, has another text."""
    content = json.loads(world.tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].pop()
    vocabulary = content["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    world.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )


def set_tokenizer(key: str, value: Any) -> Callable[[World], None]:
    return lambda world: setattr(world.tokenizer, key, value)


PIPE = ("filter_list", 0, "filter")
LOWER = [{"function": "lowercase"}, {"function": "take_first"}]
# (the task, what is changed, how)
CHANGES: list[tuple[dict[str, Any], str, Callable[[World], Any]]] = [
    (SAY, "regex of a filter", put(*PIPE, 0, "regex_pattern", "(\\d+)")),
    (SAY, "group of a regex", put(*PIPE, 0, "group_select", -1)),
    (SAY, "fallback of a regex", put(*PIPE, 0, "fallback", "none")),
    (SAY, "another filter", put(*PIPE, LOWER)),
    (SAY, "order of the filters in a pipeline", lambda world: world.yaml["filter_list"][0]["filter"].reverse()),
    (SAY, "name of a pipeline", put("filter_list", 0, "name", "other")),
    (SAY, "a pipeline less", lambda world: world.yaml["filter_list"].pop()),
    (SAY, "no filters", lambda world: world.yaml.pop("filter_list")),
    (CUSTOM, "function of a custom filter", put(*PIPE, 0, "filter_fn", "!function utils.last_word")),
    (CUSTOM, "code of a custom filter", replace("utils", ".split(\" \")[0]", ".split(\" \")[:1]")),
    (SAY, "argument of a metric", put("metric_list", 0, "ignore_case", True)),
    (SAY, "a further argument of a metric", put("metric_list", 0, "regexes_to_ignore", [","])),
    (SAY, "higher_is_better", put("metric_list", 0, "higher_is_better", False)),
    (SAY, "aggregation", put("metric_list", 0, "aggregation", "nanmean")),
    (SAY, "a further metric", lambda world: world.yaml["metric_list"].append({**EXACT, "metric": "acc"})),
    (CALLED, "function of a metric", put("metric_list", 0, "metric", "!function utils.wrong")),
    (CALLED, "code of a metric", replace("utils", "float(references[0] == p", "0.5 * float(references[0] == p")),
    (JUDGED, "a metric with a function as aggregation", lambda world: world.yaml["metric_list"].append(
        {**HIT, "metric": "other", "aggregation": "!function utils.right"})),
    (SAY, "doc_to_text", put("doc_to_text", "Q: {{q}}")),
    (SAY, "doc_to_target", put("doc_to_target", "{{a}}!")),
    (SAY, "target_delimiter", put("target_delimiter", "")),
    (SAY, "gen_prefix", put("gen_prefix", "The")),
    (SAY, "description", put("description", "Go on. ")),
    (SAY, "repeats", put("repeats", 2)),
    (SAY, "a stop", put("generation_kwargs", "until", ["\n"])),
    (SAY, "length of the answers", put("generation_kwargs", "max_gen_toks", 9)),
    (SAY, "an argument of generate", put("generation_kwargs", "repetition_penalty", 1.5)),
    (SAY, "process_docs that changes nothing", put("process_docs", "!function utils.same")),
    (SAY, "process_results", put("process_results", "!function utils.judge")),
    (JUDGED, "another function of the same file", put("process_results", "!function utils.judge_other")),
    (JUDGED, "code of a function", replace("utils", "results[0].strip()", "results[0]")),
    (JUDGED, "code of a file beside it", be("files", {"tasks/helper.py": "LEVEL = 2\n"})),
    (JUDGED, "code of a module elsewhere", replace("elsewhere", "1.0", "2.0")),
    (JUDGED, "a field of a document that no prompt shows", field_of_row(1, "level", 3)),
    (SAY, "a prompt", field_of_row(0, "q", "Anna went to a")),
    (SAY, "a right answer", field_of_row(0, "a", "ball")),
    (SAY, "order of the documents", lambda world: world.rows.reverse()),
    (SAY, "limit", be("settings", {"limit": 1})),
    (SAY, "length of the model's context", be("context_length", 11)),
    (CHOOSE, "right choice of a document", field_of_row(0, "level", 1)),
    (CHOOSE, "doc_to_choice", put("doc_to_choice", "{{[q, a]}}")),
    (CHOOSE, "acc to acc_norm", put("metric_list", 0, "metric", "acc_norm")),
    (CHOOSE, "metric of choices: higher_is_better", put("metric_list", 0, "higher_is_better", False)),
    (CHOOSE, "metric of choices: aggregation", put("metric_list", 0, "aggregation", "nanmean")),
    (CHOOSE, "filter of choices", put("filter_list", [{"name": "x", "filter": [{"function": "take_first"}]}])),
    (CHOOSE, "a field of a document that only code could read", field_of_row(0, "note", "new")),
    (SAY, "repetition_penalty of the checkpoint", be("generation", {"eos_token_id": 1, "repetition_penalty": 1.2})),
    (SAY, "num_beams of the checkpoint", be("generation", {"eos_token_id": 1, "num_beams": 2})),
    (SAY, "end tokens of the checkpoint", be("generation", {"eos_token_id": [1, 2]})),
    (SAY, "suppress_tokens of the checkpoint", be("generation", {"eos_token_id": 1, "suppress_tokens": [7]})),
    (SAY, "text of a token that no prompt holds", other_text),
    (SAY, "clean_up_tokenization_spaces", set_tokenizer("clean_up_tokenization_spaces", True)),
    (SAY, "padding token", set_tokenizer("pad_token", "a")),
    (SAY, "end token of the tokenizer", set_tokenizer("eos_token", "a")),
    (SAY, "an added token", lambda world: world.tokenizer.add_tokens([AddedToken("<new>")])),
    (SAY, "an added special token", lambda world: world.tokenizer.add_special_tokens({"mask_token": "<m>"})),
]
SHOTS = {**SAY, "num_fewshot": 1, "fewshot_config": {"sampler": "first_n", "samples": "!function utils.shown"}}
CHANGES += [
    (SHOTS, "number of examples shown", be("settings", {"num_fewshot": 0})),
    (SHOTS, "examples shown", put("fewshot_config", "samples", [{"q": "Ben", "a": "dog", "level": 1}])),
    (SHOTS, "code of the examples shown", replace("utils", '"a": "ball", "level": 1', '"a": "ball", "level": 2')),
    (SHOTS, "sampler of the examples shown", put("fewshot_config", "sampler", "default")),
    (SHOTS, "delimiter of the examples shown", put("fewshot_delimiter", "\n")),
    (SHOTS, "seed of the examples shown", be("settings", {"seed": 1})),
]
for kind in ("made", "partial", "method", "lambda"):
    own = {**JUDGED, "process_results": f"!function utils.{kind}_1"}
    CHANGES.append((own, f"function of {kind} 1 to 2", put("process_results", f"!function utils.{kind}_2")))


def cut(world: World) -> None:
    """A call may leave its settings of truncation and padding in a fast tokenizer."""
    world.tokenizer.pad_token = "</s>"
    world.tokenizer(["Anna went to the park"], truncation=True, max_length=3, padding="max_length")
    world.tokenizer.pad_token = None


def other_order(world: World) -> None:
    world.yaml = {key: dict(reversed(list(value.items()))) if isinstance(value, dict) else value
                  for key, value in reversed(list(world.yaml.items()))}


UNCHANGED: list[tuple[dict[str, Any], str, Callable[[World], Any]]] = [
    *((one, "its folder", lambda world: None) for one in (SAY, JUDGED, CUSTOM, CALLED, CHOOSE, SHOTS)),
    *(({**JUDGED, "process_results": f"!function utils.{kind}_1"}, f"the folder of {kind}", lambda world: None)
      for kind in ("made", "partial", "method", "lambda")),
    (SAY, "order of the keys", other_order),
    (SAY, "metadata", put("metadata", "note", "new")),
    (SAY, "tag", put("tag", "other")),
    (SAY, "alias", put("task_alias", "other")),
    (SAY, "place of the data", put("dataset_kwargs", {"data_files": "elsewhere.jsonl"})),
    (JUDGED, "a file outside of the folder", be("files", {"outside.py": "# a comment\n", "tasks/README.md": "new"})),
    (JUDGED, "another task in the folder", be("files", {"tasks/other.yaml": json.dumps({**SAY, "task": "other"})})),
    (SAY, "code that the task does not use", replace("utils", "results[0].strip()", "results[0]")),
    (SAY, "what a tokenizer's last call left", cut),
    (SAY, "name of the tokenizer", set_tokenizer("name_or_path", "other")),
]


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    return {}


def before(base: dict[str, Any], known: dict[str, str], digest: Callable[..., str]) -> str:
    name = json.dumps(base)
    if name not in known:
        known[name] = digest(World(copy.deepcopy(base)))
    return known[name]


def changed(base: dict[str, Any], change: Callable[[World], Any], digest: Callable[..., str]) -> str:
    world = World(copy.deepcopy(base))
    change(world)
    return digest(world)


@pytest.mark.parametrize(("base", "change"), [
    pytest.param(base, change, id=name, marks=pytest.mark.fault(f"a task of lm-eval is changed: {name}"))
    for base, name, change in CHANGES
])
def test_what_makes_a_number_changes_the_digest(base, change, known, digest) -> None:
    assert changed(base, change, digest) != before(base, known, digest)


@pytest.mark.parametrize(("base", "change"), [(b, c) for b, _, c in UNCHANGED], ids=[name for _, name, _ in UNCHANGED])
def test_what_makes_no_number_does_not(base, change, known, digest) -> None:
    assert changed(base, change, digest) == before(base, known, digest)


def test_what_a_user_registers_is_in_the_digest(digest) -> None:
    """A filter and a metric that YAML names by the names that utils.py gave them, whose code is in another module."""
    from lm_eval.api import registry

    def found(code: str) -> str:
        for table in (registry.filter_registry, registry.metric_registry, registry.metric_agg_registry,
                      registry.higher_is_better_registry):
            for name in ("own_filter", "own_metric"):
                table._objs.pop(name, None)
        world = World(copy.deepcopy({**SAY, "process_docs": "!function utils.same"}))
        world.utils, world.elsewhere = "from somewhere_else import same\n", code
        world.yaml["metric_list"] = [{"metric": "own_metric"}]
        world.yaml["filter_list"] = [{"name": "x", "filter": [{"function": "own_filter"}, {"function": "take_first"}]}]
        return digest(world)

    before = found(REGISTERED)
    assert found(REGISTERED) == before
    others = [found(REGISTERED.replace(*change)) for change in (
        ("text.upper()", "text.lower()"), ("float(references", "0.5 * float(references"),
        ("better=True", "better=False"), ('aggregation="mean"', 'aggregation="nanmean"'),
    )]
    assert len({before, *others}) == 5


def test_another_process_finds_the_same_digest(tmp_path, digest) -> None:
    """Other addresses, another order of sets, another folder, which is named by a relative path."""
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.tasks.test_identity import *\n"
        "sys.path.insert(0, 'there/elsewhere')\n"
        "for n, base in enumerate([SAY, JUDGED, CUSTOM, CHOOSE, SHOTS, LAMBDA]):\n"
        "    world = World(copy.deepcopy(base))\n"
        "    task = write(world, Path('there') / str(n))\n"
        "    sys.path[0] = f'there/{n}/elsewhere'\n"
        "    known = TaskContext(world.tokenizer, tiny_model().config, 64, 'causal', generation=world.generation)\n"
        "    print(task_digest(task.prepare('say', known)))\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert there.returncode == 0, there.stderr
    here = [digest(World(copy.deepcopy(base))) for base in (SAY, JUDGED, CUSTOM, CHOOSE, SHOTS, LAMBDA)]
    assert there.stdout.split() == here


def test_a_group_is_also_how_it_averages(tmp_path, model_config) -> None:
    files = {"train": write(World(CHOOSE), tmp_path).data_files["test"]}
    group = {"group": "all", "task": ["say"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    local = {**CHOOSE, "dataset_kwargs": {"data_files": {"test": files["train"]}, "cache_dir": str(tmp_path / "cache")}}
    (tmp_path / "tasks" / "say.yaml").write_text(json.dumps(local))

    def found(**changes) -> str:
        entry = {**group["aggregate_metric_list"][0], **changes}
        (tmp_path / "tasks" / "all.yaml").write_text(json.dumps({**group, "aggregate_metric_list": [entry]}))
        asked = LmEvalTask(task="all", include_path=str(tmp_path / "tasks"))
        return task_digest(asked.prepare("g", TaskContext(tiny_tokenizer(), model_config, 64, "causal")))

    assert found() == found() != found(weight_by_size=False)
    assert len({found(), found(metric="acc_norm"), found(filter_list=["none"])}) == 3
