"""The exceptions for wrong input. The command line prints their message as a single line and exits with status 2."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in harness/__init__.py
if TYPE_CHECKING:
    from typing import Any

# Characters of a wrong value in a message, and of a whole line.
LONGEST_VALUE, LONGEST_LINE = 200, 4000


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
    shown = repr(value)
    shown = shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}..."
    return SettingError(key, f"{shown} is wrong; {right}")


def one_line(error: BaseException, longest: int = 300) -> str:
    """Return the message of a foreign exception as one line of at most `longest` characters, never an empty one."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def printable(text: str) -> str:
    """Return a text that is one line and cannot command a terminal: every other character as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def complain(error: Exception) -> None:
    """Print an error to stderr as the one line that a user sees."""
    line = f"harness: {printable(' '.join(str(error).split()))[:LONGEST_LINE]}"
    # A name may hold bytes that are not UTF-8, which no stream of text takes.
    try:
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads it any more
