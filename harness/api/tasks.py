"""Tasks by name, for Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.errors import InputError
from harness.settings.compose import config_folder
from harness.tasks.lm_eval.index import knows
from harness.tasks.registry import TASKS, require_name, task_of
from harness.tasks.settings import Task


@dataclass(frozen=True)
class NamedTask:
    """The settings of a task, and the name of the task in a study."""

    name: str
    task: Task


def task(name: str, **settings: Any) -> NamedTask:
    """Return a task by name.

    name: the name of a YAML file in conf/task/ ("wikitext", "piqa"), of a kind of task ("text", "ioi"), or of a task
        or group of lm-eval ("mmlu"). With the setting `kind` it may be any other name.
    settings: the settings of the task, as `tasks.<name>.*` on the command line.
    Raises InputError for an unknown name, kind or setting, and if a file does not exist.

    >>> sh.task("ioi", data_files="ioi.jsonl", limit=8)
    NamedTask(name='ioi', task=IoiTask(limit=8, ...))
    """
    values: dict[str, Any] = {}
    file = config_folder() / "task" / f"{name}.yaml"
    if file.is_file():
        import yaml

        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    elif name in TASKS:
        values = {"kind": name}
    elif "kind" not in settings and knows(name):
        values = {"kind": "lm_eval", "task": name}
    elif "kind" not in settings:
        there = sorted({*TASKS, *(path.stem for path in file.parent.glob("*.yaml"))})
        raise InputError(
            f"task: there is no {name!r}; give kind=..., a name of lm-eval, or one of {', '.join(there)}"
        )
    missing = [key for key, value in {**values, **settings}.items() if value == "???"]
    if missing:
        raise InputError(f"task {name!r}: {missing[0]} must be given")
    require_name(name)
    return NamedTask(name, task_of({**values, **settings}, name))
