"""The settings of a task of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from harness.evaluation.requests import TaskContext
from harness.settings.constraints import at_least
from harness.settings.plain_values import refuse_long_path
from harness.tasks.chat import ChatTask
from harness.tasks.evaluate_metrics import Metrics
from harness.tasks.settings import LimitedTask, require_file


@dataclass(kw_only=True)
class LmEvalSettings(ChatTask, LimitedTask):
    """A task, group or tag of lm-evaluation-harness. task: its name there."""

    task: str
    num_fewshot: Annotated[int, at_least(0)] | None = None  # null: the task's own default
    data_files: dict[str, str] = field(default_factory=dict)  # split -> local file; empty: the hub
    include_path: str | None = None  # folder with task YAML files of the user
    seed: Annotated[int, at_least(0)] = 1234  # seed of the few-shot sampler
    metrics: Metrics = field(default_factory=list)  # metrics of Hugging Face evaluate, if the task generates text
    fewshot_as_turns: bool = True  # in a chat: whether each few-shot example is a turn of its own
    cluster_column: str | None = None  # field of a document that those of one cluster share, such as their passage
    kind: ClassVar[str] = "lm_eval"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_long_path("include_path", self.include_path)
        for split, path in self.data_files.items():
            require_file(f"data_files.{split}", path)

    def chat_protocol(self, context: TaskContext) -> dict[str, Any]:
        """Return what the protocol says of the template, and whether few-shot examples are turns."""
        found = super().chat_protocol(context)
        return {"chat": {**found["chat"], "fewshot_as_turns": self.fewshot_as_turns}} if found else {}
