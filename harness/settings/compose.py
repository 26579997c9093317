"""Compose the settings of a measurement from YAML files and overrides with Hydra, and check them."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.errors import InputError
from harness.settings.configs import config_folder, groups
from harness.settings.constraints import ReadBy
from harness.settings.explain import Known, explain, no_name, not_chosen, refuse_keys, too_long
from harness.settings.plain_values import refuse_unusable
from harness.settings.validation import hints_of, keys_of, plain, refuse_unread, validated

# Settings whose lists have no default, so that nothing else says that they are lists.
_LISTS = frozenset({"region.values", "region.deciles", "region.keep", "region.ratios", "region.components",
                    "target.blocks"})  # fmt: skip


class Root(Protocol):
    """The module settings.py of a measurement, whose settings are composed.

    CONFIG: the name of its YAML file in conf/. Settings: the dataclass of its settings.
    """

    CONFIG: str
    Settings: type

    def check(self, settings: Any) -> None:
        """Check of settings what matters only if they are to be run. Raises InputError."""
        ...


def known_keys(kind: type) -> dict[str, Any]:
    """Return every key that a config of these settings may have, with its default. Hydra refuses all other keys."""
    hints, default = hints_of(kind), kind()
    return {key: _below(hints[key], getattr(default, key)) for key in keys_of(kind)}


def _below(hint: Any, default: Any) -> Any:
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, ReadBy) and mark.keys is not None:
            return mark.keys()
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return known_keys(type(default))
    return plain(default)


@dataclass(frozen=True)
class Source:
    """Where settings are composed from.

    root: the module whose settings these are. config_dir: a folder with the user's own config groups, which is searched
    before conf/. others: keys, with defaults, that the YAML file may have for other measurements and that are removed
    from the settings. keys_of_task: a function from a kind of task to its keys, for messages. as_meant: a function from
    the overrides that the user typed and the names in each config group to the overrides that they stand for.
    """

    root: Root
    config_dir: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    keys_of_task: Callable[[str], Sequence[str]] | None = None
    as_meant: Callable[[Sequence[str], Mapping[str, Sequence[str]]], Sequence[str]] = lambda words, _: words

    @functools.cached_property
    def keys(self) -> dict[str, Any]:
        """The tree of all keys that may be set, with their defaults."""
        return {**known_keys(self.root.Settings), **self.others}

    def folder(self) -> Path:
        """Return the folder of the YAML file: conf/, or CONFIG_FOLDER of a measurement of another package."""
        return Path(getattr(self.root, "CONFIG_FOLDER", config_folder()))

    def searchpath(self) -> list[str]:
        """Return the override that tells Hydra to search other folders, too, or nothing if there are none.

        Raises InputError for a config_dir that does not exist.
        """
        if self.config_dir is not None and not os.path.isdir(self.config_dir):
            raise InputError(f"--config-dir: no folder {self.config_dir[:200]!r}")
        folders = [] if self.config_dir is None else [Path(self.config_dir).resolve()]
        if self.folder() != config_folder():
            folders.append(config_folder())
        return [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []

    def names(self) -> dict[str, list[str]]:
        """Return the config groups with the names in each, those of the user's folder included."""
        known = groups()
        for group, own in (groups(Path(self.config_dir)) if self.config_dir is not None else {}).items():
            known[group] = sorted({*known.get(group, []), *own})
        return known

    def known(self) -> Known:
        """Return the names that messages may suggest."""
        folder = config_folder()
        own = Path(self.config_dir) if self.config_dir is not None else folder
        known = Known(self.keys, groups(), [own / "task", folder / "task"])
        return known if self.keys_of_task is None else dataclasses.replace(known, keys_of_task=self.keys_of_task)


def register_schema(source: Source) -> None:
    """Tell Hydra which keys the YAML file and its overrides may have."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{source.root.CONFIG}_schema", node=source.keys)


def compose(source: Source, overrides: Sequence[str]) -> Any:
    """Compose conf/<root.CONFIG>.yaml with overrides in Hydra's grammar, and return the checked settings.

    Raises an InputError of one line.
    """
    import yaml
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    refuse_keys(overrides)
    where = source.searchpath()
    overrides = _in_lists(source.as_meant(overrides, source.names()), source.keys)
    words = [*overrides, *where]
    register_schema(source)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(source.folder()), version_base="1.3"):
            composed = hydra_compose(source.root.CONFIG, overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, source.known(), words)) from error
    except (ValueError, TypeError) as error:  # Hydra raises these for a group that is set to a number or to null
        raise InputError(no_name(words, groups()) or too_long(words) or " ".join(str(error).split())) from error
    except RecursionError as error:
        raise InputError("the settings are nested too deeply; give single values, or lists of values") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise InputError(f"a YAML file of settings cannot be read: {error}") from error
        key, _, value = max(words, key=len).partition("=")
        raise InputError(f"{key}: {value[:200]!r} is wrong; the name is too long for a file") from error
    except yaml.YAMLError as error:  # a file of the user that is no YAML
        raise InputError(f"a YAML file of settings cannot be read: {' '.join(str(error).split())}") from error
    return settings_of(source, composed, overrides)


def _in_lists(overrides: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Return overrides in which a single number for a setting that takes a list of numbers is a list of one."""
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", value)
        if number and key.count(".") == 1 and not key.startswith(("+", "~", "tasks.")):
            group, name = key.split(".")
            below = keys.get(group)
            if isinstance(below, Mapping) and (isinstance(below.get(name), list) or key in _LISTS):
                override = f"{key}=[{value}]"
        found.append(override)
    return found


def settings_of(source: Source, composed: Any, overrides: Sequence[str] = ()) -> Any:
    """Return the checked settings of a composed DictConfig. Raises an InputError of one line.

    overrides: the overrides that the user typed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = re.search(r"full_key: (\S+)", str(error))
        raise InputError(f"{key.group(1) if key else 'a key'}: must be set on the command line") from error
    except OmegaConfBaseException as error:
        raise InputError(explain(error, source.known())) from error
    tasks = values.get("tasks")
    if isinstance(tasks, dict):
        values["tasks"] = _chosen_tasks(source, tasks, overrides)
    refuse_unusable(values)
    return checked(source.root, {key: value for key, value in values.items() if key not in source.others})


def _chosen_tasks(source: Source, tasks: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tasks without those that an experiment file sets and that are not chosen on the command line.

    Of these there are only the values that the experiment changes, and no kind, which is in the YAML file of the task.
    Raises InputError if the user has typed a setting of such a task.
    """
    left = {name for name, one in tasks.items() if isinstance(one, dict) and "kind" not in one}
    known = source.known()
    for name in sorted(map(str, left)):
        typed = next((one for one in overrides if re.match(rf"\+{{0,2}}tasks\.{re.escape(name)}[.=]", one)), None)
        if not any((folder / f"{name}.yaml").is_file() for folder in known.task_folders):
            left.discard(name)  # not a task that could be chosen; its kind is missing
        elif typed is not None:
            if typed.startswith("+"):
                left.discard(name)
            else:
                raise InputError(not_chosen(f"tasks.{name}", name))
    return {name: one for name, one in tasks.items() if name not in left}


def checked(root: Root, values: Mapping[str, Any]) -> Any:
    """Return the checked settings of plain values. Raises an InputError of one line."""
    settings: Any = validated(root.Settings, values)
    refuse_unread(settings)
    root.check(settings)
    return settings
