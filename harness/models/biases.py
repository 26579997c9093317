"""Biases that become part of a model: what a region was replaced by is saved as parameters of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from harness.errors import InputError
from harness.models.branches import Bias, owner_of, slice_of

# Setting of a config by which transformers gives biases to all layers of one part -> the names of these layers.
_SWITCHES = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}
_SWITCHED_TYPES = ("llama",)  # model types whose configs have both switches


def require_biases(model: nn.Module, biases: Sequence[Bias]) -> None:
    """Let every matrix of these biases have a bias parameter, which is zero if it is new.

    The layers of a Llama model get theirs by switches of its config, for all blocks at once. Raises InputError for a
    matrix of another architecture without biases.
    """
    lacking = [one for one in biases if owner_of(model, one.matrix).bias is None]
    config: Any = model.config
    for one in lacking:
        name = one.matrix.parameter.split(".")[-2]
        if config.model_type not in _SWITCHED_TYPES or not any(name in names for names in _SWITCHES.values()):
            raise InputError(
                f"region.replace: mean becomes a bias, and {one.matrix.name} of a {config.model_type} model has none;"
                " export with region.replace=zero"
            )
    wanted = {one.matrix.parameter.split(".")[-2] for one in lacking}
    for switch, names in _SWITCHES.items():
        if wanted & set(names):
            setattr(config, switch, True)
            for path, module in model.named_modules():
                if path.split(".")[-1] in names and isinstance(module, nn.Linear) and module.bias is None:
                    zeros = module.weight.new_zeros(module.out_features)
                    module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)


@torch.no_grad()
def write_biases(model: nn.Module, biases: Sequence[Bias]) -> None:
    """Add these biases to the parameters of their modules, rounded to the model's dtype."""
    for one in biases:
        bias: Any = owner_of(model, one.matrix).bias
        part = slice_of(one.matrix, bias)
        part.copy_(part.float() + one.values.to(part.device).reshape(part.shape))
