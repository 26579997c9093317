"""Outer axes (models, seeds) through Hydra's own sweeper and launcher; each job is a study of its own."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable

from harness.compose import compose_config, config_folder, config_from_omega, explain, register_schema
from harness.config import Config
from harness.errors import InputError, complain


def sweep(overrides: list[str], config_dir: str | None, job: Callable[[Config], object]) -> None:
    """Call `job` with the settings of every combination. Raises InputError before the first where one is wrong."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    check_sweep(overrides, config_dir)
    register_schema()

    @hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")
    def run_job(composed) -> None:
        try:
            job(config_from_omega(composed))
        except InputError as error:
            complain(error)
            raise SystemExit(2) from error

    where = ["--config-dir", config_dir] if config_dir else []
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors come to us instead of to the terminal
    with tempfile.TemporaryDirectory() as scratch:  # for the multirun.yaml that it writes
        if not any(override.lstrip("+").startswith("hydra.sweep.dir=") for override in overrides):
            where.append(f"hydra.sweep.dir='{scratch}'")
        sys.argv = ["harness", "--multirun", *where, *overrides]
        try:
            run_job()
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(explain(error)) from error


def check_sweep(overrides: list[str], config_dir: str | None = None) -> None:
    """Compose every combination of a sweep before its first study runs. Raises InputError with one line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    # what these stand for is known in the job only
    overrides = [override for override in overrides if "${hydra" not in override]
    if any(override.startswith("hydra/sweeper=") for override in overrides):
        return  # another sweeper has a grammar of its own
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        axes = [[f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
                if one.is_discrete_sweep() else [one.input_line] for one in parsed]
    except HydraException as error:
        raise InputError(explain(error)) from error
    for combination in itertools.product(*axes):
        compose_config(list(combination), config_dir)
