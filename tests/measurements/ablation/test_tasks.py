"""A task that a model cannot answer is refused in one line before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import save as safetensors_bytes

from harness.cli import main
from harness.tasks.registry import TASKS
from tests.encoders import save, tiny_classifier
from tests.models.tiny import tiny_model

CONF = Path(__file__).parents[3] / "conf"
ENCODER_KINDS = ("masked", "classification", "seq2seq")
ROW = '{"text": "the cat sat", "sentence": "the cat", "source": "a", "target": "b", "prompt": "a", "label": 0}\n'


def refused(capsys, folder, *tasks: str, model_type: str) -> str:
    """The one line with which a study of these tasks is refused, the weights of its model unreadable."""
    model = tiny_classifier(model_type) if "classification" in tasks else tiny_model(model_type)
    save(folder / "model", model_type, model)
    (folder / "model" / "model.safetensors").write_bytes(safetensors_bytes({}))  # without any weights
    (folder / "rows.jsonl").write_text(ROW)
    data = [f"tasks.{name}.data_files={folder / 'rows.jsonl'}" for name in tasks]
    capsys.readouterr()
    command = ["run", "model=pretrained", f"model.name={folder / 'model'}", f"task=[{','.join(tasks)}]", *data]
    assert main([*command, f"output={folder / 'study'}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and not (folder / "study").exists()
    return lines[0]


def test_every_kind_of_task_can_be_prepared_and_is_of_some_model() -> None:
    kinds = dict(TASKS.items())
    assert all(kind == task.kind and "prepare" in dir(task) and task.measured_on for kind, task in kinds.items())
    assert not any(getattr(task.prepare, "__isabstractmethod__", False) for task in kinds.values())
    on = {name: {kind for kind, task in kinds.items() if name in task.measured_on}
          for name in ("causal", "masked", "seq2seq", "classification")}
    assert "blimp" in on["masked"] and "blimp" in on["causal"]
    assert on["classification"] == {"classification"} and on["seq2seq"] == {"seq2seq"}
    assert {name for task in kinds.values() for name in task.measured_on} == set(on)
    assert set.union(*on.values()) == set(TASKS)


@pytest.mark.parametrize(("task", "model_type", "says"), [
    ("text", "bert", "kind text cannot be measured on a bert model, which is a masked encoder; use a task of kind"
     " blimp, masked, classification"),
    ("ioi", "roberta", "kind ioi cannot be measured on a roberta model, which is a masked encoder"),
    ("masked", "llama", "kind masked cannot be measured on a llama model, which is a causal language model"),
    ("seq2seq", "llama", "kind seq2seq cannot be measured on a llama model, which is a causal language model"),
    ("text", "t5", "kind text cannot be measured on a t5 model, which is an encoder-decoder; use a task of kind"
     " seq2seq"),
])  # fmt: skip
def test_a_task_of_another_kind_of_model(task: str, model_type: str, says: str, tmp_path, capsys) -> None:
    assert refused(capsys, tmp_path, task, model_type=model_type).startswith(f"harness: tasks.{task}: {says}")


def test_one_study_loads_one_head(tmp_path, capsys) -> None:
    line = refused(capsys, tmp_path, "classification", "masked", model_type="bert")
    assert "tasks.masked: kind masked cannot be measured in one study with kind classification" in line


def test_a_model_type_without_a_classification_head(tmp_path, capsys) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW)
    task = ["task=classification", f"tasks.classification.data_files={tmp_path / 'rows.jsonl'}"]
    assert main(["run", *task, f"output={tmp_path / 'study'}"]) == 2
    assert "transformers has none for recall" in capsys.readouterr().err


def test_a_head_that_the_checkpoint_lacks_ends_the_run_before_anything_is_written(tmp_path, capsys) -> None:
    save(tmp_path / "model", "bert")
    (tmp_path / "rows.jsonl").write_text(ROW)
    task = ["task=classification", f"tasks.classification.data_files={tmp_path / 'rows.jsonl'}"]
    command = ["run", "--quiet", "model=pretrained", f"model.name={tmp_path / 'model'}", *task]
    assert main([*command, f"output={tmp_path / 'study'}"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds no weights for" in line and "classifier." in line and "saved as BertForMaskedLM" in line
    assert not (tmp_path / "study").exists()


OWN_YAML = {
    "masked": ("roberta", {"text": "the cat sat on the mat"}),
    "classification": ("bert", {"sentence": "the cat", "label": 1}),
    "sst2": ("roberta", {"sentence": "the cat", "label": 1}),
    "rte": ("bert", {"sentence1": "the cat", "sentence2": "a cat ran", "label": 0}),
    "seq2seq": ("t5", {"source": "the cat", "target": "it ran"}),
}


def test_no_task_of_encoders_is_left_out() -> None:
    found = {path.stem: yaml.safe_load(path.read_text())["kind"] for path in (CONF / "task").glob("*.yaml")}
    assert {name for name, kind in found.items() if kind in ENCODER_KINDS} == set(OWN_YAML)


@pytest.mark.parametrize("task", OWN_YAML)
def test_every_yaml_of_these_tasks_runs_and_plans(task: str, tmp_path, capsys) -> None:
    model_type, row = OWN_YAML[task]
    model = tiny_model(model_type) if task in ("masked", "seq2seq") else tiny_classifier(model_type)
    save(tmp_path / "model", model_type, model)
    (tmp_path / "rows.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    command = ["model=pretrained", f"model.name={tmp_path / 'model'}", f"task={task}", "target.kind=all",
               "region=fraction", f"tasks.{task}.data_files={tmp_path / 'rows.jsonl'}"]  # fmt: skip
    assert main(["plan", *command]) == 0
    assert f"task {task}: 3 examples" in capsys.readouterr().out
    assert main(["run", "--quiet", *command, f"output={tmp_path / 'study'}"]) == 0
    table = pd.read_parquet(tmp_path / "study" / "metrics")
    assert (table.status == "ok").all() and set(table.task) == {task}
