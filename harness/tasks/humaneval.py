"""HumanEval (Chen et al. 2021, arXiv 2107.03374): a model completes a function, and its tests are executed.

The protocol is that of lm-eval: no examples in the prompt, greedy decoding, one completion for each problem, which ends
before the first of five strings. pass@1 is then the share of problems whose program reaches its end.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask, TaskContext
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.clusters import by_column
from harness.tasks.generation import (
    Decoding,
    encoded_prompts,
    require_generation,
    require_room,
    written_texts,
)
from harness.tasks.sandbox import PROTECTIONS, Limits, protections, run_program
from harness.tasks.settings import RowsTask

if TYPE_CHECKING:
    from harness.evaluation.division import Division
    from harness.models.loading import LoadedModel

COLUMNS = ("prompt", "test", "entry_point")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass
class HumanevalTask(RowsTask):
    """The share of functions that a model completes so that their tests pass."""

    execute: bool = False  # whether the code that the model writes may be executed on this machine
    max_new_tokens: Annotated[int, at_least(1)] = 1024
    timeout: Annotated[int, at_least(1)] = 3  # seconds of processor time for one program
    memory: Annotated[int, at_least(64)] = 1024  # MiB for one program
    kind: ClassVar[str] = "humaneval"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task, which writes one completion for each row and runs it with the row's tests.

        A row has `prompt`, `test` (which defines `check`) and `entry_point`, the name of the function.
        Metric: pass@1, whether the program of the prompt, the completion, the test and the call of `check` reaches its
        end in a confined process (`harness.tasks.sandbox`).
        Raises InputError if `execute` is false, this machine cannot confine a program, the new tokens leave no room for
        a prompt, and as `DataSource.rows` does.
        """
        key = f"tasks.{name}"
        if not self.execute:
            raise InputError(
                f"{key}.execute: false, and this task executes code that the model writes; allow it by"
                f" {key}.execute=true (docs/tasks.md says how the code is confined)"
            )
        try:
            lacking = PROTECTIONS - protections()
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        if lacking:
            warnings.warn(
                f"{key}: the kernel of this machine does not confine {' and '.join(sorted(lacking))} of the code that"
                " the model writes; only Python's audit hook does (docs/tasks.md)", stacklevel=2
            )
        tokenization.require_tokenizer(name, context.tokenizer)
        require_room(key, self.max_new_tokens, context.context_length)
        chosen = self.choose(key, self.rows(key, COLUMNS), lambda row: row["prompt"])
        data.refuse_empty(key, chosen, COLUMNS)
        rows = [row for _, row in chosen]
        texts, room = [row["prompt"] for row in rows], context.context_length - self.max_new_tokens
        prompts = encoded_prompts(context.tokenizer, texts, room)
        decoding, limits = Decoding(STOPS, self.max_new_tokens), Limits(self.timeout, self.memory)
        protocol = {
            "data": self.source(),
            "digest": data.digest(row[column] for row in rows for column in COLUMNS),
            "n_examples": len(rows),
            "n_truncated": sum(len(tokenization.encode(context.tokenizer, text)) > room for text in texts),
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "until": list(STOPS),
            "generation": dict(context.generation),
            "batch_tokens": context.generation_tokens,
            "tokenizer": tokenization.tokenizer_digest(context.tokenizer),
            "timeout": self.timeout,
            "memory": self.memory,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            **self.part_protocol(),
        }

        def measure(loaded: LoadedModel, division: Division, batch_share: float) -> dict[str, ExampleScores]:
            require_generation(loaded.model, context.generation)
            written = written_texts(loaded, prompts, decoding, division, int(context.generation_tokens * batch_share))
            programs = [program_of(row, text) for row, text in zip(rows, written)]
            passed = _passed(programs, limits, division)
            return {"pass@1": ExampleScores(passed, np.ones(len(rows)), bounds=(0.0, 1.0))}

        task = DirectTask(name, protocol, [str(number) for number, _ in chosen], measure, inputs=prompts)
        return by_column(task, key, self.cluster_column, rows)


def program_of(row: dict[str, str], completion: str) -> str:
    """Return the program that reaches its end if the completion of a row is right."""
    return f"{row['prompt']}{completion}\n{row['test']}\ncheck({row['entry_point']})\n"


def _passed(programs: Sequence[str], limits: Limits, division: Division) -> np.ndarray:
    """Return whether each program reaches its end, float64 [n]. The processes of `division` share the programs."""

    def own() -> dict[int, bool]:
        return {i: run_program(programs[i], limits) for i in division.own(len(programs))}

    found = {i: passed for part in division.together("executing", own) for i, passed in part.items()}
    return np.array([found[i] for i in range(len(programs))], dtype=np.float64)
