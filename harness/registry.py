"""Registries of the names that settings may choose: those of the harness, and those of other packages' entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from harness.errors import InputError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


def nearest(name: str, known: Iterator[str] | list[str]) -> str:
    """Return "did you mean 'x'? " if a known name is similar to this one, else an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def added_names(group: str) -> list[str]:
    """Return the names that other packages add to a group, in alphabetical order, without loading anything."""
    from importlib.metadata import entry_points

    return sorted({point.name for point in entry_points(group=group)})


class Registry(Generic[T]):
    """A mapping from names to objects. An object is imported when it is asked for, and not before.

    group: the group of entry points by which other packages add names, such as "harness.tasks".
    what: what a name stands for, for messages, such as "a region rule".
    builtin: name -> the harness's own object, or its place as "module" or "module:attribute". Lists show the names in
        this order.
    """

    def __init__(self, group: str, what: str, builtin: Mapping[str, T | str]) -> None:
        self.group, self.what, self._builtin = group, what, dict(builtin)
        self._loaded: dict[str, T] = {}

    @cached_property
    def _added(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points

        added: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = "the harness" if point.name in self._builtin else _package(added.get(point.name))
            if other is not None and _package(point) != other:
                raise InputError(
                    f"{_package(point)}: its entry point {point.name!r} in {self.group} is the name of {self.what} of"
                    f" {other} already; one of the two must be renamed or uninstalled"
                )
            added[point.name] = point
        return added

    def names(self) -> list[str]:
        """Return all names: those of the harness, then those of other packages in alphabetical order.

        Raises InputError if two packages add the same name, or one adds a name of the harness.
        """
        return [*self._builtin, *sorted(self._added)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._added

    def __getitem__(self, name: str) -> T:
        """Return the object of a name. Raises InputError if the name is unknown or its package cannot be loaded."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        if name in self._builtin:
            own = self._builtin[name]
            if not isinstance(own, str):
                return own
            module, _, attribute = own.partition(":")
            return getattr(import_module(module), attribute) if attribute else import_module(module)
        if name not in self._added:
            raise InputError(f"{name!r} is not {self.what}; {nearest(name, self.names())}use one of "
                             f"{', '.join(self.names())}")
        try:
            return self._added[name].load()
        except Exception as error:  # the code of another package may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            package = _package(self._added[name])
            raise InputError(f"{package}: {name!r}, {self.what}, cannot be loaded ({reason})") from error

    def items(self) -> Iterator[tuple[str, T]]:
        """Return every name with its object, all of which are loaded."""
        return ((name, self[name]) for name in self.names())


def _package(point: EntryPoint | None) -> str | None:
    if point is None:
        return None
    return point.dist.name if point.dist is not None else point.value
