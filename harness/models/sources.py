"""Read the matrices of a model one at a time: from its checkpoint if the layout of that allows, else from memory.

A matrix that is streamed from the checkpoint needs the memory of one parameter, whatever the size of the model, and has
the same values as in a model that `load` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.errors import InputError, one_line
from harness.models.checkpoint import WeightFile, private_copy, read_tensor, refuse_unscaled
from harness.models.description import ModelDescription
from harness.models.families import matrices_of, skeleton
from harness.models.loading import TORCH_DTYPES, LoadedModel, load, pick_device
from harness.models.matrices import Matrix
from harness.models.pretrained import stored_name, weight_files
from harness.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MatrixSource:
    """The matrices of a model, and a way to read them.

    matrices: as `matrices_of` returns them. read: a function from a matrix to a copy [out, in] in the model's dtype, on
    the device of the settings. how: where the values come from, "streamed", "loaded" or "initialised".
    """

    matrices: tuple[Matrix, ...]
    read: Callable[[Matrix], Tensor]
    how: str


@dataclass
class _Checkpoint:
    """Takes the place of the model in `Matrix.read`: its parameters are read from the checkpoint.

    The last parameter is kept, because the next matrix may be in the same one (fused q, k and v; experts).
    """

    tensor: Callable[[str], Tensor]
    last: tuple[str, Tensor] | None = None

    def get_parameter(self, name: str) -> Tensor:
        if self.last is None or self.last[0] != name:
            self.last = None  # so that there is never more than one parameter in memory
            self.last = (name, self.tensor(name))
        return self.last[1]


def from_model(loaded: LoadedModel, how: str = "loaded") -> MatrixSource:
    """Return the matrices of a model that is in memory. how: as in MatrixSource."""
    return MatrixSource(loaded.matrices, lambda matrix: matrix.read(loaded.model), how)


def open_source(settings: ModelSettings, description: ModelDescription) -> MatrixSource:
    """Return the matrices of a model, streamed from its checkpoint if that is possible.

    It is possible for a GGUF file, and for safetensors whose tensors have the model's own names. Other checkpoints
    (experts in separate tensors) are loaded whole. Raises InputError as `load` does.
    """
    if description.source != "recall" and settings.device_map is None:
        model = skeleton(description.config)
        tensor = _gguf_tensors(settings, description, model) if settings.gguf_file else None
        tensor = tensor or (None if settings.gguf_file else _safetensors(settings, description, model))
        if tensor is not None:
            device, dtype = pick_device(settings.device), TORCH_DTYPES[description.dtype]
            checkpoint = _Checkpoint(tensor)
            return MatrixSource(
                matrices_of(model), lambda matrix: matrix.read(checkpoint).to(device, dtype), "streamed"
            )
    return from_model(load(settings, description))


def initialised(settings: ModelSettings, description: ModelDescription, seed: int) -> LoadedModel:
    """Return the model with random weights, as its own code initialises them.

    They are drawn in float32 on the CPU from `seed`, and then cast to the model's dtype. Those of the embedded model
    are drawn from its `model.recall.seed` instead: they are its weights before training. Raises InputError for a device
    that this machine does not have.
    """
    from harness.models.families import blocks_of

    device = pick_device(settings.device)
    if description.source == "recall":
        from harness.models.recall_training import initial_model

        model: PreTrainedModel = initial_model(settings.recall)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = description.family.auto_class().from_config(description.config, dtype=torch.float32)
    model = model.to(TORCH_DTYPES[description.dtype])  # type: ignore[arg-type]  # transformers' wrapper loses `self`
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    return LoadedModel(model, None, description, matrices_of(model), blocks_of(model), device)


def _safetensors(
    settings: ModelSettings, description: ModelDescription, model: PreTrainedModel
) -> Callable[[str], Tensor] | None:
    """Return a function from the name of a parameter to its tensor, which it reads from safetensors.

    None if the checkpoint does not hold the parameters of all matrices under their own names and in their own shapes.
    """
    files = weight_files(settings, description)
    refuse_unscaled(files, description.config)
    where = {name: file for file in files for name in file.tensors}
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found: dict[str, tuple[WeightFile, str]] = {}
    for name in {matrix.parameter for matrix in matrices_of(model)}:
        shape = tuple(model.get_parameter(name).shape)
        key = stored_name(name, prefix, where)
        if key is None or where[key].tensors[key].shape != shape:
            return None
        found[name] = where[key], key
    adapter = description.adapter
    if adapter is not None:
        return lambda name: adapter.merged(name, read_tensor(*found[name]))
    return lambda name: read_tensor(*found[name])


def _gguf_tensors(
    settings: ModelSettings, description: ModelDescription, model: PreTrainedModel
) -> Callable[[str], Tensor] | None:
    """Return a function from the name of a parameter to its tensor, which it reads from a GGUF file and dequantises.

    The code of transformers names and permutes the tensors. None if this version of transformers does not have that
    code, and if it makes one parameter of several tensors, as for experts.
    """
    try:
        from gguf import GGUFReader, dequantize
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )
    except ImportError:
        return None
    if any(matrix.expert is not None for matrix in matrices_of(model)):
        return None
    try:
        with private_copy(weight_files(settings, description)[0]) as copy:
            reader = GGUFReader(copy.name)  # it maps the file into memory, which remains after the file is deleted
    except (OSError, ValueError) as error:
        raise InputError(f"model.gguf_file: cannot read {settings.gguf_file}: {one_line(error)}") from error
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else ""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=description.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError:  # an architecture that has another name in GGUF
        return None
    stored: dict[str, Any] = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    if not {matrix.parameter for matrix in matrices_of(model)} <= set(stored):
        return None

    def tensor(name: str) -> Tensor:
        packed = stored[name]
        weights = dequantize(packed.data, packed.tensor_type)
        processed = processor.process(
            weights=weights, name=packed.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
        )
        return torch.from_numpy(processed.weights.copy())

    return tensor
