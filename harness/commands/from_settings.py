"""The commands that take settings: run, spectra, search, plan, submit and export.

Each is a function from the parsed arguments to the exit status. `add_...` functions add the arguments of a command.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from harness.commands.outcome import exit_status, ignore, reports_as
from harness.errors import InputError, one_line, printable

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from harness.commands.sweeps import Done
    from harness.engine.hub import Repository
    from harness.engine.measurement import Measurement
    from harness.engine.plan import Plan
    from harness.measurements.ablation.export import Exported

# The commands that do not have the name of their measurement.
COMMAND_OF = {"ablation": "run", "tuning": "tune"}


def add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--multirun", action="store_true", help="one run for each combination of a=1,2 b=3,4")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no report")


def measure(arguments: argparse.Namespace) -> int:
    """Run what is missing of a measurement, then report: harness run, spectra, search, and those of other packages."""
    return _for_settings(arguments, _measure)


def _measure(measurement: Measurement, plan: Plan, arguments: argparse.Namespace) -> Done:
    from harness.commands.sweeps import Done
    from harness.engine.ranks import is_main_process
    from harness.engine.run import RunOptions, run_plan, to_stderr
    from harness.files import told_in_one_line

    quiet = arguments.quiet
    outcome = run_plan(measurement, plan, RunOptions(not quiet, ignore if quiet else to_stderr, tidy=True))
    if not quiet and is_main_process():
        with told_in_one_line(outcome.folder), reports_as(plan.settings):
            measurement.report.report(outcome.folder)
    status = exit_status(outcome)
    if is_main_process() and not _track(measurement, plan, outcome.folder):
        status = 1
    return Done(status, outcome.folder)


def _track(measurement: Measurement, plan: Plan, folder: Path) -> bool:
    """Give a run to the tracker of its settings; return whether that went well. The run itself is safe in any case."""
    from harness.engine.trackers import TrackerSettings, track

    settings = getattr(plan.settings, "tracker", TrackerSettings())
    try:
        where = track(measurement, folder, settings)
    except Exception as error:  # of somebody else's package or server
        reason = printable(one_line(error))
        print(f"harness: tracker={settings.name}: {reason}; the run is whole in {folder}, and the same command gives it"
              " to the tracker again", file=sys.stderr)
        return False
    if where is not None:
        print(f"{settings.name}: {printable(where)}")
    return True


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--show-config", action="store_true", help="print the composed settings as YAML and stop")
    parser.add_argument("--freeze", action="store_true", help="write the manifest too, for harness work")


def plan(arguments: argparse.Namespace) -> int:
    """Print what a run would measure, or its settings; write its manifest if that is asked for."""
    from harness.engine.manifest import freeze

    measurement, overrides = _measurement_of(arguments)
    settings = _compose(measurement, overrides, arguments)
    if arguments.show_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(_that_apply(settings, overrides)), end="")
        return 0
    plan = measurement.units.plan(settings)
    if arguments.freeze:
        plan.require_settled("plan --freeze")
    print("\n".join(map(printable, measurement.units.describe(plan).split("\n"))))
    if arguments.freeze:
        freeze(measurement, plan)
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Submit what is missing of a run to Slurm, and wait for it if the settings say so."""
    return _for_settings(arguments, _submit)


def _submit(measurement: Measurement, plan: Plan, arguments: argparse.Namespace) -> Done:
    from harness.commands.sweeps import Done
    from harness.engine.manifest import read_manifest
    from harness.engine.run import to_stderr
    from harness.engine.slurm import submit, wait
    from harness.measurements import find

    folder = submit(measurement, plan, find, to_stderr)
    if not plan.cluster.wait:
        return Done(0, folder)
    units = [unit_id for unit_id, _ in read_manifest(folder).units]
    if wait(measurement, folder, units, plan.cluster.poll_seconds, progress=not arguments.quiet):
        return Done(0, folder)
    print(f"harness: not every unit is done; harness status {folder} shows which", file=sys.stderr)
    return Done(1, folder)


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--factored", action="store_true", help="save matrices as low-rank factors if that is smaller")
    parser.add_argument("--study", metavar="FOLDER", help="the study of the cell that --cell names")
    parser.add_argument("--cell", metavar="CELL_ID", help="a cell whose ablation is saved, instead of settings")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the model there, too, with a card that says"
                        " what was removed and what that did")
    parser.add_argument("--private", action="store_true", help="make a new repository of the hub private")


def export(arguments: argparse.Namespace) -> int:
    """Save a model with one ablation, which settings mean or which a cell of a study measured."""
    from harness.engine.hub import Repository
    from harness.measurements.ablation.export import export, export_cell

    _hush()
    repository = None
    if arguments.push_to_hub is not None:
        repository = Repository(arguments.push_to_hub, "model", arguments.private)
    elif arguments.private:
        raise InputError("--private: only a repository of the hub is private; give --push-to-hub OWNER/NAME, too")
    if arguments.study is None and arguments.cell is None:
        measurement, overrides = _measurement_of(arguments)
        settings = _compose(measurement, overrides, arguments)
        _require_device(settings)
        return _exported(export(settings, arguments.factored), repository, arguments)
    if arguments.study is None or arguments.cell is None:
        raise InputError("--study and --cell: give both, a study's folder and the id of one of its cells")
    output = None
    for override in arguments.overrides:
        key, _, value = override.partition("=")
        if key != "output":
            raise InputError(f"{key}: a cell has its own settings; with --cell only output=FOLDER can be set")
        output = value
    return _exported(export_cell(arguments.study, arguments.cell, output, arguments.factored), repository, arguments)


def _exported(done: Exported, repository: Repository | None, arguments: argparse.Namespace) -> int:
    print(done)
    if repository is not None:
        from harness.engine.hub import push
        from harness.measurements.ablation.card import write_model_card

        write_model_card(done.folder, arguments.study, arguments.cell)
        print(push(repository, done.folder, f"{done.ablation.target.label}: {done.ablation.label}"))
    return 0


def _measurement_of(arguments: argparse.Namespace) -> tuple[Measurement, list[str]]:
    """Return the measurement of a command, and its overrides.

    `plan` and `submit` take the name of another measurement as their first word, as in `harness plan spectra ...`.
    """
    from harness.measurements import MEASUREMENTS, find

    name, overrides = arguments.measurement, list(arguments.overrides)
    if arguments.command in ("plan", "submit") and overrides and "=" not in overrides[0]:
        names = {**{one: one for one in MEASUREMENTS}, **{command: one for one, command in COMMAND_OF.items()}}
        if overrides[0] not in names:
            raise InputError(f"{overrides[0]!r}: neither a setting (key=value) nor one of {', '.join(names)}")
        name, overrides = names[overrides[0]], overrides[1:]
    return find(name), overrides


def _compose(measurement: Measurement, overrides: Sequence[str], arguments: argparse.Namespace) -> Any:
    from harness.measurements import compose_settings, refuse_foreign

    refuse_foreign(measurement, overrides, arguments.command)
    settings = compose_settings(measurement, overrides, arguments.config_dir)
    for note in _unread(arguments.command, overrides, settings):
        print(f"harness: {printable(note)}", file=sys.stderr)
    return settings


def _unread(command: str, overrides: Sequence[str], settings: Any) -> Iterator[str]:
    """Yield a sentence for each setting that was typed and that nothing reads."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key.split(".")[0] == "cluster" and command not in ("submit", "plan"):
            yield f"{key}: harness {command} does not read it; harness submit does"
        if key.split(".")[0] == "tracker" and command == "submit":
            yield f"{key}: harness submit does not read it; harness run with the same settings does, when all is done"
        if key.split(".")[0] == "report" and command == "submit":
            yield f"{key}: harness submit does not read it; harness report does, when all is done"
    model = getattr(settings, "model", None)
    if model is not None and model.revision is not None and os.path.isdir(os.path.expanduser(model.name)):
        yield (f"model.revision: nothing reads {model.revision!r}, because the local folder {model.name!r} has no"
               " revisions")


def _that_apply(settings: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return settings as plain values, without those that nothing would read."""
    from harness.models.settings import NOT_OF_EMBEDDED
    from harness.settings.validation import plain

    values: dict[str, Any] = plain(settings)
    if "model" in values:
        for key in NOT_OF_EMBEDDED if settings.model.embedded else ("recall",):
            del values["model"][key]
    if "reference" in values and settings.reference.of(settings.model) is None:
        del values["reference"]
    if "tracker" in values and settings.tracker.name == "none":
        del values["tracker"]
    if "cluster" in values and not any(override.startswith("cluster") for override in overrides):
        del values["cluster"]
    if getattr(getattr(settings, "runtime", None), "precision", None) == "exact":
        del values["runtime"]["adaptive"]
    return values


def _plan(measurement: Measurement, settings: Any, arguments: argparse.Namespace) -> Plan:
    """Return the plan of a run. Raises InputError, also if this machine lacks the device and is to do the run."""
    if arguments.command != "submit":
        _require_device(settings)
        if hasattr(settings, "tracker"):
            settings.tracker.require_package()
        if arguments.quiet or not sys.stderr.isatty():
            _hush()
    return measurement.units.plan(settings)


def _for_settings(
    arguments: argparse.Namespace, job: Callable[[Measurement, Plan, argparse.Namespace], Done]
) -> int:
    """Do a job with the settings of a command, or with each combination of a sweep, and return the worst status."""
    measurement, overrides = _measurement_of(arguments)

    def plan(words: Sequence[str]) -> Plan:
        return _plan(measurement, _compose(measurement, words, arguments), arguments)

    if not arguments.multirun:
        return job(measurement, plan(overrides), arguments).status
    from harness.commands.sweeps import sweep
    from harness.measurements import refuse_foreign, source_of
    from harness.settings.sweep import combinations, sweep_by_hydra

    refuse_foreign(measurement, overrides, arguments.command)
    source = source_of(measurement, arguments.config_dir)
    found = combinations(source, overrides)
    if found is not None:
        compared = arguments.command == "run" and not arguments.quiet
        return sweep(measurement, found, plan, lambda one: job(measurement, one, arguments), compared)
    results: list[int] = []
    sweep_by_hydra(source, overrides, lambda settings: results.append(
        job(measurement, _plan(measurement, settings, arguments), arguments).status))
    return max(results, default=0)


def _require_device(settings: Any) -> None:
    """Raise InputError if this machine does not have the device of the settings.

    `plan` and `submit` do not ask, because the job may run on another machine.
    """
    model = getattr(settings, "model", None)
    if model is not None and model.device != "auto":
        from harness.models.loading import pick_device

        pick_device(model.device)


def _hush() -> None:
    """Turn off the progress bars of the libraries, both of those that are loaded and of those that will be."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
