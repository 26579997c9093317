"""What people type for a config group that is not the name of one of its YAML files: folders, files, names elsewhere.

`model=path/to/folder`, `model=file.gguf`, `model=owner/name`, `task=mmlu` and `task=mine.yaml` become the overrides
that they stand for. A value that is none of these stays as it is, and composition refuses it with the nearest name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import InputError

Names = Mapping[str, Sequence[str]]

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PLAIN = re.compile(r"[\w./:-]+", re.ASCII)
_KEY = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)  # what may stand between the dots of a setting
_EMBEDDED = ("recall", "recall_published")  # YAML files of models that are trained here
OWN_DEFAULTS = {"target": "type", "region": "decile"}  # what is chosen for a model that the user names


def as_meant(overrides: Sequence[str], names: Names) -> list[str]:
    """Return overrides in which values of `model`, `reference` and `task` that are no YAML names are spelled out.

    names: config group -> the names in it. Raises InputError for a path at which nothing is.
    """
    first: list[str] = []
    rest: list[str] = []
    for override in overrides:
        group, equals, value = override.partition("=")
        if equals and group in ("model", "reference"):
            rest += _model(group, value, names[group])
        elif equals and group == "task":
            added, chosen = _tasks(override, value, names[group])
            first += added
            rest.append(chosen)
        else:
            rest.append(override)
    return [*first, *rest]


def with_own_defaults(overrides: Sequence[str]) -> list[str]:
    """Return overrides with the targets and regions of a study of a model of the user's own, if it is one.

    The defaults of conf/config.yaml are made for the embedded model, whose matrices are few. For any other model, a
    group of which nothing is typed has the value in OWN_DEFAULTS, and the recall task is left out if another is added.
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if "experiment" in keys or not _names_a_model(overrides):
        return list(overrides)
    typed = {key.split(".")[0] for key in keys}
    first = [f"{group}={name}" for group, name in OWN_DEFAULTS.items() if group not in typed]
    if "task" not in typed and any(override.startswith("+tasks.") for override in overrides):
        first.append("task=[]")
    return [*first, *overrides]


def _names_a_model(overrides: Sequence[str]) -> bool:
    named = False
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "model":
            named = value not in _EMBEDDED
        elif key in ("model.name", "model.adapter"):
            named = value not in ("recall", "null", "")
    return named


def _model(group: str, value: str, names: Sequence[str]) -> list[str]:
    """Return the overrides for a model. group: "model" or "reference"."""
    unchanged = [f"{group}={value}"]
    typed = _unquoted(value)
    if typed in names or not typed or "${" in value or value[0] in "[{":
        return unchanged
    path = Path(typed).expanduser()
    if typed.endswith(".gguf"):
        if not os.path.isfile(path):
            raise InputError(f"{group}: no such file {typed[:200]!r}; give the path of a GGUF file")
        if group == "reference":
            raise InputError(f"reference: {typed[:200]!r} is a GGUF file; give a folder with safetensors or owner/name")
        folder = str(path.parent) if str(path.parent) != "." else os.getcwd()
        return [*_pretrained(group, folder), f"model.gguf_file={_quoted(path.name)}"]
    if os.path.isdir(path) or _HUB.fullmatch(typed) and not os.path.exists(path):
        return _pretrained(group, typed)
    if os.path.exists(path):
        raise InputError(f"{group}: {typed[:200]!r} is a file; give the folder that holds the model, or a GGUF file")
    if typed.startswith((".", "/", "~")) or typed.count("/") > 1:
        raise InputError(f"{group}: no such folder {typed[:200]!r}; give a folder with a model, a GGUF file, a name on"
                         f" the hub (owner/name), or one of {', '.join(names)}")
    return unchanged


def _pretrained(group: str, name: str) -> list[str]:
    return [f"{group}=pretrained", f"{group}.name={_quoted(name)}"]


def _tasks(override: str, value: str, names: Sequence[str]) -> tuple[list[str], str]:
    """Return the overrides that add tasks of lm-eval, and the override that chooses the others."""
    inside = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    typed = [_unquoted(one.strip()) for one in inside.split(",")]
    others = [one for one in typed if one not in names]
    if "${" in value or not others or not all(map(_is_elsewhere, others)):
        return [], override
    added = [line for one in others for line in _lm_eval(one)]
    return added, f"task=[{','.join(one for one in typed if one in names)}]"


def _is_elsewhere(task: str) -> bool:
    if task.endswith((".yaml", ".yml")):
        return True
    if not _KEY.fullmatch(task) or task in ("null", "true", "false"):
        return False
    from harness.tasks.lm_eval.index import knows

    return knows(task)


def _lm_eval(task: str) -> list[str]:
    """Return the overrides that add a task of lm-eval, which is named by itself or by its YAML file."""
    import yaml

    from harness.settings.configs import config_folder

    name, more = task, {}
    if task.endswith((".yaml", ".yml")):
        path = Path(task).expanduser()
        if not path.is_file():
            raise InputError(f"task: no such file {task[:200]!r}; give the YAML file of a task of lm-eval")
        found = re.search(r"^task:[ \t]*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8"), re.M)
        if found is None or not _KEY.fullmatch(found[1]):
            raise InputError(f"task: {task[:200]!r} has no line `task: name` with a name of letters, digits, _ and -")
        name, more = found[1], {"include_path": str(path.parent)}
    values = yaml.safe_load((config_folder() / "task" / "lm_eval.yaml").read_text(encoding="utf-8"))
    values |= {"task": name, **more}
    return [f"+tasks.{name}.{key}={_quoted(one) if isinstance(one, str) else json.dumps(one)}"
            for key, one in values.items()]


def _unquoted(value: str) -> str:
    for mark in "'\"":
        if len(value) > 1 and value[0] == value[-1] == mark:
            return value[1:-1].replace(f"\\{mark}", mark)
    return value


def _quoted(text: str) -> str:
    """Return a text as a value in Hydra's grammar."""
    if _PLAIN.fullmatch(text) and not text.startswith((":", "-")):
        return text
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    ending = re.search(r"\\*$", escaped)
    return f"'{escaped}{ending[0] if ending else ''}'"
