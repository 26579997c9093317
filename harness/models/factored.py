"""Models with some matrices stored as low-rank factors: a smaller file for the same weights.

The folder of such a model holds config.json and factored.safetensors. The latter has every tensor of the model's state
dictionary, with the exception of parameters that contain a factored matrix. Each matrix of such a parameter is stored
under its own name: either as two factors, `<name>:left` float32 [out, n] and `<name>:right` float32 [n, in], whose
product is the matrix, or whole if factors would be larger. Factors are kept in float32. Their product, rounded once to
the model's dtype, is then the edited matrix, which was also rounded once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.errors import InputError
from harness.models.families import AUTO_CLASSES, matrices_of
from harness.models.matrices import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "factored.safetensors"
FORMAT = "spectral-harness factored 1"


def factors_are_smaller(matrix: Matrix, n: int, dtype: torch.dtype) -> bool:
    """Return whether float32 factors for n singular values take fewer bytes than the whole matrix in `dtype`."""
    out, width = matrix.shape
    return 4 * n * (out + width) < dtype.itemsize * out * width


def write_factored(
    folder: str | Path, model: PreTrainedModel, kind: str, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Write the model to a folder, with some of its matrices as factors.

    kind: the kind of the model's family, a key of AUTO_CLASSES. factors: name of a matrix -> its factors, left [out, n]
    and right [n, in] of any dtype, whose product is the matrix that the model holds.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    matrices = matrices_of(model)
    split = {matrix.parameter for matrix in matrices if matrix.name in factors}
    tensors, tied = _untied((name, tensor) for name, tensor in model.state_dict().items() if name not in split)
    for matrix in matrices:
        if matrix.name in factors:
            for side, factor in zip(("left", "right"), factors[matrix.name]):
                tensors[f"{matrix.name}:{side}"] = factor.to("cpu", torch.float32).contiguous()
        elif matrix.parameter in split:
            tensors[matrix.name] = matrix.read(model).cpu()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    about = {"format": FORMAT, "kind": kind, "dtype": dtype, "tied": json.dumps(tied)}
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_file(tensors, folder / FILE, metadata=about)


def load_factored(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model that `write_factored` (harness export --factored) wrote, and multiply its factors.

    The result is an ordinary transformers model in evaluation mode, on `device`. Raises InputError if the folder holds
    no such model, or one that cannot be read.
    """
    import transformers
    from safetensors import SafetensorError, safe_open
    from transformers.initialization import no_init_weights

    import harness.models.recall  # noqa: F401  it registers the embedded model with transformers

    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {FILE} there; give a folder that harness export --factored wrote")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path}: not readable ({error}); export it again") from error
    if about.get("format") != FORMAT:
        raise InputError(f"{path}: format {about.get('format')!r}, this harness reads {FORMAT!r}; export it again")
    dtype = getattr(torch, about["dtype"])
    config = transformers.AutoConfig.from_pretrained(path.parent)
    with no_init_weights():
        model = getattr(transformers, AUTO_CLASSES[about["kind"]]).from_config(config, dtype=dtype)
    state = {**stored, **{name: stored[first] for name, first in json.loads(about["tied"]).items()}}
    names = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in names}, strict=False)
    filled = set(state) & set(names)
    for matrix in matrices_of(model):
        if f"{matrix.name}:left" in stored:
            left, right = (stored[f"{matrix.name}:{side}"].double() for side in ("left", "right"))
            matrix.write(model, (left @ right).to(dtype))
        elif matrix.name in stored:
            matrix.write(model, stored[matrix.name])
        else:
            continue
        filled.add(matrix.parameter)
    if missing := sorted(set(names) - filled):
        raise InputError(f"{path}: it lacks {missing[0]}; export it again with this version of transformers")
    model.tie_weights()  # transformers does this in the initialisation, which was skipped
    return model.to(device).eval()


def _untied(state: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors on the CPU without those that share the memory of an earlier tensor.

    The second result maps the name of each tensor that was left out to the name of the earlier one.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state:
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor.detach().cpu().contiguous()
    return kept, tied
