"""From the model settings to a model in memory: hub name, local folder, GGUF file, or the embedded default."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.config import ModelConfig
from harness.errors import InputError
from harness.models.families import Family, blocks_of, family_of, matrices_of
from harness.models.identity import hub_identity, local_identity
from harness.models.matrices import Matrix

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model before its weights are read.

    source: what `from_pretrained` takes (a hub name or a folder). identity: goes into every cell id, so it changes
    when the weights do. dtype: the resolved name, never "auto".
    """

    source: str
    identity: dict[str, Any]
    config: Any
    family: Family
    dtype: str
    context_length: int

    @property
    def revision(self) -> str | None:
        """The commit to read from the hub, so that tokenizer and weights are those of one moment."""
        return self.identity.get("revision")


@dataclass
class LoadedModel:
    """A model ready to be edited and scored. `blocks` are in execution order; `matrices` name their block by index.

    missing: weights of its head that the checkpoint does not hold, so that they are random; see `require_head`.
    """

    model: torch.nn.Module
    tokenizer: Any
    description: ModelDescription
    matrices: tuple[Matrix, ...]
    blocks: list[torch.nn.Module]
    device: torch.device
    missing: tuple[str, ...] = ()

    @property
    def context_length(self) -> int:
        return self.description.context_length


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def context_length_of(model_config: Any) -> int:
    """The longest sequence the architecture accepts; 2048 where positions are relative and no limit is stated."""
    for key in ("max_position_embeddings", "n_positions", "context_length", "n_ctx"):
        value = getattr(model_config, key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa's position table starts after the padding index
            return value - 2 if model_config.model_type == "roberta" else value
    return 2048


def recall_identity(config: ModelConfig) -> dict[str, Any]:
    from harness.models.recall_training import training_digest

    return {"digest": training_digest(config.recall)}


def describe(config: ModelConfig, classifier: bool = False) -> ModelDescription:
    """Read a model's configuration, not its weights. Raises InputError for what does not exist or is not known.

    classifier: to be loaded with a classification head instead of the family's usual one.
    """
    if config.name == "recall":
        from harness.models.recall import recall_config

        model_config = recall_config(config.recall)
        dtype = "float32" if config.dtype == "auto" else config.dtype
        return ModelDescription("recall", recall_identity(config), model_config, family_of(model_config), dtype,
                                model_config.context_length)
    from transformers import AutoConfig

    folder = Path(config.name).expanduser()
    local = folder.is_dir()
    if not local and (folder.exists() or config.name.startswith((".", "/", "~")) or config.name.count("/") > 1):
        raise InputError(
            f"model.name: {config.name!r} is not a folder; give a local folder, a Hugging Face name, or recall"
        )
    source = str(folder) if local else config.name
    kwargs = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    try:
        identity = local_identity(folder, config) if local else hub_identity(config)
        model_config = AutoConfig.from_pretrained(
            source, revision=identity.get("revision"), trust_remote_code=config.trust_remote_code, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        where = "local folder" if local else "Hugging Face name (offline: download it first, or give a local folder)"
        raise InputError(f"model.name: cannot read {config.name!r} as a {where}: {_one_line(error)}") from error
    family = family_of(model_config).with_classifier() if classifier else family_of(model_config)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    dtype = config.dtype
    if dtype == "auto":
        stated = getattr(model_config, "dtype", None) or getattr(text_config, "dtype", None)
        dtype = str(stated).removeprefix("torch.") if stated is not None else "float32"
        dtype = dtype if dtype in TORCH_DTYPES else "float32"
    return ModelDescription(source, identity, model_config, family, dtype, context_length_of(text_config))


def load_tokenizer(config: ModelConfig, description: ModelDescription) -> Any:
    """The model's tokenizer; None for the embedded model, whose tasks make their own tokens."""
    if description.source == "recall":
        return None
    from transformers import AutoTokenizer

    kwargs = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(
            description.source, revision=description.revision, trust_remote_code=config.trust_remote_code, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.name: no tokenizer for {config.name!r}: {_one_line(error)}") from error


def pick_device(name: str) -> torch.device:
    """For `auto`: the accelerator of this process's local rank where there is one, else the CPU.

    Raises InputError for a device that this machine does not have.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device: {name!r} asked for, but torch sees no CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= (n := torch.cuda.device_count()):
        raise InputError(f"model.device: {name!r} is not there; CUDA devices here are cuda:0 to cuda:{n - 1}")
    return device


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"model.name: {name!r} has weights that are not finite (NaN or infinite), first in {key};"
                " use another checkpoint"
            )


def load(
    config: ModelConfig, description: ModelDescription | None = None, tokenizer: Any = None, progress: bool = True
) -> LoadedModel:
    """Load weights (safetensors, or GGUF dequantised), check that they are finite, map them to matrices.

    Raises InputError where a file, a dtype, a device, or a weight of the body is not there. Weights that only the head
    lacks are listed in `missing`: a spectrum does not need them, a score does.
    """
    description = description or describe(config)
    device = pick_device(config.device)
    dtype = TORCH_DTYPES[description.dtype]
    if description.source == "recall":
        from harness.models.recall import load_recall
        from harness.models.recall_training import ensure_trained

        trained = ensure_trained(config.recall, device, progress)
        model, missing = load_recall(trained, config.attn_implementation or "sdpa").to(dtype), ()
    else:
        model, missing = _from_pretrained(config, description, dtype)
    if config.device_map is None:
        model = model.to(device)
    else:
        device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    _check_finite(model, config.name)
    tokenizer = tokenizer or load_tokenizer(config, description)
    return LoadedModel(model, tokenizer, description, matrices_of(model), blocks_of(model), device, missing)


def require_head(loaded: LoadedModel) -> None:
    """Raises InputError where weights of the head would be random: no score of such a model means anything."""
    if loaded.missing:
        saved_as = ", ".join(getattr(loaded.model.config, "architectures", None) or ["another class"])
        raise InputError(
            f"model.name: {loaded.description.source!r} holds no weights for {_some(loaded.missing)}, so that"
            f" {type(loaded.model).__name__} cannot be scored (it was saved as {saved_as});"
            " use a checkpoint that has this head"
        )


def _some(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _missing_of_head(model: torch.nn.Module, missing: set[str], name: str) -> tuple[str, ...]:
    """The weights that a checkpoint does not hold, if all of them are of the head; else raises InputError."""
    # where the body is the whole model (T5) its head stands beside the stacks
    body = dict(model.named_modules() if model.base_model is model else model.base_model.named_modules())
    head = model.get_output_embeddings()
    of_body = {
        id(parameter)
        for module in body.values() if module is not head
        for parameter in module.parameters(recurse=False)
    }
    # BERT's pooler counts as part of the head: only classifiers use it
    lacking = sorted(key for key, p in model.named_parameters()
                     if key in missing and id(p) in of_body and ".pooler." not in f".{key}")
    if lacking:
        raise InputError(
            f"model.name: {name!r} is not complete: it holds no weights for {_some(tuple(lacking))};"
            " use another checkpoint"
        )
    return tuple(sorted(missing))


def _from_pretrained(
    config: ModelConfig, description: ModelDescription, dtype: torch.dtype
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model, and the names of weights of its head that the checkpoint does not hold."""
    from transformers.utils import logging as transformers_logging

    kwargs: dict[str, Any] = {"gguf_file": config.gguf_file} if config.gguf_file else {"use_safetensors": True}
    if config.device_map is not None:
        kwargs["device_map"] = config.device_map
    loader: Callable = description.family.auto_class().from_pretrained
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of missing weights is ours to make, in one line
    try:
        model, info = loader(
            description.source, revision=description.revision, dtype=dtype,
            attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True, **kwargs,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(f"model.name: cannot load {config.name!r}: {_one_line(error)}") from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise InputError(
            f"model.name: {config.name!r} does not fit its config: weights that the model stores together (its experts)"
            " are missing or of other sizes in the file; use another checkpoint"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"model.name: {config.name!r} does not fit its config: {key} is {list(stored)} in the file and"
            f" {list(expected)} by config.json; use another checkpoint"
        )
    return model, _missing_of_head(model, set(info["missing_keys"]), config.name)


def loaded_from(model: torch.nn.Module, tokenizer: Any = None, identity: dict[str, Any] | None = None) -> LoadedModel:
    """Wrap a model that is already in memory (fine-tuned in this process, say) so that it can be edited and scored."""
    model_config = model.config
    parameter = next(model.parameters())
    family = family_of(model_config)
    if type(model).__name__.endswith("ForSequenceClassification"):
        family = family.with_classifier()
    description = ModelDescription("memory", identity or {}, model_config, family,
                                   str(parameter.dtype).removeprefix("torch."), context_length_of(model_config))
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, description, matrices_of(model), blocks_of(model), parameter.device)
