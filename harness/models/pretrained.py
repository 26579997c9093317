"""Make a model of transformers from the weight files of its checkpoint."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import InputError, one_line
from harness.models.checkpoint import WeightFile, private_copy, read_state, refuse_unscaled
from harness.models.families import skeleton
from harness.models.identity import hub_weights
from harness.models.memory import is_out_of_memory
from harness.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.models.description import ModelDescription


def weight_files(settings: ModelSettings, description: ModelDescription) -> tuple[WeightFile, ...]:
    """Return the weight files of a model that is not the embedded one. Raises InputError as `hub_weights` does."""
    return description.files or hub_weights(settings, description.revision, description.config)


def from_files(
    settings: ModelSettings, description: ModelDescription, dtype: torch.dtype
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model with the weights of its files, and the names of the weights of its head that they lack.

    Raises InputError if the weights do not fit the config, if one outside of the head is missing, or if they have
    changed since they were hashed.
    """
    from transformers.utils import logging as transformers_logging

    files = weight_files(settings, description)
    refuse_unscaled(files, description.config)
    model_class, config = _class_and_config(settings, description, files)
    kwargs: dict[str, Any] = {} if settings.device_map is None else {"device_map": settings.device_map}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # instead of its report of missing weights there is an error of one line
    try:
        with ExitStack() as copies:
            if settings.gguf_file:
                private = copies.enter_context(private_copy(files[0]))
                kwargs |= {"pretrained_model_name_or_path": description.source, "gguf_file": private.name}
            else:
                kwargs |= {"pretrained_model_name_or_path": None, "state_dict": _state(settings, description, files)}
            model, info = model_class.from_pretrained(
                config=config, dtype=dtype, attn_implementation=settings.attn_implementation,
                generation_config=deepcopy(description.generation), output_loading_info=True,
                ignore_mismatched_sizes=True, **kwargs,
            )
    except InputError:
        raise
    except Exception as error:  # what transformers raises for weights that do not fit is of any type
        if is_out_of_memory(error):
            raise
        if "conversion of the weights" in str(error):
            raise InputError(
                f"model.name: {settings.name!r} does not fit its config: weights that the model stores together (its"
                " experts) are missing or of other sizes in the file; use another checkpoint"
            ) from error
        raise InputError(f"model.name: cannot load {settings.name!r}: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.config.name_or_path = description.source
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise _misfit(settings.name, key, stored, expected)
    return model, _missing_of_head(model, set(info["missing_keys"]), settings.name)


def _state(
    settings: ModelSettings, description: ModelDescription, files: Sequence[WeightFile]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the files by name, with the adapter merged into them if there is one."""
    state, adapter = read_state(files), description.adapter
    if adapter is None:
        return state
    prefix = f"{skeleton(description.config, description.family).base_model_prefix}."
    for parameter in adapter.parameters():
        key = stored_name(parameter, prefix, state)
        if key is None and parameter in adapter.changed:
            raise InputError(
                f"model.adapter: {settings.adapter!r} changes {parameter}, which {settings.name!r} stores under"
                " another name; merge it into its base with merge_and_unload of peft"
            )
        state[key or parameter] = adapter.merged(parameter, state.get(key or parameter, torch.empty(0)))
    return state


def stored_name(parameter: str, prefix: str, stored: Container[str]) -> str | None:
    """Return the name under which a checkpoint holds a parameter; None if it holds none of this name.

    prefix: the prefix of the parameters of the model's body. A checkpoint that was saved without a head lacks it, and
    one with a head has it though this model may not. stored: the names in the checkpoint.
    """
    return next((key for key in (parameter, parameter.removeprefix(prefix), prefix + parameter) if key in stored), None)


def _misfit(name: str, key: str, stored: Sequence[int], expected: Sequence[int]) -> InputError:
    return InputError(
        f"model.name: {name!r} does not fit its config: {key} is {list(stored)} in the file and {list(expected)} by"
        " config.json; use another checkpoint"
    )


def _class_and_config(
    settings: ModelSettings, description: ModelDescription, files: Sequence[WeightFile]
) -> tuple[Any, Any]:
    """Return the class that loads the model, and its config.

    The class is the checkpoint's own if the settings trust its code. A model that also reads images has a part that
    reads text, with a config of its own. Raises InputError if a parameter has another size in the files than by the
    config, before memory is taken for a size that may be absurd.
    """
    auto, config = description.family.auto_class(), description.config
    own = getattr(config, "auto_map", None) or {}
    if settings.trust_remote_code and auto.__name__ in own:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = own[auto.__name__]
        return get_class_from_dynamic_module(reference, description.source, revision=description.revision), config
    bare = skeleton(config, description.family)
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    for name, parameter in sorted(bare.named_parameters()):
        if name in stored and stored[name].shape != tuple(parameter.shape):
            raise _misfit(settings.name, name, stored[name].shape, parameter.shape)
    return type(bare), config if isinstance(config, type(bare.config)) else config.get_text_config()


def _missing_of_head(model: PreTrainedModel, missing: set[str], name: str) -> tuple[str, ...]:
    """Return the names of the missing weights, sorted. Raises InputError if one of them is outside of the head."""
    # the base model of T5 is the whole model, so that its head is among the modules of the body
    body = dict(model.named_modules() if model.base_model is model else model.base_model.named_modules())
    head = model.get_output_embeddings()
    of_body = {
        id(parameter)
        for module in body.values() if module is not head
        for parameter in module.parameters(recurse=False)
    }
    # BERT's pooler counts as part of the head, because only classifiers use it
    lacking = sorted(key for key, p in model.named_parameters()
                     if key in missing and id(p) in of_body and ".pooler." not in f".{key}")
    if lacking:
        raise InputError(
            f"model.name: {name!r} is not complete: it holds no weights for {some_of(tuple(lacking))};"
            " use another checkpoint"
        )
    return tuple(sorted(missing))


def some_of(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
