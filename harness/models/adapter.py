"""A LoRA adapter of peft: its files, and the parameters of its base with the adapter merged into them.

The merged parameter is W + s B A, with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2106.09685 and
2312.03732). It is computed in float32, whatever the types of the checkpoint and of the adapter, and is rounded once, to
the type in which the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.errors import InputError, one_line
from harness.models.checkpoint import WeightFile, read_tensor, require_regular, weight_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # peft's name of the model that it wraps
# Keys of adapter_config.json by which the merged parameter would be another one, or by which the base is changed.
_NOT_MERGED = ("use_dora", "use_qalora", "lora_bias", "target_parameters", "alora_invocation_tokens", "velora_config",
               "layer_replication")
_HARMLESS_INIT = ("gaussian", "eva", "orthogonal")  # they choose the adapter's first values and leave the base alone


@dataclass(frozen=True)
class LowRank:
    """The change of one parameter. first, second: the names of A [r, in] and B [out, r] in the file of the adapter.

    scale: s. transposed: whether the parameter is stored as [in, out].
    """

    first: str
    second: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its base.

    name: its name in the settings. digest: a digest of the bytes of both files. file: its weights. changed: name of a
    parameter of the base -> its change. replaced: name of a parameter -> the name of the tensor in the file that takes
    its place.
    """

    name: str
    digest: str
    file: WeightFile
    changed: Mapping[str, LowRank]
    replaced: Mapping[str, str]

    def parameters(self) -> list[str]:
        """Return the names of all parameters that differ from the base."""
        return [*self.changed, *self.replaced]

    def merged(self, parameter: str, weight: Tensor) -> Tensor:
        """Return a parameter of the base with the adapter merged into it.

        weight: the weight of the base, of any floating dtype. Returns float32 on the CPU for a parameter that the
        adapter changes; another parameter is returned as it is.
        """
        if parameter in self.replaced:
            return read_tensor(self.file, self.replaced[parameter])
        if parameter not in self.changed:
            return weight
        one = self.changed[parameter]
        first, second = (read_tensor(self.file, name).to(torch.float32) for name in (one.first, one.second))
        product = second @ first
        return weight.to(torch.float32) + (product.T if one.transposed else product) * one.scale


def adapter_config(name: str) -> dict[str, Any]:
    """Return adapter_config.json of a local folder or of a repository of the hub.

    Raises InputError if there is none, and for an adapter that is not LoRA or that changes its base in other ways.
    """
    path = _file(name, CONFIG)
    try:
        require_regular(path)
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"model.adapter: {path} is no config of an adapter of peft: {one_line(error)}") from error
    if kind != "LORA":
        raise InputError(f"model.adapter: {name!r} is an adapter of type {kind}; only LORA can be merged here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _HARMLESS_INIT:
        raise InputError(
            f"model.adapter: {name!r} was initialised by {init!r}, which changes the weights of the base, too; convert"
            " it to a plain adapter first (save_pretrained of peft with path_initial_model_for_weight_conversion)"
        )
    for key in _NOT_MERGED:
        if config.get(key):
            raise InputError(f"model.adapter: {name!r} has {key}, which is not merged here; merge it into its base with"
                             " merge_and_unload of peft")
    return config


def base_of(name: str) -> str | None:
    """Return the name of the model for which an adapter was trained; None if its config has none."""
    base = adapter_config(name).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def open_adapter(name: str, base: PreTrainedModel) -> Adapter:
    """Return an adapter that fits a model. No weights are read but those of the adapter, which are hashed.

    base: the model, which may be on the meta device. Raises InputError if a tensor of the adapter is for a parameter
    that the base lacks, or has another size than this parameter needs.
    """
    config, file = adapter_config(name), weight_file(_file(name, WEIGHTS))
    digests = [file.digest, hashlib.sha256(_file(name, CONFIG).read_bytes()).hexdigest()]
    digest = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
    changed: dict[str, LowRank] = {}
    replaced: dict[str, str] = {}
    for tensor in file.tensors:
        path = tensor.removeprefix(_PREFIX)
        if path.endswith(".lora_A.weight"):
            parameter, one = _changed(name, config, file, tensor, base)
            changed[parameter] = one
        elif not path.endswith(".lora_B.weight") and (found := _replaced(name, path, file, tensor, base)):
            replaced[found] = tensor
    if not changed:
        raise InputError(f"model.adapter: {name!r} holds no change of a linear layer")
    return Adapter(name, digest, file, changed, replaced)


def _file(name: str, file: str) -> Path:
    folder = Path(name).expanduser()
    if os.path.isdir(folder):
        path = folder / file
        if not path.is_file():
            raise InputError(f"model.adapter: no {file} in {folder}; give the folder that save_pretrained of peft"
                             " wrote")
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model.adapter: {name!r} is not a folder; give the folder of an adapter or a name on the hub")
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file)
        assert found is not None
        return Path(found)
    except OSError as error:
        raise InputError(f"model.adapter: cannot read {file} of {name!r} (a Hugging Face name; offline: download it"
                         f" first, or give a local folder): {one_line(error)}") from error


def _changed(
    name: str, config: Mapping[str, Any], file: WeightFile, first: str, base: PreTrainedModel
) -> tuple[str, LowRank]:
    from transformers.pytorch_utils import Conv1D

    path = first.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
    second = first.removesuffix("A.weight") + "B.weight"
    module = _in(base, path)
    parameter = f"{module}.weight"
    if module is None or parameter not in dict(base.named_parameters(remove_duplicate=False)):
        raise InputError(f"model.adapter: {name!r} changes {path}, which its base does not have; set model.name to the"
                         " model that it was trained for")
    if second not in file.tensors:
        raise InputError(f"model.adapter: {name!r} is damaged: it has {first} and not {second}")
    transposed = isinstance(base.get_submodule(module), Conv1D)
    expected = tuple(base.get_parameter(parameter).shape)
    (rank, width), (out, again) = file.tensors[first].shape, file.tensors[second].shape
    if ((width, out) if transposed else (out, width)) != expected or rank != again:
        raise InputError(
            f"model.adapter: {name!r} does not fit its base: for {path} it has {rank}x{width} and {out}x{again}, and"
            f" the base has {'x'.join(map(str, expected))}"
        )
    ranks = config.get("rank_pattern") or {}
    stated = ranks.get(_pattern(ranks, path), config.get("r"))
    if stated != rank:
        raise InputError(f"model.adapter: {name!r} is damaged: {first} has rank {rank}, and {CONFIG} says {stated}")
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(_pattern(alphas, path), config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return parameter, LowRank(first, second, scale, transposed)


def _pattern(patterns: Mapping[str, Any], path: str) -> str:
    """Return the first of these regular expressions that matches the end of a path, as peft does; else the path."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", path)), path)


def _replaced(name: str, path: str, file: WeightFile, tensor: str, base: PreTrainedModel) -> str | None:
    """Return the parameter whose place a tensor takes; None if it belongs to a head with which the base is not loaded.

    Raises InputError if it is no whole parameter of the base.
    """
    module, _, leaf = path.rpartition(".")
    found = _in(base, module)
    parameter = f"{found}.{leaf}"
    parameters = dict(base.named_parameters(remove_duplicate=False))
    if found is None and "lora_" not in path and "." not in module:
        return None
    if found is None or parameter not in parameters:
        raise InputError(f"model.adapter: {name!r} holds {path}, which cannot be merged here; merge it into its base"
                         " with merge_and_unload of peft")
    if tuple(parameters[parameter].shape) != file.tensors[tensor].shape:
        raise InputError(
            f"model.adapter: {name!r} does not fit its base: {path} is {list(file.tensors[tensor].shape)} in the"
            f" adapter and {list(parameters[parameter].shape)} in the base"
        )
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    if getattr(base.config, "tie_word_embeddings", False) and base.get_submodule(found) in embeddings:
        raise InputError(f"model.adapter: {name!r} replaces {path}, and the base shares this weight between embedding"
                         " and head; merge it into its base with merge_and_unload of peft")
    return parameter


def _in(base: PreTrainedModel, path: str) -> str | None:
    """Return the path of a module in the model, which may have been loaded with another head; None if it is absent."""
    modules, prefix = dict(base.named_modules()), f"{base.base_model_prefix}."
    return next((one for one in (path, path.removeprefix(prefix), prefix + path) if one in modules), None)
