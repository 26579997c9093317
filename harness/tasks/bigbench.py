"""Tasks of BIG-bench in JSON form (Srivastava et al. 2022, arXiv 2206.04615): multiple choice, or open questions.

They are measured as LASER (arXiv 2312.13558) measures epistemic_reasoning and qa_wikidata: the prompt is zero-shot, the
continuation is " " + answer, the choice is the answer of the largest log-probability, and the loss is per token of the
right answer. One thing differs: LASER calls an open answer right if it occurs anywhere in ten generated tokens; here
greedy decoding must begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, ScoredTask, Scores, TaskContext
from harness.tasks import data, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import by_column
from harness.tasks.settings import PromptTask


@dataclass
class BigbenchTask(ChatTask, PromptTask):
    """A task of BIG-bench in JSON form: multiple choice, or open questions."""

    split: str = "train"
    kind: ClassVar[str] = "bigbench"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each choice or, for open questions, one for the answer.

        Questions with several right answers are left out, as by LASER. Metrics; higher is better for all of them:
        accuracy: with choices, whether the right one has the largest log-probability (a tie of k choices counts 1 / k);
            for an open question, whether every token of the answer is the most probable one.
        accuracy_first_token: for open questions only, whether the first token of the answer is the most probable one.
        logprob: the log-probability of the right answer divided by its number of tokens, in nats, which is minus the
            loss of LASER.

        Raises InputError if a row has another form, only some rows have choices, or no question has exactly one right
        answer, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        prefix = tokenization.prefix_of(name, context.tokenizer, self.bos)
        found = self.rows(f"tasks.{name}")
        questions = [question(f"tasks.{name} row {number}", row) for number, row in enumerate(found)]
        usable = [number for number, (_, targets, _) in enumerate(questions) if len(targets) == 1]
        if not usable:
            raise InputError(f"tasks.{name}: none of the {len(found)} questions has exactly one right answer")
        picked = self.choose(
            f"tasks.{name}", [{"number": number} for number in usable], lambda row: questions[row["number"]][0]
        )
        numbers = [row["number"] for _, row in picked]
        closed = bool(questions[numbers[0]][2])
        requests, owners, rights = [], [], []
        for i, number in enumerate(numbers):
            key = f"tasks.{name} row {number}"
            prompt, (target,), choices = questions[number]
            if bool(choices) != closed:
                raise InputError(f"{key}: a task is of choices or of open answers, not of both")
            if closed and target not in choices:
                raise InputError(f"{key}: the answer {target!r} is none of the choices {choices}")
            for answer in choices or [target]:
                requests.append(self.ask(key, context, prompt, answer, self.bos))
                owners.append(i)
                rights.append(answer == target)
        owner, right = np.array(owners), np.array(rights)
        protocol = {
            "data": self.source(),
            "digest": data.digest(
                text for n in numbers for text in (questions[n][0], *questions[n][1], *questions[n][2])
            ),
            "bos": bool(prefix),
            "context_length": context.context_length,
            "n_examples": len(numbers),
            "n_several_answers_left_out": len(found) - len(usable),
            **self.chat_protocol(context),
            **self.part_protocol(),
        }
        ones = np.ones(len(numbers))
        lengths = np.array([len(request.targets) for request in requests])

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            logprob = scores.request_logprob()
            of_right = (logprob / lengths)[right]
            lost = np.bincount(owner, np.isnan(logprob)) > 0

            def mean(score: np.ndarray) -> ExampleScores:
                return ExampleScores(np.where(lost, np.nan, score), ones)

            def share(score: np.ndarray) -> ExampleScores:
                return replace(mean(score), bounds=(0.0, 1.0))

            if not closed:
                first = scores.greedy[scores.offsets[:-1]]
                return {"accuracy": share(scores.request_greedy()), "accuracy_first_token": share(first),
                        "logprob": mean(of_right)}
            best = np.full(len(numbers), -np.inf)
            with np.errstate(invalid="ignore"):
                np.maximum.at(best, owner, logprob)
            n_best = np.bincount(owner, logprob == best[owner])
            return {"accuracy": share((logprob[right] == best) / np.maximum(n_best, 1)), "logprob": mean(of_right)}

        task = ScoredTask(name, protocol, requests, [str(number) for number in numbers], measure, example_of=owner)
        return by_column(task, f"tasks.{name}", self.cluster_column, [found[number] for number in numbers])


def question(key: str, row: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """Return the prompt without spaces around it, the distinct right answers, and the choices of a row.

    An open question has no choices. The columns of a row are those of BIG-bench (input, targets, choices and the
    prefixes), or those of tasksource/bigbench (inputs, targets, multiple_choice_targets). Raises InputError for any
    other row; its message begins with `key`.
    """
    text = row.get("inputs")
    if text is None and isinstance(row.get("input"), str):
        parts = [row.get("task_prefix"), row.get("input_prefix"), row["input"], row.get("output_prefix")]
        text = "".join(part or "" for part in parts) if all(isinstance(part, str | None) for part in parts) else None
    targets = _texts(f"{key}: targets", row.get("targets"))
    choices = _texts(f"{key}: choices", row.get("choices", row.get("multiple_choice_targets")))
    if not isinstance(text, str) or not text.strip() or not targets:
        raise InputError(
            f"{key}: needs text in the column input or inputs, and answers in targets; its columns are"
            f" {', '.join(map(str, row))}"
        )
    if choices:
        _check_choices(key, targets, choices, row.get("scores", row.get("multiple_choice_scores")))
    return text.strip(), list(dict.fromkeys(targets)), list(dict.fromkeys(choices))


def _texts(place: str, values: Any) -> list[str]:
    """Return the texts of a list without spaces around them. Raises InputError if it is not a list of texts."""
    if values is None:
        return []
    # The lists of a row from parquet or from the hub may be arrays or tuples.
    if not isinstance(values, (list, tuple, np.ndarray)) or not all(isinstance(s, str) and s.strip() for s in values):
        raise InputError(f"{place} must be a list of texts that are not empty, not {str(values)[:80]!r}")
    return [text.strip() for text in values]


def _check_choices(key: str, targets: Sequence[str], choices: Sequence[str], scores: Any) -> None:
    """Raise InputError if there is nothing to choose, or the scores of the choices do not say what `targets` says."""
    if len(set(choices)) < 2:
        raise InputError(f"{key}: a question with choices needs two of them, not only {choices[0]!r}")
    if scores is None or not len(scores):
        return
    is_list = isinstance(scores, (list, tuple, np.ndarray)) and len(scores) == len(choices)
    if not is_list or not all(isinstance(s, (int, float, np.number)) and 0 <= s < np.inf for s in scores):
        raise InputError(f"{key}: scores must be one number for each of the {len(choices)} choices, at least 0")
    right = {choice for choice, score in zip(choices, scores) if score == max(scores) > 0}
    if right != set(targets):
        named = ", ".join(sorted(right)) or "none"
        raise InputError(f"{key}: by its scores the right answers are {named}, and by its targets {', '.join(targets)}")
