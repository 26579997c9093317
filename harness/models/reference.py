"""The reference: the model whose matrices are subtracted from those of another one, and whether the two are a pair.

The difference D = W - W_reference of two matrices is called the change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.models.families import matrices_of, skeleton
from harness.models.loading import describe_model
from harness.models.settings import ModelSettings, ReferenceSettings

if TYPE_CHECKING:
    from harness.models.description import ModelDescription


@dataclass(frozen=True)
class Reference:
    """The reference of a model.

    settings: the settings with which it is read, in the dtype of the model. same_parameters: whether every parameter of
    the model has the name and the shape of one of the reference, so that all can be exchanged; False for a model with a
    classification head, which references rarely have.
    """

    settings: ModelSettings
    description: ModelDescription
    same_parameters: bool

    @property
    def digest(self) -> str:
        """A digest of its identity, 32 hexadecimal digits."""
        text = json.dumps(self.description.identity, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def describe_reference(
    settings: ReferenceSettings, model: ModelSettings, description: ModelDescription
) -> Reference | None:
    """Return the reference of a model, or None if there is none. No weights are read.

    model, description: the settings and the description of the model. Raises InputError if the two models are not a
    pair: if they are of different architectures, if a matrix has other sizes, or if the weights of one are quantised.
    """
    own = settings.of(model)
    if own is None:
        return None
    if model.embedded:
        raise InputError("reference.name: the embedded model is not compared; choose another model")
    if model.gguf_file is not None:
        raise InputError(f"model.gguf_file: {model.gguf_file!r} is quantised, and a change of quantised weights is"
                         " mostly the error of the quantisation; use both models in safetensors")
    dtype: Any = description.dtype
    own = dataclasses.replace(own, dtype=dtype)
    try:
        found = describe_model(own)
    except InputError as error:
        text = str(error)
        raise InputError("reference." + text.removeprefix("model.") if text.startswith("model.") else text) from error
    _refuse_quantised("model.name", model, description)
    _refuse_quantised("reference.name", own, found)
    _refuse_other_shapes(model, description, own, found)
    bare = [skeleton(one.config, one.family) for one in (description, found)]
    parameters = [{name: tuple(one.shape) for name, one in model.named_parameters()} for model in bare]
    classifier = description.family.kind == "classification"
    return Reference(own, found, parameters[0] == parameters[1] and not classifier)


def _refuse_quantised(key: str, settings: ModelSettings, description: ModelDescription) -> None:
    if getattr(description.config, "quantization_config", None) is not None:
        raise InputError(f"{key}: {settings.label!r} is quantised by its config.json, and a change of quantised weights"
                         " is mostly the error of the quantisation; use a checkpoint that is not quantised")


def _refuse_other_shapes(
    model: ModelSettings, description: ModelDescription, own: ModelSettings, found: ModelDescription
) -> None:
    kinds = [one.config.model_type for one in (description, found)]
    if kinds[0] != kinds[1]:
        raise InputError(f"reference.name: {own.label!r} is a {kinds[1]!r} model, and {model.label!r} is a {kinds[0]!r}"
                         " model; a change needs two models of one architecture")
    there = {one.name: one.shape for one in matrices_of(skeleton(found.config))}
    matrices = matrices_of(skeleton(description.config))
    for matrix in matrices:
        if there.get(matrix.name) != matrix.shape:
            shapes = [f"{shape[0]}x{shape[1]}" if shape else "absent" for shape in
                      (matrix.shape, there.get(matrix.name))]
            raise InputError(f"reference.name: {matrix.name} is {shapes[0]} in {model.label!r} and {shapes[1]} in"
                             f" {own.label!r}; a change needs two models of the same shapes")
    if len(there) > len(matrices):
        extra = next(name for name in there if name not in {one.name for one in matrices})
        raise InputError(f"reference.name: {own.label!r} has {extra}, and {model.label!r} has no such matrix; a change"
                         " needs two models of the same shapes")
