"""The attention of packed trees by FlexAttention, which skips the blocks of pairs of tokens that the mask hides.

FlexAttention (Dong et al., arXiv 2412.05496) compiles the rule by which one token sees another into a kernel. The usual
way is an additive mask over all pairs of tokens, which every block of the model reads whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.errors import wrong
from harness.evaluation.packing import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_flex(model: PreTrainedModel) -> None:
    """Raise SettingError if transformers has no FlexAttention for a model, which may be on the meta device."""
    if not getattr(model, "_supports_flex_attn", False):
        right = f"transformers has no FlexAttention for {model.config.model_type}; use mask"
        raise wrong("runtime.tree_attention", "flex", right)


def flex_masked(batch: Batch) -> Batch:
    """Return a batch of trees with the block mask of FlexAttention, on the device of its tensors."""
    from torch.nn.attention.flex_attention import create_block_mask

    last = batch.last
    assert last is not None
    n_rows, length = last.shape

    def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < last[row, key])

    mask: Any = create_block_mask(visible, n_rows, None, length, length, device=str(last.device))
    mask.ndim = 4  # GPT-2's forward asks a mask for it, to see that it is complete
    return replace(batch, block_mask=mask)
