"""The exceptions for wrong input. The command line prints their message as a single line and exits with status 2."""

from __future__ import annotations

import sys
from typing import Any


class InputError(Exception):
    """What the user asked for cannot be done. The message names the key or the file, and says what would be right."""


class SettingError(InputError, ValueError):
    """One setting is wrong.

    key: its name, relative to the settings that are checked. reason: what is wrong with it, and what would be right.
    It is a ValueError, so that `__post_init__` of settings may raise it; validation then completes the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        self.key, self.reason = key, reason
        super().__init__(f"{key}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.key, self.reason)

    def below(self, where: str) -> SettingError:
        """Return the same error with a key that begins with `where`, the place of the settings that were checked."""
        return SettingError(".".join(part for part in (where, self.key) if part), self.reason)


def wrong(key: str, value: Any, right: str) -> SettingError:
    """Return the error for a wrong value of a setting. right: what would be right, as a sentence."""
    return SettingError(key, f"{value!r} is wrong; {right}")


def printable(text: str) -> str:
    """Return a text that is one line and cannot command a terminal: every other character as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(error: Exception) -> None:
    """Print an error to stderr as the one line that a user sees."""
    print(f"harness: {printable(' '.join(str(error).split()))}", file=sys.stderr)
