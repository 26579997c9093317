"""The map from Hugging Face architectures to matrices, with the same names for all architectures.

A family is one entry of FAMILIES, or an entry point of the group "harness.families" in another package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import InputError, one_line
from harness.models.matrices import Layout, Matrix
from harness.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj")
CROSS_ATTENTION_TYPES = ("cross_q_proj", "cross_k_proj", "cross_v_proj", "cross_o_proj")
MLP_TYPES = ("gate_proj", "up_proj", "down_proj")
# Small weights that nobody means by "all" matrices. They are chosen by their names only.
OTHER_TYPES = ("router", "relative_bias")
LAYER_TYPES = ATTENTION_TYPES + CROSS_ATTENTION_TYPES + MLP_TYPES + OTHER_TYPES
GROUPS = {
    "attn": ATTENTION_TYPES + CROSS_ATTENTION_TYPES,
    "mlp": MLP_TYPES,
    "all": ATTENTION_TYPES + CROSS_ATTENTION_TYPES + MLP_TYPES,
}
EMBEDDING_NAMES = frozenset(
    "lm_head head cls embed_tokens embed_positions wte wpe embed_in embed_out shared embedding embeddings "
    "word_embeddings position_embeddings token_type_embeddings".split()
)
MOST_MODULES = 10_000  # layers or experts; a config with more is damaged, and would take hours to build
AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Stored:
    """The matrices that one parameter of a block contains. A 3-D parameter contains them once for each expert.

    layer_types: their layer types, in the order of the output rows. transposed: whether the parameter is stored as
        [in, out].
    rows: a function from the config to the number of rows of each layer type; None if all have equally many.
    heads: a function from the config to the number of heads, if the rows are ordered by (head, layer type, row of the
        head); None if they are ordered by (layer type, row).
    optional: whether some blocks or models of the family lack this parameter.
    """

    layer_types: tuple[str, ...]
    transposed: bool = False
    rows: Callable[[Any], tuple[int, ...]] | None = None
    heads: Callable[[Any], int] | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """An architecture: where its blocks are, and which matrices their parameters contain.

    stacks: name of a stack of blocks -> path of its list of blocks below `model.base_model`, in order of execution. The
        name is "" if there is only one stack.
    weights: name of a parameter within a block -> what it contains, for every parameter of two or more dimensions.
    kind: the head with which the model is loaded, a key of AUTO_CLASSES.
    trees: whether the model's forward accepts an additive mask [B, 1, T, T] and position ids [B, T] and uses them
        unchanged, so that several sequences can share a row. Such a mask replaces that of a sliding window.
    """

    stacks: Mapping[str, str]
    weights: Mapping[str, Stored]
    kind: str = "causal"
    trees: bool = True

    def auto_class(self) -> Any:
        """Return the Auto class of transformers with which a model of this family is loaded."""
        import transformers

        return getattr(transformers, AUTO_CLASSES[self.kind])

    def with_classifier(self) -> Family:
        """Return the same family with a classification head as its kind. Raises InputError for encoder-decoders."""
        if self.kind == "seq2seq":
            raise InputError("model.name: an encoder-decoder with a classification head is not supported; "
                             "use a task of kind seq2seq, or an encoder or a decoder with that head")
        return replace(self, kind="classification")


def _plain(*optional: str, **paths: str) -> dict[str, Stored]:
    """Describe linear layers, by layer type -> path of the module. Those named in `optional` may be absent."""
    return {f"{path}.weight": Stored((name,), optional=name in optional) for name, path in paths.items()}


def _attention(path: str, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> dict:
    return _plain(q_proj=f"{path}.{q}", k_proj=f"{path}.{k}", v_proj=f"{path}.{v}", o_proj=f"{path}.{o}")


def _phi3_rows(config: Any) -> tuple[int, ...]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    return config.num_attention_heads * head_dim, kv, kv


_ATTENTION = _attention("self_attn")
_GATED_MLP = _plain(gate_proj="mlp.gate_proj", up_proj="mlp.up_proj", down_proj="mlp.down_proj")
_EXPERTS = {
    "mlp.gate.weight": Stored(("router",), optional=True),
    "mlp.experts.gate_up_proj": Stored(("gate_proj", "up_proj"), optional=True),
    "mlp.experts.down_proj": Stored(("down_proj",), optional=True),
}
_DENSE_OR_EXPERTS = {name: replace(stored, optional=True) for name, stored in _GATED_MLP.items()} | _EXPERTS

_LLAMA = Family({"": "layers"}, _ATTENTION | _GATED_MLP)
_MIXTURE = Family({"": "layers"}, _ATTENTION | _DENSE_OR_EXPERTS)
_BERT = Family(
    {"": "encoder.layer"},
    _attention("attention", "self.query", "self.key", "self.value", "output.dense")
    | _plain(up_proj="intermediate.dense", down_proj="output.dense"),
    kind="masked",
    trees=False,
)


def _t5_weights() -> dict[str, Stored]:
    """Describe the blocks of T5: self-attention and feed-forward, in the decoder with cross-attention between them."""
    weights = _attention("layer.0.SelfAttention", *"qkvo")
    # The table is stored as buckets x heads. As a linear map from a one-hot bucket to the heads it is transposed.
    bias = Stored(("relative_bias",), transposed=True, optional=True)  # only the first block of each stack has it
    weights["layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    for part in "qkvo":
        name = f"layer.1.EncDecAttention.{part}.weight"
        weights[name] = Stored((f"cross_{part}_proj",), optional=True)
    for layer in (1, 2):
        for name, path in (("up_proj", "wi"), ("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")):
            weights[f"layer.{layer}.DenseReluDense.{path}.weight"] = Stored((name,), optional=True)
    return weights


FAMILIES: Registry[Family] = Registry("harness.families", "a model type", {
    "recall": Family(
        {"": "layers"},
        _plain(k_proj="self_attn.k_proj", v_proj="self_attn.v_proj", o_proj="self_attn.o_proj")
        | _plain("up_proj", "down_proj", up_proj="mlp.up_proj", down_proj="mlp.down_proj"),
        trees=False,  # its attention accepts no additive mask
    ),
    "gpt2": Family(
        {"": "h"},
        {
            "attn.c_attn.weight": Stored(("q_proj", "k_proj", "v_proj"), transposed=True),
            "attn.c_proj.weight": Stored(("o_proj",), transposed=True),
            "mlp.c_fc.weight": Stored(("up_proj",), transposed=True),
            "mlp.c_proj.weight": Stored(("down_proj",), transposed=True),
        },
    ),
    "gpt_neox": Family(
        {"": "layers"},
        {
            "attention.query_key_value.weight": Stored(
                ("q_proj", "k_proj", "v_proj"), heads=lambda config: config.num_attention_heads
            )
        }
        | _plain(o_proj="attention.dense", up_proj="mlp.dense_h_to_4h", down_proj="mlp.dense_4h_to_h"),
    ),
    "gptj": Family({"": "h"}, _attention("attn", o="out_proj") | _plain(up_proj="mlp.fc_in", down_proj="mlp.fc_out")),
    "opt": Family(
        {"": "decoder.layers"}, _attention("self_attn", o="out_proj") | _plain(up_proj="fc1", down_proj="fc2")
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gemma3": replace(_LLAMA, stacks={"": "language_model.layers"}),  # without the blocks of the vision tower
    "phi3": Family(
        {"": "layers"},
        {
            "self_attn.qkv_proj.weight": Stored(("q_proj", "k_proj", "v_proj"), rows=_phi3_rows),
            "mlp.gate_up_proj.weight": Stored(("gate_proj", "up_proj")),
        }
        | _plain(o_proj="self_attn.o_proj", down_proj="mlp.down_proj"),
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,  # some of its blocks may be dense
    "olmo2": _LLAMA,
    "olmoe": _MIXTURE,
    "bert": _BERT,
    "roberta": _BERT,
    "t5": Family({"encoder": "encoder.block", "decoder": "decoder.block"}, _t5_weights(), kind="seq2seq", trees=False),
})


def family_of(config: Any) -> Family:
    """Return the family of a model's config. Raises an InputError that names the model type if it is not known."""
    model_type = getattr(config, "model_type", None)
    if model_type is None or model_type not in FAMILIES:
        raise InputError(
            f"model.name: model type {model_type!r} is not known; known are {', '.join(sorted(FAMILIES))}"
            " (docs/architecture.md says how to add one)"
        )
    return FAMILIES[model_type]


def skeleton(config: Any, family: Family | None = None) -> PreTrainedModel:
    """Return the model of a config on the meta device, which has names and shapes but no weights.

    family: needed if the head is not the usual one of this model type. Raises InputError for an unknown model type, and
    for a config of which no model can be built.
    """
    load_class = (family or family_of(config)).auto_class()
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "num_experts", "num_local_experts"):
        value = getattr(config, key, None)
        fewest = 1 if key == "num_hidden_layers" else 0
        if isinstance(value, int) and not fewest <= value <= MOST_MODULES:
            raise InputError(f"model.name: config.json: {key} is {value}; it must be within {fewest}..{MOST_MODULES}")
    try:
        with torch.device("meta"):
            return load_class.from_config(config)
    except Exception as error:  # what transformers raises for impossible sizes and unknown names is of any type
        raise InputError(
            f"model.name: config.json describes no model that can be built: {type(error).__name__}: {one_line(error)}"
        ) from error


def expand_layer_types(names: Iterable[str], key: str = "target.layer_types") -> tuple[str, ...]:
    """Return the layer types of names and groups of names, without repeats, in the order of LAYER_TYPES.

    key: the setting that holds the names, for messages. Raises InputError for a name that is not known.
    """
    chosen: set[str] = set()
    for name in names:
        if name in EMBEDDING_NAMES:
            raise InputError(
                f"{key}: {name!r} is an embedding or the head (often tied to each other), not a matrix "
                "inside a block, and cannot be a target"
            )
        if name not in GROUPS and name not in LAYER_TYPES:
            raise InputError(
                f"{key}: {name!r} is not a layer type; use {', '.join(LAYER_TYPES)} "
                f"or a group: {', '.join(GROUPS)}"
            )
        chosen.update(GROUPS.get(name, (name,)))
    return tuple(layer_type for layer_type in LAYER_TYPES if layer_type in chosen)


def _stacks_of(model: nn.Module, family: Family | None) -> list[tuple[str, nn.ModuleList]]:
    base, config = getattr(model, "base_model", model), getattr(model, "config", None)
    stacks: list[tuple[str, nn.ModuleList]] = []
    for stack, path in (family or family_of(config)).stacks.items():
        module: Any = base
        for part in path.split("."):
            module = getattr(module, part, None)
        if module is not None:  # a T5 encoder without its decoder has only one of the two stacks
            stacks.append((stack, module))
    if not stacks:
        model_type = getattr(config, "model_type", None)
        raise InputError(f"model.name: {type(model).__name__} has none of the blocks of {model_type!r}")
    return stacks


def blocks_of(model: nn.Module, family: Family | None = None) -> list[nn.Module]:
    """Return the blocks in order of execution, those of an encoder before those of its decoder.

    family: needed for an architecture that is not in FAMILIES. Raises InputError for an unknown architecture, and for a
    model without such blocks.
    """
    return [block for _, blocks in _stacks_of(model, family) for block in blocks]


def _layouts(stored: Stored, out: int, config: Any) -> list[Layout]:
    parts = len(stored.layer_types)
    if stored.heads is not None:
        return [Layout(stored.transposed, None, stored.heads(config), part, parts) for part in range(parts)]
    if parts == 1:
        return [Layout(stored.transposed)]
    sizes = stored.rows(config) if stored.rows is not None else (out // parts,) * parts
    stops = [sum(sizes[: part + 1]) for part in range(parts)]
    return [Layout(stored.transposed, (stop - size, stop)) for size, stop in zip(sizes, stops)]


@dataclass(frozen=True)
class _Block:
    """One block of a model.

    path: its name in the model, such as "model.layers.3". label: how the names of its matrices begin, such as "3" or
    "decoder.3". index: its place in the order of execution, counted over all stacks from 0.
    """

    module: nn.Module
    path: str
    label: str
    stack: str
    index: int


def _matrices_of_block(block: _Block, config: Any, family: Family) -> list[Matrix]:
    weights, model_type = family.weights, getattr(config, "model_type", None)
    parameters = {name: p for name, p in block.module.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    required = [name for name, stored in weights.items() if not stored.optional]
    for name in [*[n for n in required if n not in parameters], *[n for n in parameters if n not in weights]]:
        what = "is not in harness/models/families.py" if name in parameters else "is missing"
        raise InputError(
            f"model.name: block {block.label} is not a plain {model_type!r} block: its weight {name!r} {what} "
            "(adapters must be merged first)"
        )
    matrices = []
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise InputError(f"model.name: {block.path}.{name} is quantised ({parameter.dtype}); load it dequantised")
        stored = weights[name]
        experts = range(parameter.shape[0]) if parameter.ndim == 3 else (None,)
        out, width = parameter.shape[-2:] if not stored.transposed else parameter.shape[:-3:-1]
        for layer_type, layout in zip(stored.layer_types, _layouts(stored, out, config)):
            rows = layout.rows[1] - layout.rows[0] if layout.rows else out // layout.parts
            for expert in experts:
                matrices.append(Matrix(
                    f"{block.label}.{layer_type}" + ("" if expert is None else f".e{expert}"), block.index, layer_type,
                    block.stack, expert, f"{block.path}.{name}", (rows, width), layout,
                ))
    return sorted(matrices, key=lambda m: (LAYER_TYPES.index(m.layer_type), m.expert or 0))


def matrices_of(model: nn.Module, family: Family | None = None) -> tuple[Matrix, ...]:
    """Return every matrix of the model, ordered by block, layer type and expert. It may be on the meta device.

    family: needed for an architecture that is not in FAMILIES. Raises InputError for an unknown architecture, for
    quantised weights, and for a block whose parameters of two or more dimensions are not those of its family.
    """
    config = getattr(model, "config", None)
    names = {id(module): name for name, module in model.named_modules()}
    family = family or family_of(config)
    blocks: list[_Block] = []
    for stack, modules in _stacks_of(model, family):
        for number, module in enumerate(modules):
            label = f"{stack}.{number}" if stack else str(number)
            blocks.append(_Block(module, names[id(module)], label, stack, len(blocks)))
    return tuple(matrix for block in blocks for matrix in _matrices_of_block(block, config, family))
