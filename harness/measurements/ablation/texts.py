"""The texts of the examples of a study, in the file texts.json, so that a report can show what an ablation changed.

No number depends on them. The file names its study, so that the texts of another study are not shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.files import write_json
from harness.tables.identity import run_of

if TYPE_CHECKING:
    from harness.evaluation.requests import PreparedTask, Request

FILE = "texts.json"
MOST_EXAMPLES = 20_000  # of one task; the texts of those after them are not kept
BEFORE, SCORED = 60, 40  # tokens that are shown of the context, and of what is scored
MOST_ANSWERS = 6  # that are shown of one example
ARROW = " → "  # is between the context and what is scored


def write_texts(folder: Path, study_id: str, tasks: Mapping[str, PreparedTask], tokenizer: Any) -> None:
    """Write the texts of the examples of all tasks, unless they are there. Raises OSError.

    tokenizer: of transformers; without one the numbers of the tokens are written.
    """
    if _content(folder).get("study_id") != study_id:
        texts = {name: _texts_of(task, tokenizer) for name, task in tasks.items()}
        write_json(folder / FILE, {"study_id": study_id, "tasks": texts})


def read_texts(folder: Path) -> dict[str, dict[str, str]]:
    """Return task -> id of the example -> its text; nothing if the file is missing, damaged, or of another study."""
    content = _content(folder)
    if not content or content.get("study_id") != run_of(folder):
        return {}
    tasks = content.get("tasks")
    if not isinstance(tasks, dict):
        return {}
    return {str(task): {str(i): str(text) for i, text in of_task.items()}
            for task, of_task in tasks.items() if isinstance(of_task, dict)}


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _texts_of(task: PreparedTask, tokenizer: Any) -> dict[str, str]:
    ids = task.example_ids[:MOST_EXAMPLES]
    requests = getattr(task, "requests", None)
    if requests is None:  # a DirectTask
        inputs = task.inputs if len(task.inputs) == len(task.example_ids) else []  # type: ignore[union-attr]
        return {name: _decode(tokenizer, tokens, BEFORE) for name, tokens in zip(ids, inputs)}
    example_of = getattr(task, "example_of", None)
    of_example: dict[int, list[Request]] = {}
    for i, request in enumerate(requests):
        of_example.setdefault(i if example_of is None else int(example_of[i]), []).append(request)
    return {name: _text(of_example[i], tokenizer) for i, name in enumerate(ids) if i in of_example}


def _text(requests: Sequence[Request], tokenizer: Any) -> str:
    """Return the context of an example and its answers, or its whole sequence if no continuation is scored."""
    first, several = requests[0], len(requests) > 1
    if first.source is not None:
        context = _decode(tokenizer, first.source, BEFORE)
    elif _continues(first):
        context = _decode(tokenizer, first.tokens[: first.positions[0] + 1], BEFORE)
    else:
        return _decode(tokenizer, first.tokens, BEFORE + SCORED)
    answers = [_decode(tokenizer, one.targets, SCORED, end=True) for one in requests[:MOST_ANSWERS]
               if one.source is not None or _continues(one)]
    shown = " | ".join(f"{i + 1}) {answer.strip()}" for i, answer in enumerate(answers)) if several else answers[0]
    return context + ARROW + shown


def _continues(request: Request) -> bool:
    """Return whether what is scored is one continuation of the context, token by token."""
    at = int(request.positions[0])
    return (len(request.targets) == len(request.tokens) - at
            and bool(np.array_equal(request.tokens[at + 1 :], request.targets[:-1])))


def _decode(tokenizer: Any, tokens: Sequence[int] | np.ndarray, most: int, end: bool = False) -> str:
    """Return the text of the last `most` tokens; end: of the first ones."""
    shown = [int(token) for token in (tokens[:most] if end else tokens[-most:])]
    text = " ".join(map(str, shown)) if tokenizer is None else tokenizer.decode(shown)
    cut = len(tokens) > most
    return text + "…" * (cut and end) if end else "…" * cut + text
