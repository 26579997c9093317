"""The settings of `harness tune`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from harness.engine.settings import ClusterSettings, ReportSettings
from harness.errors import SettingError, wrong
from harness.measurements.ablation.region_settings import RegionSettings, read_region, region_keys
from harness.models.settings import ModelSettings
from harness.models.targets import TargetSettings
from harness.optional import require
from harness.settings.constraints import Bounds, ReadBy, at_least
from harness.settings.output import require_folder
from harness.settings.plain_values import refuse_long_path
from harness.tasks.labelled_texts import Trainable
from harness.tasks.registry import tasks_of
from harness.tasks.settings import RowsTask, Task, require_file

CONFIG = "tune"  # conf/tune.yaml
Order = Literal["tune", "prune_tune", "tune_prune"]
ORDERS: tuple[Order, ...] = ("tune", "prune_tune", "tune_prune")
_OF_LORA = ("lora_rank", "lora_alpha", "lora_dropout")


@dataclass
class TuningSettings:
    """How the model is fine-tuned, in which orders with the removal, and how often.

    task: the name of the task that it is trained on; null: the only one of the tasks that can be trained on. The other
        tasks are only measured.
    data_files, split: the training rows, in the form of that task. Without data_files they are the split of the task's
        own data set on the hub. n_examples: the number of rows to use, from the first on; null: all.
    order: "tune" removes nothing. "prune_tune" removes a region and then trains. "tune_prune" trains and then removes.
    seeds: each is a fine-tuning: the head's first weights, the order of the examples, and dropout.
    method: "full" trains all weights of the blocks and the head, and the embeddings if `embeddings` says so. "lora"
        trains an adapter on the matrices of the blocks, which is merged afterwards, and a new head in full.
    schedule: of the learning rate after the warm-up. batch_size: examples per step. max_tokens: longer texts are cut to
        so many tokens for training, of a pair of sentences the longer one first; null: the model's context.
    checkpoint_every: steps between two checkpoints, from which an interrupted training goes on. keep_models: whether
        the weights of each fine-tuning stay in <folder>/trainings.
    """

    task: str | None = None
    data_files: str | None = None
    split: str = "train"
    n_examples: Annotated[int, at_least(1)] | None = None
    order: list[Order] = field(default_factory=lambda: list(ORDERS))
    seeds: list[Annotated[int, at_least(0)]] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    method: Literal["full", "lora"] = "full"
    lora_rank: Annotated[int, at_least(1)] = 8
    lora_alpha: Annotated[int, at_least(1)] = 16
    lora_dropout: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    embeddings: bool = True
    steps: Annotated[int, at_least(1)] = 500
    batch_size: Annotated[int, at_least(1)] = 32
    learning_rate: Annotated[float, Bounds(above=0)] = 5e-5
    weight_decay: Annotated[float, at_least(0)] = 0.0
    warmup_share: Annotated[float, Bounds(at_least=0, below=1)] = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    max_grad_norm: Annotated[float, Bounds(above=0)] = 1.0
    max_tokens: Annotated[int, at_least(2)] | None = None
    group_by_length: bool = False  # batches of texts of similar length, which need less padding
    bf16: bool = False  # compute in bfloat16 where torch does so by itself; weights stay in float32
    checkpoint_every: Annotated[int, at_least(1)] = 500
    keep_models: bool = False

    def __post_init__(self) -> None:
        require_file("data_files", self.data_files)
        if not self.order or len(set(self.order)) < len(self.order):
            raise wrong("order", self.order, f"name each at most once, of {', '.join(ORDERS)}")
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise wrong("seeds", self.seeds, "name at least two different ones; how much fine-tunings differ needs two")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for each setting that is not the default and that the method does not read."""
        default = TuningSettings()
        unread = _OF_LORA if self.method == "full" else ("embeddings",)
        for key in unread:
            if getattr(self, key) != getattr(default, key):
                reader = "lora" if self.method == "full" else "full"
                yield wrong(key, getattr(self, key), f"only tune.method={reader} reads it")


@dataclass
class TuneSettings:
    """The model, what is removed from it, the tasks, and the fine-tuning in the field `tune`."""

    model: ModelSettings = field(default_factory=ModelSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    region: Annotated[RegionSettings, ReadBy(read_region, region_keys)] = field(default_factory=RegionSettings)
    tasks: Annotated[dict[str, Task], ReadBy(tasks_of)] = field(default_factory=dict)
    tune: TuningSettings = field(default_factory=TuningSettings)
    batch_tokens: Annotated[int, at_least(1)] = 8192  # padded tokens of one forward pass when a task is measured
    threads: Annotated[int, at_least(1)] | None = None  # CPU threads; null: as torch decides
    cache_gib: Annotated[float, at_least(0)] = 10.0  # disk space for the decompositions of all runs; 0: no cache
    cache_dir: str | None = None  # null: spectral-harness/decompositions in $XDG_CACHE_HOME or ~/.cache
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    output: str | None = None  # folder of the run; null: results/tune-<model>-<id>

    def __post_init__(self) -> None:
        refuse_long_path("cache_dir", self.cache_dir)

    def trained_task(self) -> str:
        """Return the name of the task that the model is trained on. Raises SettingError if it is not clear."""
        able = [name for name, task in self.tasks.items() if isinstance(task, RowsTask) and isinstance(task, Trainable)]
        if self.tune.task is not None:
            if self.tune.task not in able:
                there = ", ".join(able) or "none"
                raise wrong("tune.task", self.tune.task, f"name a task that can be trained on; of the tasks: {there}")
            return self.tune.task
        if len(able) != 1:
            right = "choose a task of kind classification or label_words" if not able else f"of {', '.join(able)}, one"
            raise SettingError("tune.task", f"it is not clear on which task the model is trained; {right}")
        return able[0]


Settings = TuneSettings


def check(settings: TuneSettings) -> None:
    """Raise InputError if settings that are to be run do not make a fine-tuning."""
    settings.model.require_name()
    settings.model.require_attention()
    if settings.model.embedded:
        raise wrong("model.name", settings.model.name, "the embedded model has no text to be tuned on; name another")
    for key in ("gguf_file", "device_map"):
        if getattr(settings.model, key) is not None:
            right = "a model is fine-tuned from safetensors, on one device; leave it unset"
            raise wrong(f"model.{key}", getattr(settings.model, key), right)
    for key, value in settings.region.treatment.plain().items():
        if key not in ("keep", "scale"):
            right = "before and after a tuning, regions of the weights' own spectrum are removed, kept or scaled"
            raise wrong(f"region.{key}", value, f"{right}; leave it at its default")
    if not settings.tasks:
        raise SettingError("task", "[] is wrong; choose the task that the model is trained on, for example task=sst2")
    task = settings.tasks[settings.trained_task()]
    if settings.tune.data_files is None and getattr(task, "dataset", None) is None:
        raise SettingError("tune.data_files", "give the file with the training rows, for example sst2/train.jsonl")
    if settings.tune.method == "lora":
        require("peft", "tune", "tune.method=lora")
    require_folder(settings.output)
