"""HumanEval with models that answer right and wrong, and the refusal to execute code unless asked."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.models.description import generation_values
from harness.models.loading import loaded_from
from harness.tasks import humaneval
from harness.tasks.humaneval import HumanevalTask, program_of
from tests.evaluation.reference import real, tiny
from tests.tasks.answering import Answering

ROWS = [
    {"prompt": f'def {name}(a, b):\n    """Return {what}."""\n', "entry_point": name,
     "test": f"def check(candidate):\n    assert candidate(3, 2) == {value}\n"}
    for name, what, value in (("add", "a plus b", 5), ("subtract", "a minus b", 1), ("multiply", "a times b", 6))
]
RIGHT = {"add": "    return a + b\n", "subtract": "    return a - b\n", "multiply": "    return a * b\n"}


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "functions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def scores(rows: str, answer, **settings) -> list[float]:
    context = tiny(context_length=256)[1]
    known = replace(context, generation={})
    task = HumanevalTask(data_files=rows, execute=True, max_new_tokens=60, **settings).prepare("h", known)
    found = task.measure(Answering(context.tokenizer, 256, answer), Division(), 1.0)
    assert list(found) == ["pass@1"] and found["pass@1"].bounds == (0.0, 1.0)
    return found["pass@1"].score.tolist()


def of(prompt: str) -> str:
    return next(answer for name, answer in RIGHT.items() if f"def {name}" in prompt)


def test_right_and_wrong_completions(rows) -> None:
    assert scores(rows, of) == [1, 1, 1]
    assert scores(rows, lambda prompt: RIGHT["add"]) == [1, 0, 0]
    assert scores(rows, lambda prompt: "    return None\n") == [0, 0, 0]
    assert scores(rows, lambda prompt: of(prompt) + "\nprint(unknown)\nclass") == [1, 1, 1]  # cut before the stop
    assert scores(rows, lambda prompt: of(prompt) + "import os\nos._exit(0)\n") == [0, 0, 0]
    assert scores(rows, lambda prompt: "    while True: pass\n", timeout=1, limit=1) == [0]


def test_nothing_is_executed_unless_asked(rows, monkeypatch) -> None:
    def never(*_):
        raise AssertionError("a program was executed")

    monkeypatch.setattr(humaneval, "run_program", never)
    monkeypatch.setattr(humaneval, "protections", never)
    with pytest.raises(InputError, match=r"^tasks\.h\.execute: false, .* tasks\.h\.execute=true"):
        HumanevalTask(data_files=rows).prepare("h", tiny(context_length=256)[1])


def test_protocol_and_bad_data(rows, tmp_path) -> None:
    context = tiny(context_length=256)[1]
    task = HumanevalTask(data_files=rows, execute=True, max_new_tokens=230, part="report").prepare("h", context)
    assert json.loads(json.dumps(task.protocol)) == task.protocol
    assert task.protocol["n_truncated"] == len(task.inputs) and {len(tokens) for tokens in task.inputs} == {26}
    with pytest.raises(InputError, match=r"^tasks\.h\.max_new_tokens: 256 tokens leave no room"):
        HumanevalTask(data_files=rows, execute=True, max_new_tokens=256).prepare("h", context)
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({**ROWS[0], "test": " "}))
    with pytest.raises(InputError, match=r"^tasks\.h row 0: column 'test' is empty"):
        HumanevalTask(data_files=str(empty), execute=True, max_new_tokens=9).prepare("h", context)


def test_a_kernel_that_confines_less_is_named(rows, monkeypatch) -> None:
    monkeypatch.setattr(humaneval, "protections", lambda: frozenset({"limits", "signals"}))
    with pytest.warns(UserWarning, match=r"^tasks\.h: the kernel of this machine does not confine files and network"):
        HumanevalTask(data_files=rows, execute=True, max_new_tokens=9).prepare("h", tiny(context_length=256)[1])
    monkeypatch.setattr(humaneval, "protections", lambda: humaneval.PROTECTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HumanevalTask(data_files=rows, execute=True, max_new_tokens=9).prepare("h", tiny(context_length=256)[1])


def test_a_program_is_prompt_completion_and_test() -> None:
    namespace: dict = {}
    exec(program_of(ROWS[0], RIGHT["add"]), namespace)
    assert namespace["add"](1, 1) == 2


@pytest.mark.assets
def test_a_small_model_writes_no_programs(assets, rows) -> None:
    model, context = real(assets / "models/stories260K")
    context = replace(context, generation=generation_values(model.generation_config))
    task = HumanevalTask(data_files=rows, execute=True, max_new_tokens=8, limit=2).prepare("h", context)
    found = task.measure(loaded_from(model, context.tokenizer), Division(), 1.0)
    assert found["pass@1"].score.tolist() == [0, 0]
