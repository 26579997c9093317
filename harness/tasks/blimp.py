"""BLiMP: whether the grammatical sentence of a minimal pair is more probable (Warstadt et al. 2020, arXiv 1912.00582).

A sentence is scored as lm-evaluation-harness does: " " + sentence is the continuation of the prefix token (BOS, or EOS
without BOS), so that its first token is scored too, and its log-probability is the sum over its tokens. An encoder
scores the sentence without a space in front by its pseudo-log-likelihood (see masked.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.settings.plain_values import NAME_RULE, is_name
from harness.tasks import data, masked, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import described, numbered
from harness.tasks.settings import FilesTask, SplitTask

COLUMNS = ("sentence_good", "sentence_bad")
HUB_SPLIT = "train"  # nyu-mll/blimp has no other split


@dataclass
class BlimpTask(ChatTask, FilesTask, SplitTask):
    """Minimal pairs: whether the grammatical sentence is the more probable one."""

    subsets: list[str] = field(default_factory=list)  # names of paradigms; empty: all that the data hold
    user_prompt: str = "Write a sentence."  # the user's turn in a chat, to which each sentence is an answer
    kind: ClassVar[str] = "blimp"
    measured_on: ClassVar[tuple[str, ...]] = ("causal", "masked")

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with two requests for each pair or, for an encoder, one for each token of the two sentences.

        Metrics; higher is better for all of them: accuracy over all pairs, and accuracy_<paradigm> for each paradigm,
        in whose ExampleScores the pairs of other paradigms have score and weight 0. A tie counts one half, which is
        chance (lm-eval counts it as right). The paradigms are the clusters of the accuracy over all pairs.
        Raises InputError if a paradigm is missing, a folder has no .jsonl files, a sentence is empty, or all pairs
        of a paradigm are of equal sentences, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        paradigms = _paradigms(f"tasks.{name}", self)
        mask = None
        if context.kind == "masked":
            mask = masked.mask_token(name, context.tokenizer)
        requests, counts, ids, paradigm_of = [], [], [], []
        for paradigm, pairs in paradigms.items():
            # BLiMP itself has a pair of equal sentences (passive_1, row 324), which is a tie.
            if not is_name(paradigm):
                raise InputError(f"tasks.{name}: {paradigm[:80]!r} cannot be the name of a paradigm; {NAME_RULE}")
            if all(row["sentence_good"].strip() == row["sentence_bad"].strip() for _, row in pairs):
                raise InputError(f"tasks.{name} {paradigm}: in all {len(pairs)} pairs the sentences are the same")
            for number, row in pairs:
                key = f"tasks.{name} {paradigm} row {number}"
                data.refuse_empty(f"tasks.{name} {paradigm}", [(number, row)], COLUMNS)
                for column in COLUMNS:
                    sentence = self._sentence(key, context, row[column], mask)
                    requests += sentence
                    counts.append(len(sentence))
                ids.append(f"{paradigm}/{number}")
                paradigm_of.append(paradigm)
        clusters = numbered(paradigm_of) if len(paradigms) > 1 else None
        protocol = {
            "data": self.dataset if self.data_files is None else Path(self.data_files).name,
            "digest": data.digest(
                row[column] for pairs in paradigms.values() for _, row in pairs for column in COLUMNS
            ),
            **({} if self.chat else
               {"prefix_token": tokenization.prefix_token(context.tokenizer), "leading_space": True}
               if mask is None else {"mask_token_id": mask}),
            "paradigms": {paradigm: len(pairs) for paradigm, pairs in paradigms.items()},
            "n_examples": len(ids),
            **({} if clusters is None else described(clusters, "paradigms")),
            **self.chat_protocol(context),
            **self.part_protocol(),
        }
        lengths = np.array(counts)
        starts = np.cumsum(lengths) - lengths
        masks = {paradigm: (np.array(paradigm_of) == paradigm).astype(np.float64) for paradigm in paradigms}

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            good, bad = np.add.reduceat(scores.request_logprob(), starts).reshape(-1, 2).T
            correct = np.heaviside(good - bad, 0.5)  # NaN for NaN, so that a lost answer is not counted as wrong
            # One paradigm was written by one template. The pairs of a paradigm are independent as examples of itself.
            metrics = {
                "accuracy": ExampleScores(correct, np.ones(len(correct)), bounds=(0.0, 1.0), clusters=clusters)
            }
            for paradigm, mask in masks.items():
                metrics[f"accuracy_{paradigm}"] = ExampleScores(
                    np.where(mask > 0, correct, 0.0), mask, bounds=(0.0, 1.0)
                )
            return metrics

        example_of = np.arange(len(ids)).repeat(2).repeat(lengths)
        return ScoredTask(name, protocol, requests, ids, measure, example_of=example_of)

    def chat_protocol(self, context: TaskContext) -> dict[str, Any]:
        """Return what the protocol says of the template, the user's turn among it."""
        found = super().chat_protocol(context)
        return {"chat": {**found["chat"], "user_prompt": self.user_prompt}} if found else {}

    def _sentence(self, key: str, context: TaskContext, text: str, mask: int | None) -> list[Request]:
        if self.chat:
            return [self.ask(key, context, self.user_prompt, text)]
        if mask is not None:
            return masked.sentence_requests(key, context, text, mask)
        return [tokenization.pair_request(key, context, "", " " + text)]


def _paradigms(key: str, task: BlimpTask) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Return for each paradigm its pairs with their row numbers, in the order of `subsets` or of the names."""
    if task.data_files is not None:
        path = Path(task.data_files).expanduser()
        if not path.is_dir():
            return _from_file(key, task, task.data_files)
        there = sorted(file.stem for file in path.glob("*.jsonl"))
        if not there:
            raise InputError(f"{key}.data_files: no .jsonl files in {task.data_files}")
        sources = {one: data.DataSource(str(path / f"{one}.jsonl")) for one in _chosen(key, task, there)}
    elif task.dataset is not None:
        subsets = _chosen(key, task, _hub_subsets(key, task.dataset))
        sources = {one: data.DataSource(None, task.dataset, one, HUB_SPLIT) for one in subsets}
    else:
        raise InputError(f"{key}: set data_files to a folder of <paradigm>.jsonl files or dataset to a hub name")
    return {one: task.choose(key, source.rows(key, COLUMNS), _sentence_of) for one, source in sources.items()}


def _from_file(key: str, task: BlimpTask, file: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Return the same for the rows of one file. The paradigm of a row is its UID, or the file's name without one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data.DataSource(file).rows(key, COLUMNS):
        found.setdefault(str(row.get("UID", Path(file).stem)), []).append(row)
    return {s: task.choose(key, found[s], _sentence_of) for s in _chosen(key, task, sorted(found))}


def _sentence_of(pair: dict[str, Any]) -> str:
    return pair["sentence_good"]


def _chosen(key: str, task: BlimpTask, there: list[str]) -> list[str]:
    unknown = [subset for subset in task.subsets if subset not in there]
    if unknown:
        raise InputError(f"{key}.subsets: no paradigm {', '.join(unknown)}; there are {', '.join(there)}")
    return list(dict.fromkeys(task.subsets)) or there


def _hub_subsets(key: str, dataset: str) -> list[str]:
    try:
        import datasets

        return datasets.get_dataset_config_names(dataset)
    except Exception as error:
        raise data.hub_error(key, dataset, error) from error
