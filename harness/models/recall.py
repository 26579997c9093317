"""The two-layer in-context-recall transformer of arXiv 2406.03068, as a model of the transformers library.

It has two blocks, each with one attention head and a feed-forward layer, both with a residual connection. There is no
normalisation, and there are no biases. W_Q is the identity, so that `k_proj` holds the product W_QK. The token
embeddings and the absolute position embeddings are drawn from N(0, 1) and never trained; neither is the output matrix,
which has the default initialisation of `nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from harness.errors import InputError
from harness.models.checkpoint import SINGLE_FILE, read_state, weight_file
from harness.models.recall_data import RecallProcess, recall_process
from harness.models.settings import RecallModelSettings

N_BLOCKS = 2


class RecallConfig(PretrainedConfig):
    """The shape of the model, how it was trained, and the distribution of its data, from which more data can be drawn.

    It holds the settings of `RecallModelSettings` under their own names; dim, hidden_dim and context_length also have
    the names that transformers uses. It also holds what follows from the settings: the N characters of `vocabulary`,
    whose ids are 0..N-1, `trigger_ids`, `noise_token_id`, and `vocab_size`, which is N + 1 if the noise token is an
    additional one.
    """

    model_type = "recall"
    attribute_map = {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "context_length": "max_position_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 66,
        hidden_size: int = 128,
        intermediate_size: int = 512,
        max_position_embeddings: int = 64,
        feed_forward: str = "mlp",
        vocabulary: str = "",
        trigger_ids: tuple[int, ...] = (),
        noise_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = N_BLOCKS
        self.num_attention_heads = 1
        self.feed_forward = feed_forward
        self.vocabulary = vocabulary
        self.trigger_ids = list(trigger_ids)
        self.noise_token_id = noise_token_id
        kwargs["num_hidden_layers"], kwargs["num_attention_heads"] = N_BLOCKS, 1
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


def recall_config(config: RecallModelSettings) -> RecallConfig:
    """Return the configuration of the model for these settings. Raises InputError as `recall_process` does."""
    process = recall_process(config)
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "cache_dir"}
    for ours, theirs in RecallConfig.attribute_map.items():
        settings[theirs] = settings.pop(ours)
    return RecallConfig(
        vocab_size=process.vocabulary_size,
        vocabulary=process.vocabulary,
        trigger_ids=process.trigger_ids,
        noise_token_id=process.noise_token_id,
        **settings,
    )


def process_of(model_config: RecallConfig) -> RecallProcess:
    """Return the distribution of the sequences on which a model with this configuration was trained."""
    assert model_config.noise_token_id is not None  # `recall_config` has set it
    return RecallProcess(
        vocabulary=model_config.vocabulary,
        vocabulary_size=model_config.vocab_size,
        trigger_ids=tuple(model_config.trigger_ids),
        noise_token_id=model_config.noise_token_id,
        noise=model_config.noise,
    )


class SelfAttention(nn.Module):
    """One causal head: the sum over s <= t of W_O W_V x_s with the weights softmax_s(x_t^T W_K x_s / sqrt(dim))."""

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.eager = config._attn_implementation == "eager"
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def weights(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the attention probabilities [B, T, T] of hidden states [B, T, dim]; rows are queries.

        mask: bool [B, T, T], True where position t may attend to position s; None for causal attention.
        """
        length, dim = hidden_states.shape[1:]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).tril()
        scores = hidden_states @ self.k_proj(hidden_states).transpose(1, 2) / math.sqrt(dim)
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map hidden states [B, T, dim] to the output of the head, of the same shape. mask: as in `weights`."""
        value = self.v_proj(hidden_states)
        if self.eager:
            return self.o_proj(self.weights(hidden_states, mask) @ value)
        query, key, value = (x[:, None] for x in (hidden_states, self.k_proj(hidden_states), value))
        mask = None if mask is None else mask[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(mixed[:, 0])


class FeedForward(nn.Module):
    """W_2 relu(W_1 x) if `feed_forward` is "mlp"; one square linear map, `up_proj`, if it is "linear"."""

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        self.linear = config.feed_forward == "linear"
        hidden_dim = config.hidden_size if self.linear else config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, hidden_dim, bias=False)
        if not self.linear:
            self.down_proj = nn.Linear(hidden_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states [..., dim] to [..., dim], position by position."""
        hidden_states = self.up_proj(hidden_states)
        return hidden_states if self.linear else self.down_proj(F.relu(hidden_states))


class RecallBlock(nn.Module):
    """Attention and feed-forward layer, each added to its input. `mlp` is None if `feed_forward` is "none"."""

    def __init__(self, config: RecallConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = None if config.feed_forward == "none" else FeedForward(config)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the second half of the block to hidden states [..., dim], position by position."""
        return hidden_states if self.mlp is None else hidden_states + self.mlp(hidden_states)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the block to hidden states [B, T, dim]. mask: as in `SelfAttention.weights`."""
        return self.feed_forward(hidden_states + self.self_attn(hidden_states, mask))


class RecallForCausalLM(PreTrainedModel):
    """The model that the docstring of this module describes.

    attn_implementation is "sdpa" or "eager". Raises InputError for an unknown feed_forward.
    """

    config_class = RecallConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _no_split_modules = ["RecallBlock"]

    def __init__(self, config: RecallConfig) -> None:
        super().__init__(config)
        if config.feed_forward not in ("mlp", "linear", "none"):
            raise InputError(f"model.recall.feed_forward is {config.feed_forward!r}: must be mlp, linear or none")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(RecallBlock(config) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.freeze_embeddings()
        self.post_init()

    @property
    def blocks(self) -> Sequence[RecallBlock]:
        """`layers`, with a type that type checkers know."""
        return cast("Sequence[RecallBlock]", self.layers)

    def freeze_embeddings(self) -> None:
        """Exclude embeddings and output matrix from training."""
        for module in (self.embed_tokens, self.embed_positions, self.lm_head):
            module.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # the default of nn.Linear

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return what enters the first block, [B, T, dim], for input_ids int64 [B, T].

        Raises InputError for a sequence that is longer than the context, unless position_ids are given.
        """
        if position_ids is None:
            if input_ids.shape[1] > self.config.max_position_embeddings:
                raise InputError(
                    f"a sequence of {input_ids.shape[1]} tokens is longer than the recall model's context "
                    f"(model.recall.context_length: {self.config.max_position_embeddings})"
                )
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.embed_tokens(input_ids) + self.embed_positions(position_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        use_cache: bool | None = None,
    ) -> CausalLMOutput:
        """Return the next-token logits [B, T, vocabulary] for input_ids [B, T].

        attention_mask: [B, T], 0 for padding. position_ids: [B, T] or [T]; 0..T-1 if None, even with padding on the
        left. labels: [B, T], which are shifted here as elsewhere in transformers; -100 is ignored. logits_to_keep: the
        number of last positions, or the indices of the positions, for which logits are computed; 0 for all.
        output_attentions: also return the probabilities [B, 1, T, T] of each block, which are computed a second time.
        output_hidden_states: also return what enters each block and what leaves the last one. use_cache is ignored,
        because there is no cache of keys and values. Raises InputError as `embed` does.
        """
        hidden_states = self.embed(input_ids, position_ids)
        mask = _visible(attention_mask)
        streams, attentions = [hidden_states], []
        for block in self.blocks:
            if output_attentions:
                attentions.append(block.self_attn.weights(hidden_states, mask)[:, None])
            hidden_states = block(hidden_states, mask)
            streams.append(hidden_states)
        kept: slice | torch.Tensor = slice(None)
        if isinstance(logits_to_keep, torch.Tensor):
            kept = logits_to_keep
        elif isinstance(logits_to_keep, int) and logits_to_keep:
            kept = slice(-logits_to_keep, None)
        logits = self.lm_head(hidden_states[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(streams) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def _visible(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask, bool [B, T, T], True where position t may attend to s; None if causal attention does the same."""
    # Causal attention never reaches padding on the right. A mask that never rises has padding only there.
    if attention_mask is None or not (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        return None
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    # A padded position attends to itself, because a softmax over nothing would be NaN and spread to other positions.
    own = torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    return causal & (attention_mask.bool()[:, None, :] | own)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn the progress bars of transformers off; they would break our own, and the file is only a megabyte."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_recall(path: str | Path, attn_implementation: str = "sdpa") -> RecallForCausalLM:
    """Load a saved model in float32 on the CPU, in evaluation mode.

    Raises InputError if the folder holds none, and if attn_implementation is neither "sdpa" nor "eager".
    """
    if attn_implementation not in ("sdpa", "eager"):
        raise InputError(f"model.attn_implementation is {attn_implementation!r}: the recall model has sdpa and eager")
    try:
        with quiet():
            model = RecallForCausalLM.from_pretrained(
                None, config=RecallConfig.from_pretrained(path, local_files_only=True), dtype=torch.float32,
                state_dict=read_state([weight_file(Path(path) / SINGLE_FILE)]), attn_implementation=attn_implementation,
            )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a saved recall model ({error})".splitlines()[0]) from error
    model.freeze_embeddings()  # transformers has replaced the parameters by new ones, which are trainable
    return model.eval()


AutoConfig.register("recall", RecallConfig, exist_ok=True)
AutoModelForCausalLM.register(RecallConfig, RecallForCausalLM, exist_ok=True)
