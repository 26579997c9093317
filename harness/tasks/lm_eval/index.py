"""Find and load the tasks of lm-evaluation-harness by name, with data from local files if the settings name them.

lm-eval has about 14,000 YAML files, and its TaskManager parses all of them. To save this time, the files are searched
for the name of a task, and a TaskManager of that one folder builds the task. Only groups and tags that reach beyond one
folder need the whole index.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import InputError

if TYPE_CHECKING:
    from harness.tasks.lm_eval.settings import LmEvalSettings

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def knows(name: str) -> bool:
    """Return whether lm-eval is installed and has a task, group or tag of this name. lm-eval is not imported."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return False
    return name in _stated(Path(spec.origin).parent / "tasks")


@dataclass(frozen=True)
class FoundTasks:
    """The tasks that a name means.

    tasks: name -> Task of lm-eval, in its order. groups: the Groups of lm-eval that hold them.
    single: whether the name is that of a task; then there are no groups. A group or tag may also hold only one task.
    """

    tasks: dict[str, Any]
    groups: tuple[Any, ...]
    single: bool


def load(name: str, asked: LmEvalSettings) -> FoundTasks:
    """Return the task, group or tag of lm-eval that `asked.task` names, with its documents.

    name: the name of the task in the study; messages begin with "tasks.<name>".
    Raises InputError if the task, a folder or a file does not exist (its message names similar tasks), the task does
    not have a split that data_files names, or the data cannot be loaded.
    """
    key = f"tasks.{name}"
    if asked.include_path is not None and not Path(asked.include_path).expanduser().is_dir():
        raise InputError(f"{key}.include_path: no such folder {asked.include_path!r}; give one with task YAML files")
    with _quiet():
        manager, kind = _manager(key, asked)
        if kind == "task":
            return FoundTasks({asked.task: _single(key, asked, manager)}, (), True)
        members = _members(manager, asked.task)
        listed = ", ".join(members[:12]) + (f" and {len(members) - 12} more" if len(members) > 12 else "")
        if asked.data_files:
            raise InputError(
                f"{key}.data_files: {asked.task!r} is a {kind} of several tasks, each with files of its own;"
                f" make one entry under tasks for each of {listed}"
            )
        with _reproducible():
            try:
                loaded = manager.load([asked.task])
            except Exception as error:  # data sets and the code of tasks may raise anything
                raise InputError(
                    f"{key}: lm-eval cannot load the {kind} {asked.task!r}: {reason(error)}"
                    f" (offline? make one entry with data_files for each of {listed})"
                ) from error
        return FoundTasks(dict(loaded["tasks"]), tuple(loaded.get("groups", {}).values()), False)


def _manager(key: str, asked: LmEvalSettings) -> tuple[Any, str]:
    """Return a TaskManager that knows the name, and whether the name is that of a "task", "group" or "tag"."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    own = str(Path(asked.include_path).expanduser()) if asked.include_path is not None else None
    if own is not None and _whole(_task_manager(own, False), asked.task, own_tags=True):
        return _known(_task_manager(own, False), asked.task)
    path = _find_yaml(asked.task, root)
    mine = own is not None and _kind(_task_manager(own, False), asked.task) is not None
    if path is not None and not mine and _whole(_task_manager(str(path.parent), False), asked.task):
        return _known(_task_manager(str(path.parent), False), asked.task)
    if mine or path is not None or _mentioned(asked.task, root):
        manager = _task_manager(own, True)
        if kind := _kind(manager, asked.task):
            return manager, kind
        names = manager.all_tasks
    else:
        names = _all_names(root)
    close = difflib.get_close_matches(asked.task, names, 5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them; include_path adds yours"
    raise InputError(f"{key}.task: lm-eval knows no task {asked.task!r}; {hint}")


def _known(manager: Any, name: str) -> tuple[Any, str]:
    """Return the manager and the kind of a name that is in its index."""
    kind = _kind(manager, name)
    assert kind is not None
    return manager, kind


def _whole(manager: Any, name: str, own_tags: bool = False) -> bool:
    """Return whether the index of one folder holds a name and all members of it.

    A tag may have members in any folder. own_tags: whether this is the user's folder, whose tags hide the others.
    """
    kind = _kind(manager, name)
    if kind == "group":
        return all(_whole(manager, child, own_tags) for child in _children(manager, name))
    return kind == "task" or (kind == "tag" and own_tags)


def _kind(manager: Any, name: str) -> str | None:
    if name in manager.all_subtasks:
        return "task"
    if name in manager.all_groups:
        return "group"
    return "tag" if name in manager.all_tags else None


def _children(manager: Any, name: str) -> list[str]:
    """Return the names that a group or tag lists."""
    entry = manager.task_index[name]
    listed = sorted(entry.tags) if _kind(manager, name) == "tag" else entry.cfg.get("task") or []
    listed = [listed] if isinstance(listed, str) else listed
    return [child if isinstance(child, str) else child.get("task") or child.get("group") for child in listed]


def _members(manager: Any, name: str) -> list[str]:
    """Return the names of all tasks in a group or tag. No data are loaded."""
    if _kind(manager, name) in (None, "task"):
        return [name]
    return [member for child in _children(manager, name) for member in _members(manager, child)]


def _task_manager(folder: str | None, include_defaults: bool) -> Any:
    files = sorted(Path(folder).rglob("*.yaml")) if folder is not None else []
    state = tuple((str(path), (there := path.stat()).st_mtime_ns, there.st_size) for path in files)
    return _manager_of(folder, include_defaults, state)


@functools.cache
def _manager_of(folder: str | None, include_defaults: bool, state: tuple[tuple[str, int, int], ...]) -> Any:
    """Return the TaskManager of a folder. state: the state of its files, so that a process notices changes."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults, include_path=folder)


@functools.cache
def _yaml_files(root: Path) -> tuple[Path, ...]:
    return tuple(sorted(root.glob("**/*.yaml")))


def _find_yaml(name: str, root: Path) -> Path | None:
    """Return the file that defines a task or group, or None if there is none."""
    defines = _line(rb"[\"']?(?:task|group)[\"']?[ \t]*:", name)
    word = re.split(r"[_\-:]", name)[0]
    # The path usually contains the first word of the name. Such files are read first, so that few are read.
    for path in sorted(_yaml_files(root), key=lambda path: word not in path.relative_to(root).as_posix()):
        if defines.search(path.read_bytes()):
            return path
    return None


def _mentioned(name: str, root: Path) -> bool:
    """Return whether the name stands alone on a line of any file, as a tag does.

    This saves the time of the whole index if the name is misspelt.
    """
    alone = _line(rb"[ \t]*(?:-|tag[ \t]*:)", name)
    return any(alone.search(path.read_bytes()) for path in _yaml_files(root))


def _line(start: bytes, name: str) -> re.Pattern[bytes]:
    """Return the pattern of a line of YAML with `start` and the name, which may be quoted, and perhaps a comment."""
    return re.compile(rb"^%s[ \t]*[\"']?%s[\"']?\s*(?:#.*)?$" % (start, re.escape(name).encode()), re.M)


@functools.cache
def _stated(root: Path) -> frozenset[str]:
    """Return the names of all tasks and groups, and all words that stand alone on a line as a tag does."""
    alone = re.compile(rb"^[ \t]*(?:-|tag[ \t]*:)[ \t]*[\"']?([\w:-]+)[\"']?\s*(?:#.*)?$", re.M)
    tags = {found.decode() for path in _yaml_files(root) for found in alone.findall(path.read_bytes())}
    return frozenset(tags.union(_all_names(root)))


def _all_names(root: Path) -> list[str]:
    defines = re.compile(rb"^[\"']?(?:task|group)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[{]+)", re.M)
    return sorted({found.decode() for path in _yaml_files(root) for found in defines.findall(path.read_bytes())})


def _single(key: str, asked: LmEvalSettings, manager: Any) -> Any:
    stock = manager.task_index[asked.task].cfg
    if stock.get("unsafe_code"):
        raise InputError(f"{key}.task: {asked.task!r} executes what the model writes; such tasks are not run")
    overrides = _local_data(key, asked, stock, _fewshot_config(manager, asked.task)) if asked.data_files else {}
    shots = stock.get("num_fewshot") if asked.num_fewshot is None else asked.num_fewshot
    if not shots and "class" not in stock:
        # Without few-shot examples, the split from which they would be drawn need not be read and processed.
        overrides |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    with _reproducible():
        try:
            # Inside a group, lm-eval merges these settings with its YAML file. It would take a dict alone as the whole
            # definition of a task.
            group = {"group": "harness", "task": [{"task": asked.task, **overrides}]}
            return manager.load([group])["tasks"][asked.task]
        except InputError:
            raise
        except Exception as error:  # data sets, templates and the code of tasks may raise anything
            hint = "" if asked.data_files or "class" in stock else (
                f" (offline? set {key}.data_files.<split> for {_splits_of(stock)})"
            )
            raise InputError(f"{key}: lm-eval cannot load {asked.task!r}: {reason(error)}{hint}") from error


def _fewshot_config(manager: Any, name: str) -> dict[str, Any]:
    """Return the fewshot_config of a task with its functions, of which the index has only the names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    if not isinstance(entry.cfg.get("fewshot_config"), dict) or entry.yaml_path is None:
        return {}
    return load_yaml(entry.yaml_path)["fewshot_config"]


def _local_data(key: str, asked: LmEvalSettings, stock: dict[str, Any], fewshot: dict[str, Any]) -> dict[str, Any]:
    """Return settings by which a task reads its splits from local files and has no split without a file."""
    if "class" in stock:
        raise InputError(f"{key}.data_files: {asked.task!r} loads its data by code of its own; leave data_files empty")
    known: set[str] = {split for role in SPLITS if (split := stock.get(role))}
    if fewshot.get("split") is not None:
        known.add(fewshot["split"])
    for split, path in asked.data_files.items():
        if split not in known:
            there = ", ".join(sorted(known))
            raise InputError(f"{key}.data_files.{split}: {asked.task!r} has no such split; it has {there}")
        where = f"{key}.data_files.{split}: "
        if not Path(path).expanduser().is_file():
            raise InputError(f"{where}no such file {path!r}; give the path of an existing file")
        if Path(path).suffix not in BUILDERS:
            raise InputError(f"{where}{path!r} has none of the known suffixes {' '.join(BUILDERS)}")
    kept = {role: split if (split := stock.get(role)) in asked.data_files else None for role in SPLITS}
    if not kept["test_split"] and not kept["validation_split"]:
        evaluated = " or ".join(split for role in SPLITS[2:0:-1] if (split := stock.get(role)))
        raise InputError(f"{key}.data_files: no file for the split that {asked.task!r} evaluates; give {evaluated}")
    if fewshot.get("split") not in asked.data_files:
        fewshot = {option: value for option, value in fewshot.items() if option != "split"}
    if not any([*list(kept.values())[:2], kept["fewshot_split"], fewshot.get("split"), fewshot.get("samples")]):
        # The few-shot examples must then come from the evaluated documents. With the split named here, lm-eval does not
        # show a question as its own example.
        kept["fewshot_split"] = kept["test_split"]
    return {
        **kept,
        "fewshot_config": fewshot or None,
        "dataset_path": "local files",
        "dataset_name": None,
        "dataset_kwargs": None,
        "custom_dataset": functools.partial(_read_splits, key, tuple(asked.data_files.items())),
    }


def _read_splits(key: str, files: tuple[tuple[str, str], ...], /, **_: Any) -> Any:
    """Return a DatasetDict of local files in memory, read by the same builders as `dataset_path: json`.

    The cache of the builders is a temporary folder. So a changed file is read again, processes do not wait for the
    locks of others, and no files remain.
    """
    import datasets

    found = {}
    with tempfile.TemporaryDirectory(prefix="harness-") as cache:
        for split, path in files:
            path = str(Path(path).expanduser())
            try:
                builder = BUILDERS[Path(path).suffix]
                found[split] = datasets.load_dataset(
                    builder, data_files={split: path}, split=split, cache_dir=cache, keep_in_memory=True
                )
            except Exception as error:  # pyarrow, pandas and datasets have exceptions of their own
                raise InputError(f"{key}.data_files.{split}: cannot read {path}: {reason(error)}") from error
    return datasets.DatasetDict(found)


def _splits_of(stock: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(split for role in SPLITS if (split := stock.get(role))))


def reason(error: BaseException) -> str:
    """Return the type and the message of an exception on one line of limited length."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # the message of the outer one says only that an error occurred
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off, inside the context, the progress bars of datasets and the many warnings of lm-eval."""
    import datasets

    loggers = {logging.getLogger("lm_eval"): logging.ERROR, logging.getLogger("datasets"): logging.CRITICAL}
    levels, bars = {logger: logger.level for logger in loggers}, datasets.are_progress_bars_disabled()
    for logger, level in loggers.items():
        logger.setLevel(level)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Seed the global random generators as lm-eval's evaluator does, because some tasks shuffle; restore them later."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
