"""What is refused where settings are composed, and only there: settings that nothing would read (a study that was
frozen with one has the same cells without it, and is still read), and an output that cannot be written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from harness.checks import fail
from harness.config import Config, ModelConfig, RecallModelConfig, RegionConfig
from harness.search_config import SearchConfig

# of region: the values of `by` that read it
READ_BY = {
    "kinds": ("fraction", "energy"), "values": ("fraction", "energy"), "deciles": ("decile",), "mp": ("mp",),
    "estimator": ("mp",), "tracy_widom": ("mp",), "gavish_donoho": ("gavish_donoho",),
}
# of search: the values of `choice` that read it
READ_BY_CHOICE = {"keep": ("gradient",), "gradient_examples": ("gradient", "compare")}
# of model: what the embedded model has no use for
NOT_OF_RECALL = ("revision", "gguf_file", "device_map", "trust_remote_code")


def _default(field: Field) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()


def refuse_unread(config: Config) -> None:
    """Raises InputError for the first setting of model, region or search that differs from its default and is not
    read."""
    refuse_unread_of_model(config.model)
    region = config.region
    given = {f.name: getattr(region, f.name) for f in fields(RegionConfig) if getattr(region, f.name) != _default(f)}
    for key, read_by in READ_BY.items():
        if key in given and region.by not in read_by:
            fail(f"region.{key}", given[key], f"only region.by={' or '.join(read_by)} reads it, here it is {region.by}")
    if "random_seeds" in given and not {"random", "energy_matched"} & set(region.controls):
        fail("region.random_seeds", given["random_seeds"],
             f"only the controls random and energy_matched read it; region.controls is [{', '.join(region.controls)}]")
    for key, read_by in READ_BY_CHOICE.items():
        value = getattr(config.search, key)
        if config.search.choice not in read_by and value != getattr(SearchConfig(), key):
            fail(f"search.{key}", value, f"only search.choice={' or '.join(read_by)} reads it")


def refuse_unread_of_model(model: ModelConfig) -> None:
    """The same for the settings of a model."""
    default = {f.name: _default(f) for f in fields(ModelConfig)}
    if model.name == "recall":
        for key in NOT_OF_RECALL:
            if getattr(model, key) != default[key]:
                fail(f"model.{key}", getattr(model, key), "the embedded model (model.name=recall) does not read it")
        return
    for field in fields(RecallModelConfig):
        value = getattr(model.recall, field.name)
        # where the embedded models are kept is said once for runs of all models
        if field.name != "cache_dir" and value != getattr(default["recall"], field.name):
            fail(f"model.recall.{field.name}", value, f"only the embedded model reads it; model.name is {model.name!r}")


def require_folder(output: str | None) -> None:
    """Raises InputError where `output` is no folder and none can be made there; leaves nothing behind."""
    if output is None:
        return
    path = Path(output).expanduser()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        fail("output", output, f"{there} is a file; name a folder that is there or can be made")
    if there != path:
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".harness-", dir=there))
        except OSError as error:
            fail("output", output, f"no folder can be made in {there} ({error.strerror}); name another")
