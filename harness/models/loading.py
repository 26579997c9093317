"""Load the model of the settings: by its name on the hub, from a local folder or GGUF file, or the embedded model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from harness import startup
from harness.errors import InputError, one_line
from harness.models.adapter import base_of, open_adapter
from harness.models.checkpoint import WeightFile
from harness.models.description import ModelDescription, generation_settings
from harness.models.families import Family, blocks_of, family_of, matrices_of, skeleton
from harness.models.identity import config_digests, hub_identity, local_identity, local_weights, with_adapter
from harness.models.matrices import Matrix
from harness.models.pretrained import from_files, some_of
from harness.models.settings import ModelSettings
from harness.optional import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY = "memory"  # the source of a model that the caller gave as a module
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedModel:
    """A model that can be edited and scored.

    tokenizer: None for the embedded model. matrices: as `matrices_of` returns them. blocks: in order of execution.
    missing: the names of the weights of its head that the checkpoint does not hold and that are random; see
    `require_head`.
    """

    model: PreTrainedModel
    tokenizer: Any
    description: ModelDescription
    matrices: tuple[Matrix, ...]
    blocks: list[torch.nn.Module]
    device: torch.device
    missing: tuple[str, ...] = ()

    @property
    def context_length(self) -> int:
        """The longest sequence that the model accepts, in tokens."""
        return self.description.context_length


def context_length_of(model_config: Any) -> int:
    """Return the longest sequence that the architecture accepts, in tokens; 2048 if the config states no limit."""
    for key in ("max_position_embeddings", "n_positions", "context_length", "n_ctx"):
        value = getattr(model_config, key, None)
        if isinstance(value, int) and value > 0:
            # RoBERTa counts positions from its padding index + 1, which is 2
            return value - 2 if model_config.model_type == "roberta" else value
    return 2048


def recall_identity(settings: ModelSettings) -> dict[str, Any]:
    """Return the identity of the embedded model: a digest of the settings of its training."""
    from harness.models.recall_training import training_digest

    return {"digest": training_digest(settings.recall)}


def describe_model(settings: ModelSettings, classifier: bool = False) -> ModelDescription:
    """Read a model's configuration, but not its weights.

    classifier: the model will be loaded with a classification head instead of its family's usual head. Raises
    InputError if the model does not exist, cannot be read, or is of an unknown architecture.
    """
    if settings.name == "recall":
        from harness.models.recall import recall_config

        model_config = recall_config(settings.recall)
        dtype: str = "float32" if settings.dtype == "auto" else settings.dtype
        return ModelDescription("recall", recall_identity(settings), model_config, family_of(model_config), dtype,
                                model_config.context_length)
    from transformers import AutoConfig

    if settings.gguf_file is not None:
        require("gguf", "gguf", "model.gguf_file")
    if settings.name.startswith(f"{MEMORY}/"):
        raise InputError(
            f"model.name: {settings.name!r} was handed over by a Python process; only that process can measure it"
        )
    if settings.adapter is not None:
        return _with_adapter(settings, classifier)
    folder = Path(settings.name).expanduser()
    local = os.path.isdir(folder)  # unlike Path.is_dir, it also says no to a name that is too long
    is_path = settings.name.startswith((".", "/", "~")) or settings.name.count("/") > 1
    if not local and (is_path or os.path.exists(folder)):
        raise InputError(
            f"model.name: {settings.name!r} is not a folder; give a local folder, a Hugging Face name, or recall"
        )
    source = str(folder) if local else settings.name
    kwargs = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
    files: tuple[WeightFile, ...] = ()
    try:
        before = config_digests(folder, settings) if local else []
        if local and settings.gguf_file:
            files = local_weights(folder, settings, None)
        identity = {} if local else hub_identity(settings)
        model_config = AutoConfig.from_pretrained(
            source, revision=identity.get("revision"), trust_remote_code=settings.trust_remote_code, **kwargs
        )
        family = family_of(model_config)
        if local:
            files = files or local_weights(folder, settings, model_config)
            identity = local_identity(files, before)
            if config_digests(folder, settings) != before:
                raise InputError(f"model.name: the files in {folder} are being changed; wait until they are complete")
    except InputError:
        raise
    except Exception as error:  # what transformers raises for a config that it cannot read is of any type
        where = "local folder" if local else "Hugging Face name (offline: download it first, or give a local folder)"
        raise InputError(f"model.name: cannot read {settings.name!r} as a {where}: {one_line(error)}") from error
    family = family.with_classifier() if classifier else family
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    dtype = settings.dtype
    if dtype == "auto":
        stated = getattr(model_config, "dtype", None) or getattr(text_config, "dtype", None)
        dtype = str(stated).removeprefix("torch.") if stated is not None else "float32"
        dtype = dtype if dtype in TORCH_DTYPES else "float32"
    context_length = context_length_of(text_config)
    description = ModelDescription(source, identity, model_config, family, dtype, context_length, files)
    return replace(description, generation=generation_settings(settings, description))


def _with_adapter(settings: ModelSettings, classifier: bool) -> ModelDescription:
    """Describe the base, and with it the adapter that is merged into it."""
    assert settings.adapter is not None
    try:
        base = describe_model(replace(settings, adapter=None), classifier)
    except InputError as error:
        named = base_of(settings.adapter)
        if named != settings.name:
            raise
        raise InputError(f"{error}; model.adapter={settings.adapter} names this model as its base, and model.name may"
                         " name a copy of it") from error
    adapter = open_adapter(settings.adapter, skeleton(base.config, base.family))
    return replace(base, identity=with_adapter(base.identity, adapter.digest), adapter=adapter)


def load_tokenizer(settings: ModelSettings, description: ModelDescription) -> Any:
    """Return the model's tokenizer; None for the embedded model, whose tasks make their own tokens.

    Raises InputError if there is no tokenizer.
    """
    if description.source == "recall":
        return None
    from transformers import AutoTokenizer

    kwargs = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(
            description.source, revision=description.revision, trust_remote_code=settings.trust_remote_code, **kwargs
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.name: no tokenizer for {settings.name!r}: {one_line(error)}") from error


def pick_device(name: str) -> torch.device:
    """Return the device of a name.

    "cuda" is the CUDA device of this process's local rank, and "auto" the same, or the CPU if there is no CUDA device.
    Raises InputError for a device that this machine does not have, and for one without float64.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:<index>") from error
    require_float64(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"model.device: {name!r} asked for, but torch sees no CUDA device; use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= (n := torch.cuda.device_count()):
        raise InputError(f"model.device: {name!r} is not there; CUDA devices here are cuda:0 to cuda:{n - 1}")
    return device


def require_float64(device: torch.device) -> None:
    """Raise InputError if a device cannot compute in float64, in which matrices are decomposed and edited."""
    if device.type == "mps":
        raise InputError("model.device: 'mps' is wrong; it has no float64, which decompositions need; use cpu")


def _check_finite(model: torch.nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"model.name: {name!r} has weights that are not finite (NaN or infinite), first in {key};"
                " use another checkpoint"
            )


def load(
    settings: ModelSettings, description: ModelDescription | None = None, tokenizer: Any = None, progress: bool = True
) -> LoadedModel:
    """Load the weights of a model, check that they are finite, and find its matrices.

    description, tokenizer: given if they are known already. progress: show the progress of training the embedded model.
    Weights come from safetensors or, dequantised, from a GGUF file. Raises InputError if a file or a device does not
    exist, if a weight is not finite, or if the checkpoint lacks a weight outside of the head. Weights of the head that
    it lacks are listed in `missing`, because spectra do not need them and scores do (see `require_head`).
    """
    description = description or describe_model(settings)
    startup.wake()  # nothing as large as weights may wait for the collector
    device = pick_device(settings.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else libraries take memory on the first device, too
    dtype = TORCH_DTYPES[description.dtype]
    model: PreTrainedModel
    missing: tuple[str, ...]
    if description.source == "recall":
        from harness.models.recall import load_recall
        from harness.models.recall_training import ensure_trained

        trained = ensure_trained(settings.recall, device, progress)
        model = load_recall(trained, settings.attn_implementation or "sdpa")
        model, missing = model.to(dtype), ()  # type: ignore[arg-type]  # transformers' wrapper of `to` loses `self`
    else:
        model, missing = from_files(settings, description, dtype)
    if settings.device_map is None:
        model = model.to(device)  # type: ignore[arg-type]
    else:
        device = next(model.parameters()).device
    model.eval().requires_grad_(False)
    _check_finite(model, settings.name)
    tokenizer = tokenizer or load_tokenizer(settings, description)
    return LoadedModel(model, tokenizer, description, matrices_of(model), blocks_of(model), device, missing)


def train_embedded(models: Iterable[ModelSettings]) -> None:
    """Train each embedded model among these, where that is not done yet, so that not every job trains it."""
    for settings in models:
        if settings.embedded:
            from harness.models.recall_training import ensure_trained

            ensure_trained(settings.recall, pick_device(settings.device))


def require_head(loaded: LoadedModel) -> None:
    """Raise InputError if weights of the head are random, because the scores of such a model are meaningless."""
    if loaded.missing:
        saved_as = ", ".join(getattr(loaded.model.config, "architectures", None) or ["another class"])
        raise InputError(
            f"model.name: {loaded.description.source!r} holds no weights for {some_of(loaded.missing)}, so that"
            f" {type(loaded.model).__name__} cannot be scored (it was saved as {saved_as});"
            " use a checkpoint that has this head"
        )


def loaded_from(
    model: torch.nn.Module, tokenizer: Any = None, identity: dict[str, Any] | None = None, family: Family | None = None
) -> LoadedModel:
    """Return a model that is already in memory as a LoadedModel, so that it can be edited and scored.

    The module itself is not changed: its training mode, gradients and weights are the caller's. identity: it goes into
    the ids of cells, see `module_identity`. family: needed for an architecture that is not in FAMILIES; raises
    InputError if it is missing.
    """
    config = getattr(model, "config", None)
    parameter = next(model.parameters())
    require_float64(parameter.device)
    family = family or family_of(config)
    if type(model).__name__.endswith("ForSequenceClassification"):
        family = family.with_classifier()
    description = ModelDescription(
        MEMORY, identity or {}, config, family, str(parameter.dtype).removeprefix("torch."), context_length_of(config)
    )
    return LoadedModel(
        cast("PreTrainedModel", model),  # a module of another class can be edited but not scored
        tokenizer, description, matrices_of(model, family), blocks_of(model, family), parameter.device,
    )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for the time of the context, then restore the mode of each submodule."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
