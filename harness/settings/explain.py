"""Explain an error of Hydra or OmegaConf in one line, with the most similar known name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.registry import nearest

LONGEST_KEY = 200


# What else may be typed for a group.
_MORE = {
    "model": "; or give owner/name (on the hub), a folder, or a GGUF file",
    "reference": "; or give owner/name (on the hub) or a folder",
    "task": "; or give the name of any task of lm-eval",
}


def _no_keys(kind: str) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Known:
    """The names that a message may suggest.

    keys: the tree of known keys. groups: config group -> the names in it. task_folders: the folders with YAML files of
    tasks. keys_of_task: a function from a kind of task to its keys.
    """

    keys: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]
    task_folders: Sequence[Path] = ()
    keys_of_task: Callable[[str], Sequence[str]] = _no_keys


def explain(error: Exception, known: Known, overrides: Sequence[str] = ()) -> str:
    """Return one line for an error of Hydra or OmegaConf. overrides: the overrides that the user typed."""
    typed = getattr(error, "override", None)
    if typed is not None:  # an OverrideParseException
        return _not_in_grammar(typed)
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    not_there = re.search(r"Key '([^']+)' (?:is not in struct|not in '[^']+')", text)
    if not_there:
        full = re.search(r"full_key: (\S+)", text)
        key = full.group(1) if full else not_there.group(1)
        if key.startswith("tasks."):
            return _task_key(key, known, overrides)
        here = _keys_below(key.rpartition(".")[0], known.keys)
        near = nearest(key.rpartition(".")[2], here)
        return f"{key}: unknown key; {near}known here: {', '.join(here) or 'see the YAML file of that group'}"
    elsewhere = re.search(r"In 'experiment/([^']+)': Could not override '([^']+)'\. No match in the defaults", text)
    if elsewhere:
        name, group = elsewhere.groups()
        return (f"experiment: {name!r} is for another command, because this one has no settings {group!r}; the first"
                f" lines of experiment/{name}.yaml name it")
    no_file = re.search(r"Could not (?:find|load) '([^']+)/([^'/]*)'", text)
    if no_file:
        group, name = no_file.groups()
        # Hydra lists no options for a name in a list of names
        options = re.search(r"Available options in '[^']+':\n((?:\t.*\n?)+)", text)
        there = options.group(1).split() if options else known.groups.get(group, [])
        more = _MORE.get(group, "")
        return f"{group}: there is no {name!r}; {nearest(name, list(there))}there are {', '.join(there)}{more}"
    full = re.search(r"full_key: (\S+)", text)
    if full:
        reason = next(line for line in reversed(chain) if "full_key" in line).splitlines()[0]
        return f"{full.group(1)}: {reason}"
    return " ".join(chain[0].split())


def no_name(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str | None:
    """Return one line for the first override that has no key, or that sets a group to a number, null, true or false.

    None if there is no such override. groups: config group -> the names in it.
    """
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key:
            return f"{override!r}: not a setting; give key=value"
        names = [name.strip() for name in value.strip("[]").split(",")]
        if key in groups and any(re.fullmatch(r"[-+.\d]+|null|true|false", name) for name in names):
            return f"{key}: {value!r} is wrong; there are {', '.join(groups[key])}"
    return None


def refuse_keys(overrides: Sequence[str]) -> None:
    """Raise InputError for an override whose key is empty, or longer than any name of a file may be."""
    for override in overrides:
        key = override.partition("=")[0]
        if not key.lstrip("+~"):
            raise InputError(f"{override[:200]!r}: not a setting; give key=value")
        if len(key) > LONGEST_KEY:
            raise InputError(f"{key[:60]}...: the name of a setting has at most {LONGEST_KEY} characters")


def too_long(overrides: Sequence[str]) -> str | None:
    """Return one line for the first override with a number of more digits than Python reads, or None."""
    found = next((one for one in overrides if re.search(r"\d{4301}", one)), None)
    if found is None:
        return None
    return f"{found.partition('=')[0][:200]}: the number is too large; it must fit into 64 bits"


def not_chosen(key: str, name: str) -> str:
    """Return one line for a setting of a task that could be chosen and is not."""
    return f"{key}: not a task of these settings; choose it with task={name}, or task=[...,{name}]"


def _not_in_grammar(override: str) -> str:
    """Return one line for an override that Hydra's parser does not understand."""
    key, equals, value = override.partition("=")
    if not equals and not key.startswith("~"):
        return f"{override[:200]!r}: not a setting; give key=value"
    if not re.fullmatch(r"[+~]{0,2}[\w.@:/-]+", key, re.ASCII):
        return f"{key[:200]!r}: not the name of a setting; give key=value, where the key has letters, digits, . and _"
    # Hydra reads quoted text as it is; the outer quotes are for the shell.
    text = "..." if "'" in value or len(value) > 60 else value.strip('"')
    example = f"'{key}=\"{text}\"'"
    return (f"{key}: {value[:200]!r} is not a value in Hydra's grammar; put text with special characters into two pairs"
            f" of quotes, as in {example}")


def _keys_below(prefix: str, keys: Mapping[str, Any]) -> list[str]:
    node: Any = keys
    for part in filter(None, prefix.split(".")):
        node = node.get(part) if isinstance(node, Mapping) else None
    return list(node) if isinstance(node, Mapping) else []


def _task_key(key: str, known: Known, overrides: Sequence[str]) -> str:
    """Return one line for an unknown key below `tasks`."""
    _, name, *inside = key.split(".")
    there = [file for file in (folder / f"{name}.yaml" for folder in known.task_folders) if file.is_file()]
    if not inside:
        if there:
            return not_chosen(key, name)
        near = nearest(name, list(known.groups["task"]))
        return f"{key}: no such task in these settings; {near}choose one with task=..., or add +{key}.kind=..."
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"+tasks.{name}.kind=")]
    kinds = given or [line.split()[1] for file in there for line in file.read_text().splitlines()
                      if line.startswith("kind: ")]
    here = list(known.keys_of_task(kinds[0])) if kinds else []
    if inside[0] in here:
        return f"{key}: not set so far; add it with +{key}=..."
    return f"{key}: unknown key; {nearest(inside[0], here)}known here: {', '.join(here) or 'see docs/tasks.md'}"
