"""The settings of every kind of task as dataclasses, and their validation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from harness.checks import at_least, fail, one_of
from harness.errors import InputError

PARTS = ("selection", "report")


@dataclass
class TextTask:
    """Perplexity of any text: the rows of a column joined by `separator`, cut into windows."""

    kind: str = "text"
    dataset: str | None = None  # Hugging Face data set, when data_files is null
    dataset_config: str | None = None
    split: str = "test"
    column: str = "text"
    data_files: str | None = None  # .jsonl .json .csv .parquet .txt
    separator: str = "\n\n"
    window: int | None = None  # tokens; null: 2048 or the model's context, whichever is smaller
    stride: int | None = None  # tokens; null: window (no overlap)
    limit: int | None = None  # windows


@dataclass
class RecallTask:
    """In-context recall on sequences of the embedded model's own data, clean and noisy."""

    kind: str = "recall"
    n_sequences: int = 512
    noise: float | None = None  # of the noisy set; null: as in training
    seed: int = 0


@dataclass
class RecallProbesTask:
    """Where the embedded model keeps the noise and the recall: margins, attention mass, memories of its matrices."""

    kind: str = "recall_probes"
    n_sequences: int = 128
    noise: float | None = None  # of the sequences; null: as in training
    seed: int = 0


@dataclass
class IoiTask:
    """Indirect-object identification: the name that should follow against the name that should not."""

    kind: str = "ioi"
    dataset: str | None = None
    split: str = "train"
    data_files: str | None = None
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


@dataclass
class FactualTask:
    """Factual recall: the first token of the true object against generic words."""

    kind: str = "factual"
    dataset: str | None = None
    split: str = "train"
    data_files: str | None = None  # CounterFact (prompt, ground_truth) or known facts (prompt, attribute)
    generic_words: list[str] = field(default_factory=lambda: ["the", "a", "an", "in", "of", "and", "not"])
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


@dataclass
class LambadaTask:
    """The last word of a passage: accuracy (all its tokens greedy) and perplexity per word."""

    kind: str = "lambada"
    dataset: str | None = None
    split: str = "test"
    data_files: str | None = None
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


@dataclass
class BlimpTask:
    """Minimal pairs: is the grammatical sentence the more probable one."""

    kind: str = "blimp"
    dataset: str | None = None
    subsets: list[str] = field(default_factory=list)  # names of paradigms; empty: every .jsonl file of the folder
    data_files: str | None = None  # a folder with one <subset>.jsonl per paradigm, or one file
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None  # pairs per paradigm


@dataclass
class BigbenchTask:
    """A task of BIG-bench in JSON form: multiple choice, or an answer to continue the prompt with."""

    kind: str = "bigbench"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    data_files: str | None = None
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


@dataclass
class LmEvalTask:
    """Any task of lm-evaluation-harness, by its name there."""

    kind: str = "lm_eval"
    task: str = "???"
    num_fewshot: int | None = None  # null: the task's own default
    limit: int | None = None
    data_files: dict[str, str] = field(default_factory=dict)  # split -> local file; empty: from the hub
    include_path: str | None = None  # folder with the user's own task YAML files
    seed: int = 1234  # of the few-shot sampler


@dataclass
class MaskedTask:
    """Pseudo-perplexity of an encoder: every token of every row masked in turn."""

    kind: str = "masked"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    column: str = "text"
    data_files: str | None = None
    window: int | None = None  # tokens, special ones included; longer rows are cut into pieces; null: the context
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None  # rows


@dataclass
class ClassificationTask:
    """A classifier (a checkpoint with a sequence classification head): accuracy and cross-entropy."""

    kind: str = "classification"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "validation"
    data_files: str | None = None
    text_column: str = "sentence"
    pair_column: str | None = None  # the second sentence, where the model reads pairs
    label_column: str = "label"  # a class number, or a class name of the model
    label_map: dict[str, int] = field(default_factory=dict)  # label in the data -> class number of the model
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


@dataclass
class Seq2SeqTask:
    """An encoder-decoder: log-likelihood of a target text given a source text."""

    kind: str = "seq2seq"
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "test"
    data_files: str | None = None
    source_column: str = "source"
    target_column: str = "target"
    source_prefix: str = ""  # put before every source, for example "summarize: "
    part: str | None = None  # selection | report: a split of the examples by hash; null: all, in file order
    selection_share: float = 0.2  # of the examples, when part is set
    limit: int | None = None


TASK_KINDS: dict[str, type] = {
    "text": TextTask,
    "recall": RecallTask,
    "recall_probes": RecallProbesTask,
    "ioi": IoiTask,
    "factual": FactualTask,
    "lambada": LambadaTask,
    "blimp": BlimpTask,
    "bigbench": BigbenchTask,
    "lm_eval": LmEvalTask,
    "masked": MaskedTask,
    "classification": ClassificationTask,
    "seq2seq": Seq2SeqTask,
}


def _type_matches(value: Any, annotation: str) -> bool:
    kinds = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": (list, tuple), "dict": dict}
    for part in annotation.split(" | "):
        if part == "None":
            if value is None:
                return True
        elif isinstance(value, bool) and part != "bool":
            continue
        elif isinstance(value, kinds[part.split("[")[0]]):
            return True
    return False


def task_from_dict(name: str, values: Any) -> Any:
    """The dataclass of a task from its settings; an unknown kind or key, or a value of the wrong type, is an error."""
    if not isinstance(values, dict):
        fail(f"tasks.{name}", values, f"it must be a task's settings, for example +tasks.{name}.kind=text")
    kind = values.get("kind")
    if kind not in TASK_KINDS:
        raise InputError(f"tasks.{name}.kind: {kind!r} is not a kind of task; use one of {', '.join(TASK_KINDS)}")
    schema = {f.name: f for f in fields(TASK_KINDS[kind])}
    for key, value in values.items():
        if key not in schema:
            raise InputError(f"tasks.{name}.{key}: unknown key; a task of kind {kind} takes {', '.join(schema)}")
        if value == "???":
            raise InputError(f"tasks.{name}.{key}: must be set, for example tasks.{name}.{key}=...")
        if not _type_matches(value, str(schema[key].type)):
            raise InputError(f"tasks.{name}.{key}: {value!r} is wrong; it must be of type {schema[key].type}")
    return TASK_KINDS[kind](**values)


def _validate_task(name: str, task: Any) -> None:
    key = f"tasks.{name}"
    at_least(f"{key}.limit", getattr(task, "limit", None), 1)
    at_least(f"{key}.seed", getattr(task, "seed", None), 0)
    if isinstance(task, TextTask):
        at_least(f"{key}.window", task.window, 2)
        at_least(f"{key}.stride", task.stride, 1)
    if isinstance(task, MaskedTask):
        at_least(f"{key}.window", task.window, 3)
    if isinstance(task, ClassificationTask):
        for label, number in task.label_map.items():
            if not isinstance(number, int) or number < 0:
                fail(f"{key}.label_map.{label}", number, "it must be the number of a class, from 0")
    if isinstance(task, (RecallTask, RecallProbesTask)):
        at_least(f"{key}.n_sequences", task.n_sequences, 2)
        if task.noise is not None and not 0 <= task.noise <= 1:
            fail(f"{key}.noise", task.noise, "a probability is within 0..1")
    if getattr(task, "part", None) is not None:
        one_of(f"{key}.part", task.part, PARTS)
        if not 0 < task.selection_share < 1:
            fail(f"{key}.selection_share", task.selection_share, "it must lie between 0 and 1")
    if isinstance(task, LmEvalTask):
        at_least(f"{key}.num_fewshot", task.num_fewshot, 0)
    files = getattr(task, "data_files", None)
    named = files.items() if isinstance(files, dict) else [(None, files)] if files else []
    for split, path in named:
        if not Path(path).expanduser().exists():
            where = f"{key}.data_files" + (f".{split}" if split else "")
            raise InputError(f"{where}: no such file {path!r}; give the path of an existing file")


def validated_tasks(tasks: dict[str, Any]) -> dict[str, Any]:
    """The tasks as their dataclasses, whose settings can be. Raises InputError."""
    made = {name: task if is_dataclass(task) else task_from_dict(name, task) for name, task in tasks.items()}
    for name, task in made.items():
        _validate_task(name, task)
    return made
