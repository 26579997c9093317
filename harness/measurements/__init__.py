"""The kinds of measurements. Each has one folder, and other packages add kinds by entry points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.engine.measurement import Measurement
from harness.errors import InputError
from harness.measurements import shorthands
from harness.registry import Registry, nearest
from harness.settings.compose import Source, compose, known_keys
from harness.settings.validation import keys_of
from harness.tables.schema import tables_markdown

ABLATION = Measurement("ablation", "harness.measurements.ablation")
SPECTRA = Measurement("spectra", "harness.measurements.spectra")
SEARCH = Measurement("search", "harness.measurements.search")
TUNING = Measurement("tuning", "harness.measurements.tuning")
COUPLING = Measurement("coupling", "harness.measurements.coupling")
COMPONENTS = Measurement("components", "harness.measurements.components")

MEASUREMENTS: Registry[Measurement] = Registry(
    "harness.measurements", "a kind of measurement",
    {one.name: one for one in (ABLATION, SPECTRA, SEARCH, TUNING, COUPLING, COMPONENTS)},
)


def find(kind: str) -> Measurement:
    """Return the measurement of a name. Raises InputError if no installed package has it."""
    if kind not in MEASUREMENTS:
        near = nearest(kind, MEASUREMENTS.names())
        raise InputError(f"{kind!r} is no measurement that is installed here; {near}known are"
                         f" {', '.join(MEASUREMENTS)}")
    return MEASUREMENTS[kind]


def source_of(measurement: Measurement, config_dir: str | None = None) -> Source:
    """Return the source from which the settings of a measurement are composed.

    Several measurements may share a YAML file, so the source also names the keys that only the others read.
    config_dir: a folder of the user with more YAML files.
    """
    own = measurement.settings
    others = {
        key: value
        for _, other in MEASUREMENTS.items() if other is not measurement and other.settings.CONFIG == own.CONFIG
        for key, value in known_keys(other.settings.Settings).items() if key not in keys_of(own.Settings)
    }

    def as_meant(overrides: Sequence[str], names: shorthands.Names) -> list[str]:
        meant = shorthands.as_meant(overrides, names)
        return shorthands.with_own_defaults(meant) if measurement.name == ABLATION.name else meant

    return Source(own, config_dir, others, _keys_of_task, as_meant)


def compose_settings(
    measurement: Measurement | str, overrides: Sequence[str] = (), config_dir: str | None = None
) -> Any:
    """Return the checked settings of a measurement.

    overrides: such as "model=gpt2", in the grammar of Hydra. config_dir: a folder of the user with more YAML files.
    Raises InputError with one line for the first mistake.
    """
    return compose(source_of(find(measurement) if isinstance(measurement, str) else measurement, config_dir), overrides)


def refuse_foreign(measurement: Measurement, overrides: Sequence[str], command: str) -> None:
    """Raise InputError if an override has a key that only other measurements read.

    The same key is accepted in a YAML file, because several measurements may share the file.
    """
    foreign = source_of(measurement).others
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.split(".")[0] in foreign:
            readers = [f"harness {name}" for name, other in MEASUREMENTS.items()
                       if key.split(".")[0] in keys_of(other.settings.Settings)]
            raise InputError(f"{key}: harness {command} does not read it; {' and '.join(readers)} does")


def tables_page() -> str:
    """Return the page docs/tables.md, with every column of every table of the harness's own measurements."""
    from harness.measurements.comparison.tables import TABLES as COMPARISON

    described = [*(one.tables for one in (ABLATION, SPECTRA, SEARCH, TUNING, COUPLING, COMPONENTS)), COMPARISON]
    chapters = [tables_markdown(tables) for tables in described]
    introduction = [
        "# Tables",
        "",
        "A run writes each of its tables as parquet files into a folder of the table's name. A unit (a cell, a matrix,",
        "a stage) is done when its rows are in the first table of its measurement. Columns marked * are never null.",
        "",
        "The command `python -m harness.measurements > docs/tables.md` writes this page.",
        "",
    ]
    return "\n".join(introduction) + "\n" + "\n".join(chapters)


def _keys_of_task(kind: str) -> Sequence[str]:
    from harness.tasks.registry import TASKS

    return keys_of(TASKS[kind]) if kind in TASKS else ()
