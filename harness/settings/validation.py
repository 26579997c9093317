"""Make checked settings of plain values with pydantic, and errors of one line that name the key.

Settings are dataclasses of the standard library, so that the folders that declare them do not need pydantic. The type
of each field and its marks (`constraints`) are checked here. Relations between fields are checked by `__post_init__` of
the dataclass, which raises SettingError.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from harness.errors import SettingError, wrong
from harness.registry import Registry, nearest

T = TypeVar("T")

# How pydantic's name of an error begins -> what would be right.
_RIGHT = {
    "int": "it must be a whole number", "float": "it must be a number", "bool": "it must be true or false",
    "string": "it must be text", "list": "it must be a list, for example [{example}]",
    "dict": "it must be a group of keys with values", "dataclass": "it must be a group of keys with values",
}  # fmt: skip


def validated(kind: type[T], values: Any, key: str = "") -> T:
    """Return the settings of a dataclass `kind` from plain values (mappings, lists, numbers, text).

    key: the place of these settings, for messages. An object of the dataclass is returned unchanged. Raises
    SettingError for the first wrong value.
    """
    from pydantic import ValidationError

    try:
        _refuse_truth(kind, values)
        return _adapter(kind).validate_python(values)  # type: ignore[arg-type]  # mypy: no type[T] is Hashable
    except SettingError as error:
        raise error.below(key) from None
    except ValidationError as error:
        raise _explained(error.errors()[0], kind).below(key) from None


def chosen(registry: Registry[Any], by: str, values: Mapping[str, Any]) -> Any:
    """Return the settings of one of several kinds. by: the key whose value is the name of the kind in the registry.

    Raises SettingError for a wrong value, and if the kind is not registered.
    """
    name = values.get(by)
    if not isinstance(name, str) or name not in registry:
        near = nearest(str(name), registry.names())
        raise SettingError(by, f"{name!r} is not {registry.what}; {near}use one of {', '.join(registry.names())}")
    return validated(registry[name], {key: value for key, value in values.items() if key != by})


def plain(settings: Any) -> Any:
    """Return settings as mappings, lists, numbers and text, from which `validated` makes the same settings again."""
    if hasattr(settings, "plain"):
        return settings.plain()
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {key: plain(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value) for value in settings]
    return settings


def keys_of(kind: type) -> list[str]:
    """Return the names of the fields of a dataclass."""
    return [field.name for field in dataclasses.fields(kind)]


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass, with their marks. Reading them takes long."""
    return get_type_hints(kind, include_extras=True)


@functools.cache
def _types_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    _strict_about_keys(kind)
    return TypeAdapter(kind)


def _strict_about_keys(kind: Any) -> None:
    """Make pydantic refuse unknown keys, and accept numbers for text, because a revision may be called 1000."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        kind.__pydantic_config__ = {"extra": "forbid", "coerce_numbers_to_str": True}  # type: ignore[attr-defined]
        for hint in _types_of(kind).values():
            for part in (hint, *get_args(hint)):
                if part is not kind:
                    _strict_about_keys(part)


def _refuse_truth(hint: Any, value: Any, where: str = "") -> None:
    """Raise SettingError for true or false in a wrong place; pydantic would take them for the numbers 1 and 0."""
    parts = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if isinstance(value, bool) and not parts & {bool, Any}:
        raise wrong(where, value, "it must be a number" if parts & {int, float} else "it must not be true or false")
    for part in parts:
        inside = get_args(part)[-1:] if get_origin(part) in (list, dict) else ()
        if dataclasses.is_dataclass(part) and isinstance(part, type) and isinstance(value, Mapping):
            for name, own in _types_of(part).items():
                _refuse_truth(own, value.get(name), f"{where}.{name}" if where else name)
        elif inside and isinstance(value, Mapping):
            for name, one in value.items():
                _refuse_truth(inside[0], one, f"{where}.{name}")
        elif inside and isinstance(value, (list, tuple)):
            for one in value:
                _refuse_truth(inside[0], one, where)


def _explained(error: Any, kind: type) -> SettingError:
    """Return the error of one line for an error of pydantic."""
    place, value = error["loc"], error["input"]
    key = ".".join(str(part) for part in place if not isinstance(part, int))
    reason = (error.get("ctx") or {}).get("error")
    if isinstance(reason, SettingError):
        return reason.below(key)
    if isinstance(reason, ValueError):
        return wrong(key, value, str(reason))
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = keys_of(_kind_at(kind, place[:-1]))
        return SettingError(key, f"unknown key; {nearest(str(place[-1]), known)}known here: {', '.join(known)}")
    if error["type"] in ("missing", "missing_argument"):
        return SettingError(key, "must be set")
    if error["type"] == "literal_error":
        known = _names(_kind_at(kind, place))
        return wrong(key, value, f"{nearest(str(value), known)}use one of {', '.join(known)}")
    right = next((text for name, text in _RIGHT.items() if error["type"].startswith(name)), error["msg"])
    return wrong(key, value, right.format(example=value))


def _kind_at(kind: Any, place: tuple[Any, ...]) -> Any:
    """Return the type at a place within settings of a type, where indices of lists and keys of dicts are skipped."""
    for part in place:
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            kind = _types_of(kind).get(part, kind)
            parts = [one for one in get_args(kind) if one is not type(None)]
            kind = next((one for one in parts if dataclasses.is_dataclass(one)), kind)
    return kind


def _names(hint: Any) -> list[str]:
    """Return the names in a Literal, which may be a part of the type."""
    if get_origin(hint) is Literal:
        return [str(name) for name in get_args(hint)]
    return [name for part in get_args(hint) for name in _names(part)]


def refuse_unread(settings: Any, where: str = "") -> None:
    """Raise the first SettingError for a value that nothing reads, in these settings or in settings within them.

    Settings may have a method `unread()` that yields such errors. They are raised when settings are composed, but not
    when a manifest is read, because a study has the same cells with and without such a value.
    """
    if dataclasses.is_dataclass(settings):
        for error in getattr(settings, "unread", tuple)():
            raise error.below(where)
        for field in dataclasses.fields(settings):
            refuse_unread(getattr(settings, field.name), f"{where}.{field.name}" if where else field.name)

