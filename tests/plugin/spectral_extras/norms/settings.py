"""The settings of `harness norms`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harness.engine.settings import ClusterSettings
from harness.models.settings import ModelSettings
from harness.settings.output import require_folder

CONFIG = "norms"
CONFIG_FOLDER = Path(__file__).parent / "conf"


@dataclass
class NormsSettings:
    """Which matrices of which model."""

    model: ModelSettings = field(default_factory=ModelSettings)
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    output: str | None = None


Settings = NormsSettings


def check(settings: NormsSettings) -> None:
    """Raises InputError where no model is named, and for an output that cannot be written."""
    settings.model.require_name()
    require_folder(settings.output)
