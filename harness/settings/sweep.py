"""Sweeps over models, seeds and other settings in Hydra's grammar, where each combination is a separate run.

Their combinations are taken one after the other, unless the user asks for a sweeper or a launcher of Hydra.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from harness.errors import InputError, complain
from harness.settings.compose import Source, compose, register_schema, settings_of
from harness.settings.explain import explain


def sweep_by_hydra(source: Source, overrides: Sequence[str], job: Callable[[Any], object]) -> None:
    """Call `job` with the settings of every combination of a sweep.

    Raises InputError before the first call if a combination is wrong.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_sweep(source, overrides)
    register_schema(source)

    @hydra.main(config_path=str(source.folder()), config_name=source.root.CONFIG, version_base="1.3")
    def run_job(composed: Any) -> None:
        try:
            job(settings_of(source, composed, overrides))
        except InputError as error:
            complain(error)
            raise SystemExit(2) from error

    where = source.searchpath()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    with tempfile.TemporaryDirectory() as scratch:  # for the multirun.yaml that Hydra writes
        if not any(override.lstrip("+").startswith("hydra.sweep.dir=") for override in overrides):
            where.append(f"hydra.sweep.dir='{scratch}'")
        sys.argv = ["harness", "--multirun", *where, *overrides]
        try:
            run_job()
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(explain(error, source.known())) from error


def combinations(source: Source, overrides: Sequence[str]) -> list[tuple[str, list[str]]] | None:
    """Return the name and the overrides of each run of a sweep. The name has the values that differ between runs.

    None if the overrides have settings of Hydra, whose sweeper must then make the runs. Raises InputError for overrides
    that are not in the grammar.
    """
    if any(override.lstrip("+~").startswith("hydra") or "${hydra" in override for override in overrides):
        return None
    swept, axes = _axes(source, overrides)
    return [(", ".join(one for one, differs in zip(words, swept) if differs) or "run", list(words))
            for words in itertools.product(*axes)]


def check_sweep(source: Source, overrides: Sequence[str]) -> None:
    """Compose every combination of a sweep, to find errors before the first run. Raises an InputError of one line."""
    # the values of these are known only within a job
    overrides = [override for override in overrides if "${hydra" not in override]
    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return  # another sweeper has another grammar
    for words in itertools.product(*_axes(source, overrides)[1]):
        compose(source, words)


def _axes(source: Source, overrides: Sequence[str]) -> tuple[list[bool], list[list[str]]]:
    """Return for each override whether it is swept, and the overrides that it stands for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        axes = [[f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
                if one.is_discrete_sweep() else [override] for one, override in zip(parsed, overrides)]
    except HydraException as error:
        raise InputError(explain(error, source.known())) from error
    return [one.is_discrete_sweep() for one in parsed], axes
