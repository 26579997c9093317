"""Format numbers and tables as text, and escape names for the medium: terminal, Markdown, CSV, figures, file names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import printable

if TYPE_CHECKING:
    import pandas

LONGEST_STEM = 200  # of a file name, which may have 255 bytes with its ending
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how formulas of spreadsheets begin

# The order of execution within a block. Other layer types follow in alphabetical order.
LAYER_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_key(layer_type: str) -> tuple[int, str]:
    """Return a key that sorts layer types in the order of their execution."""
    return (LAYER_ORDER.index(layer_type) if layer_type in LAYER_ORDER else len(LAYER_ORDER), layer_type)


def is_missing(value: Any) -> bool:
    """Return whether a value of a table is null, which is None or NaN."""
    return value is None or value != value


def plus_minus(value: float | None, stderr: float | None) -> str:
    """Return "value ± stderr" with two significant digits of the error; without an error four digits of the value."""
    if value is None or is_missing(value):
        return "-"
    if stderr is None or is_missing(stderr) or stderr <= 0 or abs(value) >= 1e7 or stderr < 1e-9:
        return f"{value:.4g}"
    # the exponent is taken after rounding to two digits, so that 0.0996 becomes 0.10 and not 0.100
    decimals = min(9, max(0, 1 - int(f"{stderr:.1e}".split("e")[1])))
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def signed(delta: float | None, stderr: float | None) -> str:
    """Return the text of `plus_minus` with a sign."""
    text = plus_minus(delta, stderr)
    return text if text.startswith("-") else "+" + text


def p_text(p: float | None) -> str:
    """Return a p-value as text."""
    if p is None or is_missing(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def count(n: int, thing: str) -> str:
    """Return a number of things as text, such as "1 figure" or "2 figures"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def shorten(text: str, width: int) -> str:
    """Shorten a text to `width` characters, from its middle.

    Both ends are kept because both may distinguish labels ("0.q_proj" and "11.q_proj", "seed 0").
    """
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return text[:left] + "…" + text[len(text) - (width - 1 - left) :]


_MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", ">": "&gt;", "&": "&amp;", "[": "\\[", "]": "\\]",
                           "`": "\\`", "*": "\\*"})  # fmt: skip


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, also in a table: no tag, no link, no emphasis, no line break."""
    return printable(text).translate(_MARKDOWN)


def figure_text(text: str) -> str:
    """Return a text that matplotlib shows as it is, and not as a formula."""
    return printable(text).replace("$", "\\$")


def safe_for_csv(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return rows in which no text is a formula to a spreadsheet: "=1+1" becomes "'=1+1"."""
    texts = rows.select_dtypes(include=["object", "string"])
    for name in texts:
        formulas = [one for one in texts[name].unique() if isinstance(one, str) and one.startswith(_FORMULA)]
        if formulas:
            rows = rows.assign(**{str(name): texts[name].replace({one: "'" + one for one in formulas})})
    return rows


def file_stem(*names: str) -> str:
    """Return the beginning of a file name for one or more names. Different names have different stems.

    Letters, digits, "_", "." and "-" stay; every other byte becomes "~" and two hexadecimal digits, as does a "-" in
    all names but the last, because "-" joins the names. A stem too long for a file name is cut and ends with a hash.
    """
    *first, last = names
    stem = "-".join([*(_escaped(name, b"_.") for name in first), _escaped(last, b"_.-")])
    if len(stem) <= LONGEST_STEM:
        return stem
    return f"{stem[: LONGEST_STEM - 25]}~{hashlib.blake2b(stem.encode(), digest_size=12).hexdigest()}"


def _escaped(name: str, kept: bytes) -> str:
    return "".join(chr(b) if chr(b).isascii() and chr(b).isalnum() or b in kept else f"~{b:02x}"
                   for b in name.encode(errors="surrogatepass"))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table, in which numbers have four digits."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(map(markdown_text, names)) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_short(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else markdown_text(str(value))


def markdown_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of texts, of which the first is the head, as the lines of a Markdown table."""
    head, *others = rows
    return ["| " + " | ".join(map(markdown_text, row)) + " |" for row in [head, ["---"] * len(head), *others]]


def aligned(rows: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """Return rows of texts as lines with aligned columns: the first `n_left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{c:<{w}}" if i < n_left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in rows]
