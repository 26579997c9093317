"""Checks of plain values that hold for every setting: finite numbers of 64 bits, text that can be stored."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from harness.errors import SettingError, wrong

DEPTH = 30  # levels of lists and groups; no setting has more than six
# The names of tasks and of metrics become columns, labels of figures and lines of reports.
_NAME = re.compile(r"\w[\w .,:/@+-]{0,99}")
NAME_RULE = "use letters, digits, spaces and . , : / @ + - _ in a name, with a letter, a digit or _ first, at most 100"
# Control characters but tab and line ends, and halves of surrogate pairs, which are bytes that are not UTF-8.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_LONGEST_PATH, _LONGEST_NAME = 3800, 240  # Linux has 4096 and 255; files of a run have names of their own below


def refuse_unusable(value: Any, key: str = "", depth: int = 0) -> None:
    """Raise SettingError for the first value, at any depth of mappings and lists, that no setting can have."""
    if depth > DEPTH:
        raise SettingError(key, "is nested too deeply; write a single value or a list of values")
    if isinstance(value, Mapping):
        for name, one in value.items():
            below = f"{key}.{name}" if key else str(name)
            if _NO_TEXT.search(str(name)):
                raise SettingError(key, f"{str(name)!r} is not a name of a setting; it has characters that are no text")
            refuse_unusable(one, below, depth + 1)
    elif isinstance(value, (list, tuple)):
        for one in value:
            refuse_unusable(one, key, depth + 1)
    elif isinstance(value, str) and _NO_TEXT.search(value):
        raise wrong(key, value, "it must be text in UTF-8 without NUL and other control characters")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SettingError(key, f"a number of {value.bit_length()} bits is wrong; it must fit into 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise wrong(key, value, "it must be a finite number")


def is_name(text: str) -> bool:
    """Return whether a text may be the name of a task or of a metric; NAME_RULE says which texts may."""
    return _NAME.fullmatch(text) is not None


def refuse_lines(key: str, text: str | None) -> None:
    """Raise SettingError for a value that would become several lines, or that has control characters."""
    if text is not None and not text.replace("\t", " ").isprintable():
        raise wrong(key, text, "it must be one line of printable characters")


def refuse_long_path(key: str, path: str | None) -> None:
    """Raise SettingError for a path that the file system cannot hold, also with the names of files behind it."""
    if path is None:
        return
    refuse_lines(key, path)
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        raise wrong(key, path, f"the path is too long; use at most {_LONGEST_NAME} bytes between two slashes and"
                               f" {_LONGEST_PATH} in all")
