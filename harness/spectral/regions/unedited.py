"""No region at all: the study measures the model as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from harness.spectral.regions.controls import Nothing
from harness.spectral.regions.region import Region


@dataclass
class UneditedRule:
    """No regions, so that a study has the baseline only. It has no settings."""

    region_type: ClassVar[type] = Nothing

    def regions(self) -> Sequence[Region]:
        """Return no region."""
        return []
