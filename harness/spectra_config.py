"""The settings of `harness spectra` as a dataclass (a Hydra structured config) and their validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from harness.checks import at_least, fail, one_of
from harness.config import ESTIMATORS, ModelConfig, validate_model
from harness.task_config import RecallTask, TextTask, validated_tasks

INITS = ("trained", "random", "both")


@dataclass
class SpectraConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    blocks: list[int] | None = None  # null: every block
    init: str = "trained"  # trained | random: freshly initialised, the control | both
    revisions: list[str] = field(default_factory=list)  # checkpoints of training: hub revisions or local folders
    estimator: str = "gavish_donoho"  # of the noise: gavish_donoho | usvt | bulk_fit
    tracy_widom: bool = False  # widen the edges by the Tracy-Widom margin
    vectors: bool = True  # the statistics of singular vectors, and their table
    tasks: dict[str, Any] = field(default_factory=dict)  # the text of the activation covariance; none: no overlaps
    batch_tokens: int = 8192  # padded tokens per forward pass over that text
    threads: int | None = None  # CPU threads; null: as torch decides
    output: str | None = None  # folder; null: results/spectra-<model>-<id>
    seed: int = 0  # of init=random


def validate_spectra(config: SpectraConfig) -> SpectraConfig:
    """Check every setting that can be checked without the model; the task becomes its dataclass. Raises InputError."""
    validate_model(config.model)
    one_of("init", config.init, INITS)
    one_of("estimator", config.estimator, ESTIMATORS)
    at_least("batch_tokens", config.batch_tokens, 1)
    at_least("threads", config.threads, 1)
    if not config.layer_types:
        fail("layer_types", [], "name at least one, for example [mlp]")
    if config.blocks == []:
        fail("blocks", [], "name at least one, for example [0]; null: every block")
    at_least("seed", config.seed, 0)
    if len(set(config.revisions)) < len(config.revisions):
        fail("revisions", config.revisions, "each may be named once")
    if config.revisions and config.model.revision is not None:
        fail("model.revision", config.model.revision, "name it among the revisions")
    if config.tasks and not config.vectors:
        fail("vectors", config.vectors, "the overlap with a task's activations needs vectors=true")
    if len(config.tasks) > 1:
        fail("task", list(config.tasks), "the covariance is taken over one text; choose one, for example wikitext")
    config.tasks = validated_tasks(config.tasks)
    for name, task in config.tasks.items():
        if not isinstance(task, (TextTask, RecallTask)):
            fail(f"tasks.{name}.kind", task.kind, "the covariance is taken over a task of kind text or recall")
    return config
