"""The settings of a run that say how numbers are computed, as opposed to which numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from harness.errors import wrong
from harness.settings.constraints import Bounds, at_least
from harness.settings.plain_values import refuse_long_path

GIB = 2**30


@dataclass
class AdaptiveSettings:
    """When runtime.precision=adaptive stops a cell.

    A cell stops as soon as half the width of the interval of its delta, for the task's first metric, is at most the
    largest of the tolerances that are set.
    """

    relative: Annotated[float, Bounds(above=0)] | None = 0.1  # of the delta's own size
    of_baseline: Annotated[float, Bounds(above=0)] | None = 0.005  # of the baseline's value
    absolute: Annotated[float, Bounds(above=0)] | None = None  # in the metric's own unit
    sign: bool = False  # also stop when the interval does not contain zero
    confidence: Annotated[float, Bounds(at_least=0.5, below=1)] = 0.95
    min_examples: Annotated[int, at_least(8)] = 32  # no cell stops with fewer examples

    @property
    def stops(self) -> bool:
        """Whether any tolerance or `sign` is set, without which no cell would stop."""
        return self.sign or any(value is not None for value in (self.relative, self.of_baseline, self.absolute))


@dataclass(frozen=True)
class ScoringOptions:
    """How a scorer works. None of this changes a number beyond rounding.

    batch_tokens: padded tokens per pass.
    logit_rows: output distributions that are in memory at once, which are logit_rows x vocabulary floats.
    reuse: resume at the first edited block, and leave out what nobody reads in the last one; False runs every block
        every time, at all positions.
    share_context: feed tokens with which several requests begin only once, if that is cheaper.
    stream_bytes, host_bytes: bytes for the stream at the frontier, on the model's device and, if that is full, in
        pinned host memory. Batches that fit into neither start from the first block.
    lazy: move the stream of a task to the frontier only when the task is scored, so that a task that is not scored at
        this frontier costs nothing.
    compile: compile what reads the outputs of the head. On the CPU most heads are read in parts, which is not compiled.
    cuda_graphs: replay passes as CUDA graphs: always, never, or "auto", where launching takes longer than computing.
    tree_attention: "mask", by an additive mask over all pairs of tokens of a tree, or "flex", by FlexAttention.
    """

    batch_tokens: int = 8192
    logit_rows: int = 1024
    reuse: bool = True
    share_context: bool = True
    stream_bytes: float = float("inf")
    host_bytes: float = 0.0
    lazy: bool = False
    compile: bool = False
    cuda_graphs: bool | str = False
    tree_attention: str = "mask"


@dataclass
class RuntimeSettings:
    """How a run computes its numbers. In float32 none of this changes a number beyond rounding.

    In lower precision batch_tokens does, and `edit` is a choice between two ways of rounding. With adaptive precision
    numbers are estimates. Of tasks that generate text, generation_gib is part of the id, because another batch may
    change a text in which two tokens are almost equally probable.
    """

    batch_tokens: Annotated[int, at_least(1)] | None = 8192  # padded tokens per pass; null: the largest that fits
    logit_rows: Annotated[int, at_least(1)] = 1024  # rows of logits held at once
    edit: Literal["weight", "branch"] = "weight"  # weight: one rounding; branch: float32 subtraction at the output
    reuse: bool = True  # resume at the first edited block, and leave out what nobody reads in the last one
    share_context: bool = True  # feed common first tokens of requests once (packed trees) where that is cheaper
    stream_gib: Annotated[float, at_least(0)] = 8.0  # memory on the model's device for the stream kept for resuming
    stream_host_gib: Annotated[float, at_least(0)] = 32.0  # pinned host memory for the rest of it, if that is a GPU
    # memory for the keys and values of a batch that generates text; null: 16384 tokens a batch, whatever they take
    generation_gib: Annotated[float, Bounds(above=0)] | None = None
    # memory for cached decompositions beside the one in use; null: 4, or on a GPU half of what is free
    decomposition_gib: Annotated[float, at_least(0)] | None = None
    cache_gib: Annotated[float, at_least(0)] = 10.0  # disk space for the decompositions of all studies; 0: no cache
    cache_dir: str | None = None  # null: spectral-harness/decompositions in $XDG_CACHE_HOME or ~/.cache
    compile: bool = False  # torch.compile every block and the reading of the head: it takes minutes, kernels are faster
    # launch the kernels of a batch at once on a GPU; auto: where that is faster (small models). The same bits.
    cuda_graphs: bool | str = "auto"
    tree_attention: Literal["mask", "flex"] = "mask"  # flex: FlexAttention skips what a tree's mask hides
    threads: Annotated[int, at_least(1)] | None = None  # CPU threads; null: torch decides
    examples: bool = True  # write the per-example table
    precision: Literal["exact", "adaptive"] = "exact"  # adaptive: as many examples as it takes
    adaptive: AdaptiveSettings = field(default_factory=AdaptiveSettings)

    def __post_init__(self) -> None:
        refuse_long_path("cache_dir", self.cache_dir)
        if self.precision == "adaptive" and not self.adaptive.stops:
            right = "set relative, of_baseline, absolute or sign; without any no cell would stop"
            raise wrong("adaptive", None, right)
        if self.precision == "exact" and self.adaptive != AdaptiveSettings():
            raise wrong("precision", "exact", "the settings of runtime.adaptive need runtime.precision=adaptive")
        if self.cuda_graphs not in ("auto", True, False):
            raise wrong("cuda_graphs", self.cuda_graphs, "use auto, true or false")
        if self.cuda_graphs is True and self.edit == "branch":
            raise wrong("cuda_graphs", True, "branches are hooks, which differ from cell to cell; use auto")
        if self.compile and self.edit == "branch":
            raise wrong("compile", True, "branches are hooks, which compiled blocks leave out; use runtime.edit=weight")

    def require_batch_tokens(self, command: str) -> None:
        """Raise SettingError if batch_tokens is null, which means that a run finds it. command: for the message."""
        if self.batch_tokens is None:
            right = f"harness run finds it on its device; harness {command} needs a number"
            raise wrong("runtime.batch_tokens", None, right)

    def scoring(self) -> ScoringOptions:
        """Return the options of a scorer. Raises ValueError if batch_tokens is null and has not been found yet."""
        if self.batch_tokens is None:
            raise ValueError("runtime.batch_tokens has not been found yet")
        return ScoringOptions(
            self.batch_tokens, self.logit_rows, self.reuse, self.share_context, self.stream_gib * GIB,
            self.stream_host_gib * GIB, lazy=self.precision == "adaptive", compile=self.compile,
            cuda_graphs=self.cuda_graphs, tree_attention=self.tree_attention,
        )
