"""The spectral ablation harness: what do the small, the bulk and the large singular values of a model's weights do?

    >>> import harness as sh
    >>> sh.regions.small(0.1).label
    'small 0.1'

What stands here comes from `harness.api`, `harness.spectral.regions` and the settings; it is imported when
it is first used.
"""

from __future__ import annotations

from importlib import import_module

# That of `typing`, whose import would take a tenth of `harness --help`; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from harness.api import (
        Comparison,
        MatrixView,
        Model,
        NamedTask,
        Run,
        Score,
        compare,
        load,
        measure,
        open,
        paired,
        run,
        task,
        wrap,
    )
    from harness.errors import InputError
    from harness.evaluation.settings import RuntimeSettings
    from harness.measurements.ablation.treatment_settings import TreatmentSettings
    from harness.models.families import Family, Stored
    from harness.models.targets import TargetSettings
    from harness.spectral import regions
    from harness.tables.drawing import FigureSettings

__version__ = "0.1.0"

_MODULE_OF = {
    **dict.fromkeys(
        ("Comparison", "MatrixView", "Model", "NamedTask", "Run", "Score",
         "compare", "load", "measure", "open", "paired", "run", "task", "wrap"),
        "harness.api",
    ),
    "Family": "harness.models.families",
    "FigureSettings": "harness.tables.drawing",
    "Stored": "harness.models.families",
    "InputError": "harness.errors",
    "RuntimeSettings": "harness.evaluation.settings",
    "TargetSettings": "harness.models.targets",
    "TreatmentSettings": "harness.measurements.ablation.treatment_settings",
    "regions": "harness.spectral.regions",
}

__all__ = [
    "Comparison",
    "Family",
    "FigureSettings",
    "InputError",
    "MatrixView",
    "Model",
    "NamedTask",
    "Run",
    "RuntimeSettings",
    "Score",
    "Stored",
    "TargetSettings",
    "TreatmentSettings",
    "__version__",
    "compare",
    "load",
    "measure",
    "open",
    "paired",
    "regions",
    "run",
    "task",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    module = import_module(_MODULE_OF[name])
    return module if name == "regions" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
