"""The settings of a model: its weights, dtype and device, and for the embedded model how it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from harness.errors import SettingError, wrong
from harness.settings.constraints import Bounds, at_least
from harness.settings.plain_values import refuse_long_path

EMBEDDED = "recall"  # the name of the embedded model
LARGEST = 2**16  # of the widths and of the context, beyond which torch cannot even count the weights
_UNNAMED = "???"  # Hydra's mark of a value that must be given
# Settings that the embedded model does not read.
NOT_OF_EMBEDDED = ("revision", "gguf_file", "adapter", "device_map", "trust_remote_code")


@dataclass
class RecallModelSettings:
    """How the embedded two-layer recall transformer of arXiv 2406.03068 is built and trained."""

    dim: Annotated[int, at_least(1)] = 128
    hidden_dim: Annotated[int, at_least(1)] = 512
    context_length: Annotated[int, at_least(8)] = 64
    feed_forward: Literal["mlp", "linear", "none"] = "mlp"
    n_triggers: Annotated[int, at_least(1)] = 1
    noise: Annotated[float, Bounds(at_least=0, below=1)] = 0.5
    noise_token: str = "own"  # "own": an additional token (vocabulary 66); or a character such as "!"
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw: a linearly falling rate; sgd: a constant one, as published
    learning_rate: float = 3e-3
    momentum: float = 0.9  # sgd only
    weight_decay: float = 1e-4
    batch_size: Annotated[int, at_least(1)] = 64
    steps: Annotated[int, at_least(1)] = 400
    checkpoint: int | None = None  # the number of steps after which the model is taken; null: after all steps
    seed: Annotated[int, at_least(0)] = 0
    cache_dir: str | None = None  # default: $XDG_CACHE_HOME/spectral-harness or ~/.cache/spectral-harness

    def __post_init__(self) -> None:
        refuse_long_path("cache_dir", self.cache_dir)
        for key in ("dim", "hidden_dim", "context_length"):
            if getattr(self, key) > LARGEST:
                raise wrong(key, getattr(self, key), f"it must be at most {LARGEST}")
        if self.checkpoint is not None and not 0 <= self.checkpoint <= self.steps:
            raise wrong("checkpoint", self.checkpoint, f"it must be within 0..{self.steps}, model.recall.steps")


@dataclass
class ModelSettings:
    """Which model is measured: a Hugging Face name, a local folder, or "recall" for the embedded model.

    adapter: a LoRA adapter of peft, a local folder or a Hugging Face name, that is merged into the model. With it the
        name may be left out: the model is then the base that the adapter names.
    """

    name: str = _UNNAMED
    revision: str | None = None
    gguf_file: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    device_map: str | None = None  # e.g. auto, for models larger than one device
    attn_implementation: str | None = None  # sdpa | eager | flash_attention_2; null: the model's own choice
    trust_remote_code: bool = False
    recall: RecallModelSettings = field(default_factory=RecallModelSettings)

    def __post_init__(self) -> None:
        refuse_long_path("name", self.name)
        if self.name[:1] in "=+-@" and self.name:
            raise wrong("name", self.name, "no name on the hub begins so; write ./ before the name of a local folder")
        refuse_long_path("adapter", self.adapter)
        if self.adapter == "":
            raise wrong("adapter", "", "give the folder of an adapter or its name on the hub; null: no adapter")
        if self.adapter is not None and self.gguf_file is not None:
            raise wrong("gguf_file", self.gguf_file, "an adapter is merged into weights that are not quantised")
        if self.device == "mps":
            raise wrong("device", self.device, "it has no float64, which decompositions need; use cpu")
        if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?", self.device):
            raise wrong("device", self.device, "use auto, cpu, cuda or cuda:<index>")

    @property
    def embedded(self) -> bool:
        """Whether these are settings of the embedded model."""
        return self.name == EMBEDDED

    @property
    def label(self) -> str:
        """The name in tables: that of the model, and that of the adapter if there is one."""
        return self.name if self.adapter is None else f"{self.name} + {self.adapter}"

    @property
    def stem(self) -> str:
        """The name of the default folders of runs: that of the GGUF file, or the last part of the path of the adapter
        or the model."""
        if self.gguf_file is not None and not self.embedded:
            return Path(self.gguf_file).name.removesuffix(".gguf")
        return EMBEDDED if self.embedded else Path(self.adapter or self.name).name

    def require_name(self) -> None:
        """Raise SettingError if no model is named. An adapter names the model if the settings do not."""
        if self.name in ("", _UNNAMED) and self.adapter is not None:
            from harness.models.adapter import base_of

            self.name = base_of(self.adapter) or ""
        if self.name in ("", _UNNAMED):
            right = "must be set, for example model.name=openai-community/gpt2 or a local folder"
            raise SettingError("model.name", right)

    def require_attention(self) -> None:
        """Raise SettingError for an implementation of attention that the model does not have."""
        name = self.attn_implementation
        if name is None or "/" in name:  # a name with a slash is a kernel on the hub
            return
        if self.embedded:
            known: tuple[str, ...] = ("sdpa", "eager")
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            known = ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()))
        if name not in known:
            raise wrong("model.attn_implementation", name, f"use one of {', '.join(known)}")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for every setting that differs from its default and that this model does not read."""
        default = ModelSettings()
        if self.embedded:
            for key in NOT_OF_EMBEDDED:
                if getattr(self, key) != getattr(default, key):
                    right = f"the embedded model (model.name={EMBEDDED}) does not read it"
                    yield wrong(key, getattr(self, key), right)
            return
        for one in fields(RecallModelSettings):
            value: Any = getattr(self.recall, one.name)
            # a user may set the cache folder once and for all, in runs of any model
            if one.name != "cache_dir" and value != getattr(default.recall, one.name):
                right = f"only the embedded model reads it; model.name is {self.name!r}"
                yield wrong(f"recall.{one.name}", value, right)


@dataclass
class ReferenceSettings:
    """The model with which the study's model is compared, usually its base.

    name: null means that there is no reference, unless the model has an adapter: then it is the adapter's base. What is
    not set here, such as the device, is as for the model. The weights are read in the model's dtype.
    """

    name: str | None = None
    revision: str | None = None
    adapter: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.name is not None:
            self.of(ModelSettings())  # its checks of names
        if self.name == EMBEDDED:
            raise wrong("name", EMBEDDED, "the embedded model is not compared; name a folder or a model on the hub")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for every setting of a reference that has no name."""
        default = ReferenceSettings()
        for one in fields(self):
            if self.name is None and getattr(self, one.name) != getattr(default, one.name):
                yield SettingError("name", f"must be set, because reference.{one.name} is")

    def of(self, model: ModelSettings) -> ModelSettings | None:
        """Return the settings of the reference of a model; None if there is no reference."""
        if self.name is not None:
            return replace(model, name=self.name, revision=self.revision, adapter=self.adapter, gguf_file=None,
                           trust_remote_code=self.trust_remote_code, recall=RecallModelSettings())
        return None if model.adapter is None else replace(model, adapter=None)
