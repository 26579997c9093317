"""Hydra's side of the command line: from YAML groups and overrides to a validated Config or SpectraConfig."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import Config, validate
from harness.errors import InputError
from harness.spectra_config import SpectraConfig, validate_spectra
from harness.task_config import TASK_KINDS
from harness.unread import refuse_unread, refuse_unread_of_model, require_folder


def _checked(config: Config) -> Config:
    validate(config)
    refuse_unread(config)
    require_folder(config.output)
    if config.output is not None:
        from harness.tables.spectra_report import MANIFEST

        _require_without(config.output, MANIFEST, "spectra")
    return config


def _checked_spectra(config: SpectraConfig) -> SpectraConfig:
    validate_spectra(config)
    refuse_unread_of_model(config.model)
    require_folder(config.output)
    if config.output is not None:
        from harness.execution.manifest import MANIFEST

        _require_without(config.output, MANIFEST, "a study")
    return config


def _require_without(output: str, manifest: str, what: str) -> None:
    """A report of a folder that holds a study and spectra would show one of them only."""
    if (Path(output).expanduser() / manifest).is_file():
        raise InputError(f"output: {output} holds {what} ({manifest}); name another folder")


# conf/<name>.yaml -> its dataclass and the check of its values
ROOTS = {"config": (Config, _checked), "spectra": (SpectraConfig, _checked_spectra)}


def config_folder() -> Path:
    """conf/ of the checkout, or harness/conf of an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise InputError(f"the configs that come with the harness are missing beside {here}; install it again")


def groups(folder: Path | None = None) -> dict[str, list[str]]:
    """Config groups and the names in each."""
    folder = folder or config_folder()
    return {
        group.name: sorted(path.stem for path in group.glob("*.yaml"))
        for group in sorted(folder.iterdir())
        if group.is_dir() and any(group.glob("*.yaml"))
    }


def register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(name="spectra_schema", node=SpectraConfig)


def _known_keys(prefix: str, root: type) -> list[str]:
    node: Any = root
    for part in filter(None, prefix.split(".")):
        if not dataclasses.is_dataclass(node):
            return []
        types = {f.name: f.default_factory if f.default_factory is not dataclasses.MISSING else None
                 for f in dataclasses.fields(node)}
        node = types.get(part)
    return [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _task_key(key: str, overrides: Sequence[str], config_dir: str | None) -> str:
    """One line for a key below `tasks` that is not there."""
    _, name, *inside = key.split(".")
    files = [folder / "task" / f"{name}.yaml" for folder in (Path(config_dir or config_folder()), config_folder())]
    there = [file for file in files if file.is_file()]
    if not inside:
        if there:
            return f"{key}: not a task of these settings; choose it with task={name}, or task=[...,{name}]"
        near = _nearest(name, groups()["task"])
        return f"{key}: no such task in these settings; {near}choose one with task=..., or add +{key}.kind=..."
    given = [override.partition("=")[2] for override in overrides if override.startswith(f"+tasks.{name}.kind=")]
    kinds = given or [line.split()[1] for file in there for line in file.read_text().splitlines()
                      if line.startswith("kind: ")]
    kind = TASK_KINDS.get(kinds[0]) if kinds else None
    known = [field.name for field in dataclasses.fields(kind)] if kind else []
    if inside[0] in known:
        return f"{key}: not set so far; add it with +{key}=..."
    return f"{key}: unknown key; {_nearest(inside[0], known)}known here: {', '.join(known) or 'see docs/tasks.md'}"


def explain(
    error: Exception, root: type = Config, overrides: Sequence[str] = (), config_dir: str | None = None
) -> str:
    """One line for what Hydra or OmegaConf refused; root is the dataclass of the settings."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    not_there = re.search(r"Key '([^']+)' (?:is not in struct|not in '[^']+')", text)
    if not_there:
        full = re.search(r"full_key: (\S+)", text)
        key = full.group(1) if full else not_there.group(1)
        if key.startswith("tasks."):
            return _task_key(key, overrides, config_dir)
        known = _known_keys(key.rpartition(".")[0], root)
        near = _nearest(key.rpartition(".")[2], known)
        return f"{key}: unknown key; {near}known here: {', '.join(known) or 'see the YAML file of that group'}"
    no_file = re.search(r"Could not (?:find|load) '([^']+)/([^'/]*)'", text)
    if no_file:
        group, name = no_file.groups()
        options = re.search(r"Available options in '[^']+':\n((?:\t.*\n?)+)", text)  # none for one of a list
        known = options.group(1).split() if options else groups().get(group, [])
        return f"{group}: there is no {name!r}; {_nearest(name, known)}there are {', '.join(known)}"
    full = re.search(r"full_key: (\S+)", text)
    if full:
        reason = next(line for line in reversed(chain) if "full_key" in line).splitlines()[0]
        return f"{full.group(1)}: {reason}"
    return " ".join(chain[0].split())


def compose_config(overrides: list[str], config_dir: str | None = None, name: str = "config") -> Any:
    """Compose conf/<name>.yaml with overrides in Hydra's grammar: a Config, or the dataclass of that name in ROOTS.
    Raises InputError with one line."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise InputError(f"--config-dir: no folder {config_dir!r}")
        overrides = [*overrides, f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, ROOTS[name][0], overrides, config_dir)) from error
    except (ValueError, TypeError) as error:  # of Hydra, for a group that is set to a number or to null
        raise InputError(_no_name(overrides) or " ".join(str(error).split())) from error
    return config_from_omega(composed, name)


def _no_name(overrides: list[str]) -> str | None:
    """One line for the first override without a key, or of a group without a name of that group."""
    there = groups()
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key:
            return f"{override!r}: not a setting; give key=value"
        names = [name.strip() for name in value.strip("[]").split(",")]
        if key in there and any(re.fullmatch(r"[-+.\d]+|null|true|false", name) for name in names):
            return f"{key}: {value!r} is wrong; there are {', '.join(there[key])}"
    return None


def config_from_omega(composed: Any, name: str = "config") -> Any:
    """The validated dataclass of a composed DictConfig."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        key = re.search(r"full_key: (\S+)", str(error))
        raise InputError(f"{key.group(1) if key else 'a key'}: must be set on the command line") from error
    except OmegaConfBaseException as error:
        raise InputError(explain(error, ROOTS[name][0])) from error
    return ROOTS[name][1](config)
