"""The extension of griffe in mkdocs.yml: docstrings, as they are written here, become Markdown.

Examples (`>>>`) become blocks of code, and lines such as "name: the name of the model" become items of a list.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)
ITEM = re.compile(r"(?:^[a-z_]+(?:, [a-z_]+)*: .*\n?(?: +.*\n?)*)+", re.MULTILINE)


class OfOurDocstrings(Extension):
    """Rewrites every docstring when its object is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown."""
    text = EXAMPLE.sub(lambda found: f"\n```pycon\n{found.group().rstrip()}\n```\n", text)
    return ITEM.sub(lambda found: "\n" + re.sub(r"^([a-z_, ]+): ", r"- `\1`: ", found.group(), flags=re.MULTILINE)
                    + "\n", text)
