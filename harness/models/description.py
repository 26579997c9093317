"""What is known of a model before its weights are read, the settings with which it generates text among it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.models.adapter import Adapter
from harness.models.checkpoint import WeightFile
from harness.models.families import Family
from harness.models.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model before its weights are read.

    source: a name on the hub or a folder, as `from_pretrained` takes it; "recall" for the embedded model; "memory" for
    a module of the caller. identity: goes into the id of every cell, and changes when the weights change. config: the
    model's config of transformers. dtype: "float32", "bfloat16" or "float16". context_length: in tokens. files: the
    weight files of a local model, as they were hashed for the identity; none for a model on the hub, whose files are
    fetched when it is loaded. generation: the checkpoint's settings of text generation, as `generation_settings`
    returns them. adapter: what is merged into the weights of the files, or None.
    """

    source: str
    identity: dict[str, Any]
    config: Any
    family: Family
    dtype: str
    context_length: int
    files: tuple[WeightFile, ...] = field(default=(), repr=False, compare=False)
    generation: Any = field(default=None, repr=False, compare=False)
    adapter: Adapter | None = field(default=None, repr=False, compare=False)

    @property
    def revision(self) -> str | None:
        """The commit on the hub from which tokenizer and weights are both read; None for a local model."""
        return self.identity.get("revision")


def generation_settings(settings: ModelSettings, description: ModelDescription) -> GenerationConfig | None:
    """Return the settings with which transformers lets a model generate text, or None if it does not generate.

    They are those of generation_config.json or, without this file, those that transformers derives from config.json.
    No weights are read. Raises InputError if the settings are not valid.
    """
    if description.source == "recall" or description.family.kind not in ("causal", "seq2seq"):
        return None
    from transformers import GenerationConfig

    if settings.gguf_file:  # for which transformers reads no other file
        return GenerationConfig.from_model_config(description.config)
    revision = description.revision or "main"
    try:
        try:
            return GenerationConfig.from_pretrained(description.source, revision=revision)
        except OSError:
            return GenerationConfig.from_pretrained(
                description.source, config_file_name="config.json", revision=revision, _from_model_config=True
            )
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model.name: generation_config.json of {settings.name!r} is not valid: {reason}; correct the file"
        ) from error


def generation_values(found: GenerationConfig | None) -> dict[str, Any]:
    """Return the settings that differ from the defaults of transformers, as plain values; none for None."""
    return {} if found is None else json.loads(found.to_json_string(ignore_metadata=True))
