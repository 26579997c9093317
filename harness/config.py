"""The settings of a study as dataclasses (Hydra structured configs) and their validation.

Below the command line only these travel. Every YAML in conf/ fills one of them; an unknown key is an error.
"""

from __future__ import annotations

import math
import re
import signal
from dataclasses import dataclass, field
from typing import Any

from harness.checks import at_least, fail, one_of
from harness.errors import InputError
from harness.search_config import SearchConfig, validate_search
from harness.task_config import validated_tasks

DTYPES = ("auto", "float32", "bfloat16", "float16")
TARGET_KINDS = ("matrix", "type", "block", "all")
REGION_BY = ("fraction", "decile", "index", "energy", "mp", "gavish_donoho")
REGION_KINDS = ("large", "bulk", "small")
CONTROLS = ("none", "random", "energy_matched", "lower_bulk")
ESTIMATORS = ("gavish_donoho", "usvt", "bulk_fit")
EDIT_MODES = ("weight", "branch")
PRECISIONS = ("exact", "adaptive")


@dataclass
class RecallModelConfig:
    """The embedded default: how the two-layer recall transformer of arXiv 2406.03068 is built and trained."""

    dim: int = 128
    hidden_dim: int = 512
    context_length: int = 64
    feed_forward: str = "mlp"  # mlp | linear | none
    n_triggers: int = 1
    noise: float = 0.5
    noise_token: str = "own"  # "own": a token of its own (vocabulary 66); or a character such as "!"
    optimizer: str = "adamw"  # adamw (linear decay) | sgd (constant, as published)
    learning_rate: float = 3e-3
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4
    batch_size: int = 64
    steps: int = 400
    checkpoint: int | None = None  # the model after so many of `steps`; null: after the last
    seed: int = 0
    cache_dir: str | None = None  # default: $XDG_CACHE_HOME/spectral-harness or ~/.cache/spectral-harness


@dataclass
class ModelConfig:
    name: str = "???"  # Hugging Face name, local folder, or "recall" for the embedded model
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "float32"
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    device_map: str | None = None  # e.g. auto, for models larger than one device
    attn_implementation: str | None = None  # sdpa | eager | flash_attention_2; null: the model's own choice
    trust_remote_code: bool = False
    recall: RecallModelConfig = field(default_factory=RecallModelConfig)


@dataclass
class TargetConfig:
    """Which matrices an ablation touches together."""

    kind: str = "matrix"  # matrix | type | block | all
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    blocks: list[int] | None = None  # null: every block


@dataclass
class RegionConfig:
    """Which singular values are removed; positions count from 0 = the largest."""

    by: str = "fraction"
    kinds: list[str] = field(default_factory=lambda: ["large", "bulk", "small"])  # fraction and energy
    values: list[float] = field(default_factory=lambda: [0.1])  # fraction and energy: size of the region, 0..1
    intervals: list[str] = field(default_factory=list)  # index: "0:16", "1:", "-8:"; fraction: "0.2:0.5"
    deciles: list[int] = field(default_factory=lambda: list(range(1, 11)))  # decile: 1 = the largest tenth
    mp: list[str] = field(default_factory=lambda: ["above", "inside", "below"])  # by mp
    estimator: str = "gavish_donoho"  # mp: gavish_donoho | usvt | bulk_fit
    tracy_widom: bool = False  # mp: widen the edges by the Tracy-Widom margin
    gavish_donoho: list[str] = field(default_factory=lambda: ["above", "below"])  # by gavish_donoho
    controls: list[str] = field(default_factory=lambda: ["none"])  # none | random | energy_matched | lower_bulk
    random_seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class AdaptiveConfig:
    """When runtime.precision=adaptive stops a cell: its delta is decided as soon as the largest of the tolerances that
    are set holds half the width of its interval. Tolerances are of the task's first metric."""

    relative: float | None = 0.1  # of the delta's own size
    of_baseline: float | None = 0.005  # of the baseline's value
    absolute: float | None = None  # in the metric's own unit
    sign: bool = False  # also stop when the interval leaves out zero
    confidence: float = 0.95
    min_examples: int = 32  # no cell stops before


@dataclass
class RuntimeConfig:
    """How it is computed: must not change the numbers beyond rounding, but batch_tokens does in low precision."""

    batch_tokens: int | None = 8192  # padded tokens per forward pass; null: `run` finds the largest that fits, once
    logit_rows: int = 1024  # rows of logits held at once
    edit: str = "weight"  # weight: one rounding to the model's dtype; branch: float32 subtraction at the output
    reuse: bool = True  # resume at the first edited block instead of running every block again
    share_context: bool = True  # feed what requests begin with once (packed trees) where that is cheaper
    stream_gib: float = 8.0  # memory on the model's device for the stream that is kept for resuming
    stream_host_gib: float = 32.0  # beyond it, on a GPU: pinned host memory; what fits into neither is run again
    decomposition_gib: float = 4.0  # memory for cached decompositions
    cache_gib: float = 10.0  # disk space for decompositions, shared by all studies; 0: none are stored
    cache_dir: str | None = None  # null: spectral-harness/decompositions in $XDG_CACHE_HOME or ~/.cache
    compile: bool = False  # torch.compile every block: minutes at the start, faster kernels after
    threads: int | None = None  # CPU threads; null: as torch decides
    examples: bool = True  # write the per-example table
    precision: str = "exact"  # exact: every example; adaptive: as many as it takes
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)


@dataclass
class ClusterConfig:
    """How `harness submit` runs the shards of a study as Slurm jobs; nothing here changes a number."""

    shards: int = 4  # jobs, each with about the same predicted cost; fewer where there are fewer ablations
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None  # per job, e.g. gpu:1
    constraint: str | None = None
    cpus_per_task: int = 4
    memory_gib: float | None = None  # null: the partition's default
    time_minutes: int = 240  # of one start; a shard that needs more requeues itself and goes on
    signal: str = "USR2"  # sent before the time limit, and on clusters that warn before preempting
    signal_seconds: int = 120  # so long before the time limit
    array_parallelism: int | None = None  # jobs of an array that run at once; null: submitit's 256
    setup: list[str] = field(default_factory=list)  # shell lines before the worker: module load, source, export
    python: str | None = None  # command that starts Python in the job, e.g. in a container; null: this one
    srun_args: list[str] = field(default_factory=list)  # e.g. --container-image=...
    options: list[str] = field(default_factory=list)  # others of sbatch: [nodelist=n1,exclusive]
    retry_failed: bool = False  # submit cells with error rows again
    wait: bool = False  # stay until no shard is left, with a progress bar; false: submit and return
    poll_seconds: float = 15.0  # between two looks while waiting


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    tasks: dict[str, Any] = field(default_factory=dict)  # name -> one of task_config.TASK_KINDS
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    output: str | None = None  # folder of the study; null: results/<model>-<study id>
    seed: int = 0


def validate_model(model: ModelConfig) -> None:
    if model.name in ("", "???"):
        raise InputError("model.name: must be set, for example model.name=openai-community/gpt2 or a local folder")
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", model.device):
        fail("model.device", model.device, "use auto, cpu, cuda or cuda:<index>")
    _validate_attention(model)
    one_of("model.dtype", model.dtype, DTYPES)
    recall = model.recall
    for key in ("dim", "hidden_dim", "n_triggers", "batch_size", "steps"):
        at_least(f"model.recall.{key}", getattr(recall, key), 1)
    at_least("model.recall.context_length", recall.context_length, 8)
    at_least("model.recall.seed", recall.seed, 0)
    one_of("model.recall.feed_forward", recall.feed_forward, ("mlp", "linear", "none"))
    one_of("model.recall.optimizer", recall.optimizer, ("adamw", "sgd"))
    if recall.checkpoint is not None and not 0 <= recall.checkpoint <= recall.steps:
        fail("model.recall.checkpoint", recall.checkpoint, f"it must be within 0..{recall.steps}, model.recall.steps")
    if not 0 <= recall.noise < 1:
        fail("model.recall.noise", recall.noise, "it must be within 0..1, and below 1")


def _validate_attention(model: ModelConfig) -> None:
    name, key = model.attn_implementation, "model.attn_implementation"
    if name is None or "/" in name:  # with a slash: a kernel on the hub
        return
    if model.name == "recall":
        return one_of(key, name, ("sdpa", "eager"))
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    one_of(key, name, ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())))


def _validate_region(region: RegionConfig) -> None:
    one_of("region.by", region.by, REGION_BY)
    for kind in region.kinds:
        one_of("region.kinds", kind, REGION_KINDS)
    if region.by in ("fraction", "energy"):
        for value in region.values:
            if not 0 < value <= 1 or math.isnan(value):
                fail("region.values", value, "a fraction must be above 0 and at most 1")
    if region.intervals and region.by not in ("fraction", "energy", "index"):
        fail("region.intervals", region.intervals, f"region.by={region.by} takes none; use fraction, energy or index")
    _require_regions(region)
    for decile in region.deciles:
        if not 1 <= decile <= 10:
            fail("region.deciles", decile, "deciles are 1 (the largest tenth) to 10 (the smallest)")
    for kind in region.mp:
        one_of("region.mp", kind, ("above", "inside", "below"))
    for side in region.gavish_donoho:
        one_of("region.gavish_donoho", side, ("above", "below"))
    one_of("region.estimator", region.estimator, ESTIMATORS)
    if "lower_bulk" in region.controls and region.by != "mp":
        fail("region.controls", "lower_bulk", "it is matched to the outliers of region.by=mp")
    for control in region.controls:
        one_of("region.controls", control, CONTROLS)
    if {"random", "energy_matched"} & set(region.controls) and not region.random_seeds:
        fail("region.random_seeds", [], "the controls random and energy_matched need at least one, for example [0]")
    for seed in region.random_seeds:
        at_least("region.random_seeds", seed, 0)


def _require_regions(region: RegionConfig) -> None:
    """An empty list that region.by reads would leave a study of controls."""
    if region.by == "index" and not region.intervals:
        fail("region.intervals", [], 'region.by=index needs at least one, for example ["0:16"]')
    if region.by in ("fraction", "energy") and not region.intervals:
        for key, example in (("kinds", "[small]"), ("values", "[0.1]")):
            if not getattr(region, key):
                fail(f"region.{key}", [], f"name at least one, for example {example}, or set region.intervals")
    for key, example in (("decile", "[10]"), ("mp", "[above]"), ("gavish_donoho", "[below]")):
        name = "deciles" if key == "decile" else key
        if region.by == key and not getattr(region, name):
            fail(f"region.{name}", [], f"region.by={key} needs at least one, for example {example}")


def _validate_compile(config: Config) -> None:
    if config.runtime.compile and config.runtime.edit == "branch":
        fail("runtime.compile", True, "branches are hooks, which compiled blocks leave out; use runtime.edit=weight")
    if config.runtime.compile and config.model.device_map is not None:
        fail("runtime.compile", True, "it needs the whole model on one device; leave model.device_map unset")


def require_batch_tokens(runtime: RuntimeConfig, command: str) -> None:
    """Raises InputError where the batch is to be found by a run."""
    if runtime.batch_tokens is None:
        fail("runtime.batch_tokens", None, f"harness run finds it on its device; harness {command} needs a number")


def _validate_cluster(cluster: ClusterConfig) -> None:
    for key in ("shards", "cpus_per_task", "time_minutes", "array_parallelism", "signal_seconds"):
        at_least(f"cluster.{key}", getattr(cluster, key), 1)
    for key in ("memory_gib", "poll_seconds"):
        at_least(f"cluster.{key}", getattr(cluster, key), 0.1)
    if cluster.signal.startswith("SIG") or not hasattr(signal, f"SIG{cluster.signal}"):
        fail("cluster.signal", cluster.signal, "it must be the name of a signal without SIG, for example USR2")
    # Slurm may send the signal a minute early, and kills at the limit whatever the job is doing then
    least = math.ceil((2 * cluster.signal_seconds + 60) / 60)
    if cluster.time_minutes < least:
        fail("cluster.time_minutes", cluster.time_minutes,
              f"with cluster.signal_seconds={cluster.signal_seconds} it must be at least {least}")


def _validate_adaptive(runtime: RuntimeConfig) -> None:
    one_of("runtime.precision", runtime.precision, PRECISIONS)
    adaptive, key = runtime.adaptive, "runtime.adaptive"
    tolerances = {name: getattr(adaptive, name) for name in ("relative", "of_baseline", "absolute")}
    for name, value in tolerances.items():
        if value is not None and not value > 0:
            fail(f"{key}.{name}", value, "a tolerance is above 0; null: none")
    if not 0.5 <= adaptive.confidence < 1:
        fail(f"{key}.confidence", adaptive.confidence, "it must be at least 0.5 and below 1, for example 0.95")
    at_least(f"{key}.min_examples", adaptive.min_examples, 8)
    if runtime.precision == "adaptive" and not adaptive.sign and all(v is None for v in tolerances.values()):
        fail(key, None, "set relative, of_baseline, absolute or sign; without any no cell would stop")
    if runtime.precision == "exact" and adaptive != AdaptiveConfig():
        fail("runtime.precision", "exact", "the settings of runtime.adaptive need runtime.precision=adaptive")


def validate(config: Config) -> Config:
    """Check every setting that can be checked without the model; tasks become their dataclasses. Raises InputError."""
    validate_model(config.model)
    one_of("target.kind", config.target.kind, TARGET_KINDS)
    if not config.target.layer_types:
        fail("target.layer_types", [], "name at least one, for example [mlp]")
    if config.target.blocks == []:
        fail("target.blocks", [], "name at least one, for example [0]; null: every block")
    at_least("seed", config.seed, 0)
    _validate_region(config.region)
    one_of("runtime.edit", config.runtime.edit, EDIT_MODES)
    at_least("runtime.batch_tokens", config.runtime.batch_tokens, 1)
    at_least("runtime.logit_rows", config.runtime.logit_rows, 1)
    for key in ("stream_gib", "stream_host_gib", "decomposition_gib", "cache_gib"):
        at_least(f"runtime.{key}", getattr(config.runtime, key), 0)
    _validate_compile(config)
    at_least("runtime.threads", config.runtime.threads, 1)
    _validate_adaptive(config.runtime)
    _validate_cluster(config.cluster)
    validate_search(config.search)
    if not config.tasks:
        fail("task", [], "choose at least one, for example task=wikitext or task=[ioi,lambada]")
    config.tasks = validated_tasks(config.tasks)
    return config
