"""Turn Python objects into plain values that identify what they do, so that the id of a task can depend on its code.

Data stand for themselves. A function or class is its name and a digest of the code that it comes from. The result is
the same in another process and after a folder has moved: it has no addresses, no absolute paths and no order of sets.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

# Our own code is not the user's: a change of it that changes numbers raises NUMBERS_VERSION.
OURS = __name__.split(".")[0]
# Modules whose other objects are values that `repr` shows.
VALUES = {"builtins", "datetime", "decimal", "fractions", "numpy", "pandas", "uuid"}


def digest_of(value: Any) -> str:
    """Return 64 bits of BLAKE2b of what `Describer` says of a value, as 16 hexadecimal digits."""
    return hashlib.blake2b(_canonical(Describer().plain(value)).encode(), digest_size=8).hexdigest()


class Describer:
    """What makes plain values of objects, and reads each folder of code once."""

    def __init__(self) -> None:
        self._sources: dict[Path, Any] = {}
        self._open: set[int] = set()  # the objects that are being described, because an object may hold itself

    def plain(self, value: Any) -> Any:
        """Return values for JSON that are equal for two objects if these mean the same."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (bytes, bytearray)):
            return {"!bytes": hashlib.blake2b(value, digest_size=16).hexdigest()}
        if isinstance(value, np.generic):
            return self.plain(value.item())
        if id(value) in self._open:
            return {"!inside": type(value).__qualname__}
        self._open.add(id(value))
        try:
            return self._container(value)
        finally:
            self._open.remove(id(value))

    def _container(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"!array": self.plain(value.tolist()), "dtype": str(value.dtype)}
        if isinstance(value, Mapping):
            return {key if isinstance(key, str) else f"!{_canonical(self.plain(key))}": self.plain(item)
                    for key, item in value.items()}
        if isinstance(value, AbstractSet):
            return {"!set": sorted((self.plain(item) for item in value), key=_canonical)}
        if isinstance(value, Sequence) and not isinstance(value, range):
            return [self.plain(item) for item in value]
        if isinstance(value, functools.partial):
            return {"!partial": [self.plain(part) for part in (value.func, value.args, value.keywords)]}
        if isinstance(value, types.MethodType):
            return {"!method": self.plain(value.__func__), "of": self.plain(value.__self__)}
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            bases = [base for base in value.__mro__ if base is not object]
            return {"!class": value.__qualname__, "code": [self._code(base) for base in bases]}
        if isinstance(value, types.ModuleType):
            return {"!module": self._code(value)}
        if isinstance(value, re.Pattern):
            return {"!pattern": value.pattern, "flags": value.flags}
        if hasattr(value, "__wrapped__"):  # the cache of functools
            return self.plain(value.__wrapped__)
        if inspect.isroutine(value):
            owner = getattr(value, "__self__", None)
            of = None if isinstance(owner, types.ModuleType) else self.plain(owner)
            return {"!builtin": value.__qualname__, "module": getattr(value, "__module__", None), "of": of}
        if isinstance(value, Path):
            return {"!path": value.name}
        if isinstance(value, enum.Enum):
            return {"!enum": value.name, "of": self.plain(type(value))}
        return self._object(value)

    def _function(self, function: types.FunctionType) -> dict[str, Any]:
        code = function.__code__
        cells = dict(zip(code.co_freevars, map(_content, function.__closure__ or ())))
        found = {
            "!function": function.__qualname__, "code": self._code(function), "line": code.co_firstlineno,
            "defaults": self.plain([function.__defaults__, function.__kwdefaults__]), "closure": self.plain(cells),
        }
        if function.__name__ == "<lambda>":  # one line may hold several
            constants = [one for one in code.co_consts if isinstance(one, (bool, int, float, str))]
            found["lambda"] = [list(code.co_names), self.plain(constants)]
        return found

    def _instructions(self, code: types.CodeType) -> list[Any]:
        constants = [self._instructions(one) if isinstance(one, types.CodeType) else self.plain(one)
                     for one in code.co_consts]
        return [code.co_code.hex(), list(code.co_names), constants]

    def _object(self, value: Any) -> dict[str, Any]:
        kind = type(value)
        found = {"!object": self.plain(kind)}
        if dataclasses.is_dataclass(value):
            return {**found, "fields": {f.name: self.plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
        # An object of a library (a metric, say) may hold times, paths and caches. What it was made from is in the code.
        if all(_place(base)[0] == "user" for base in kind.__mro__ if base is not object):
            return {**found, "state": self.plain(getattr(value, "__dict__", {}))}
        if kind.__module__.split(".")[0] in VALUES:
            return {**found, "text": repr(value)}
        return found

    def _code(self, thing: Any) -> Any:
        """Return what identifies the code of a function, class or module: a digest, or the version of its package."""
        where, path, name = _place(thing)
        if where == "standard" or name == OURS:
            return name
        if where == "library":
            return {"module": name, "packages": _versions({name})}
        if path is None:  # typed into an interpreter or made by exec
            code = getattr(thing, "__code__", None)
            return self._instructions(code) if code is not None else Path(name).name
        if path.parent not in self._sources:
            self._sources[path.parent] = code_beside(path)
        digest, packages = self._sources[path.parent]
        # The version of lm-eval, which a protocol states, stands for what its core imports.
        of_core = name == "lm_eval" and not str(getattr(thing, "__module__", "")).startswith("lm_eval.tasks")
        return {"file": path.name, "digest": digest, "packages": {} if of_core else packages}


def code_beside(script: Path) -> tuple[str, dict[str, str]]:
    """Return a digest of the Python files in the folder of a script, and the versions of the packages they import.

    The digest also covers imported modules that are neither in the folder nor of an installed package.
    """
    digest, found = hashlib.blake2b(digest_size=8), set()
    known = {OURS}
    pending = [(path.name, path) for path in sorted(script.parent.glob("*.py"))]
    inside = {path.stem for _, path in pending}
    while pending:
        name, path = pending.pop(0)
        text = path.read_bytes()
        digest.update(name.encode() + b"\0" + text + b"\0")
        for imported in sorted(_imports(text) - known - inside):
            known.add(imported)
            if imported in _distributions():
                found.add(imported)
            else:
                pending += _local_files(imported)
    return digest.hexdigest(), _versions(found)


def _local_files(module: str) -> list[tuple[str, Path]]:
    """Return the (name, path) of the files of a module or package that is not installed, or nothing if it is."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    origin = Path(spec.origin) if spec is not None and spec.origin not in (None, "built-in", "frozen") else None
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    if module in sys.stdlib_module_names or (origin is not None and _installed(origin)):
        return []
    if folders:
        return [(f"{module}/{path.relative_to(folder).as_posix()}", path)
                for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [(f"{module}.py", origin)] if origin is not None and origin.suffix == ".py" else []


def _place(thing: Any) -> tuple[str, Path | None, str]:
    """Return whether code is "standard", of a "library" or of the "user", its file, and its top-level module.

    lm-eval is the user's here, because its tasks are edited in place.
    """
    name = str(getattr(thing, "__module__", None) or getattr(thing, "__name__", "")).split(".")[0]
    try:
        source = inspect.getsourcefile(thing)
    except (TypeError, OSError):
        source = None
    path = Path(source) if source is not None and Path(source).is_file() else None
    if name in sys.stdlib_module_names and name != "__main__":
        return "standard", path, name
    if path is None or name == "lm_eval" or not _installed(path):
        return "user", path, name
    return "library", path, name


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value
        return None


def _installed(path: Path) -> bool:
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return any(path.resolve().is_relative_to(place) for place in places)


@functools.lru_cache(1024)
def _imports(text: bytes) -> frozenset[str]:
    """Return the top-level modules that a script imports, without those of Python itself."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return frozenset()  # a file that nothing can import
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.append(node.module)
    return frozenset(name.split(".")[0] for name in names) - sys.stdlib_module_names


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _versions(modules: AbstractSet[str]) -> dict[str, str]:
    names = {name for module in modules for name in _distributions().get(module, [])}
    return {name: _version(name) for name in sorted(names)}


@functools.cache
def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))
