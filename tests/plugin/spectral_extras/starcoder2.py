"""A model family: StarCoder2, whose blocks have plain feed-forward layers under names of their own."""

from harness.models.families import Family, Stored

_ATTENTION = {f"self_attn.{name}.weight": Stored((name,)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
STARCODER2 = Family(
    {"": "layers"},
    {**_ATTENTION, "mlp.c_fc.weight": Stored(("up_proj",)), "mlp.c_proj.weight": Stored(("down_proj",))},
)
