"""The documents of a text: where each of them begins, if the data say so.

Documents are, in this order:

1. rows with one value in the column that the user names, where they follow each other;
2. articles of WikiText, which begin with a heading such as " = Robert Boulter = ";
3. rows of the data, unless they look like pieces of longer documents, as paragraphs, sentences or lines are: that is if
   they are short, or if a row is more like the row after it than like other rows (`likeness`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

# An article of WikiText; its sections have two equals signs or more.
HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)
SHORTEST = 200  # characters of a document, on average over the rows; a sentence has about 100
# The likeness of neighbours from which rows are pieces: in samples of 100 rows and more, documents have 0.44 to 0.59,
# and paragraphs, sentences and equal pieces of one text 0.62 to 0.87 (experiments/calibration).
ALIKE = 0.6
COMPARED_ROWS, COMPARED_CHARACTERS = 500, 2000  # how many rows, and how much of each, are compared at most
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Documents:
    """begins: int64 [D], the character of the text at which each document begins; empty if none is known.

    called: what documents are, in the plural, for the protocol.
    """

    begins: np.ndarray
    called: str


def documents(
    rows: Sequence[str], separator: str, column: str | None = None, labels: Sequence[Hashable] | None = None
) -> Documents:
    """Return the documents of the text to which `separator` joins rows.

    column, labels: the name of the column that the user names and its value in each row, or None.
    """
    begins = np.cumsum([0, *(len(row) + len(separator) for row in rows[:-1])])
    if column is not None and labels is not None:
        first = [i == 0 or label != labels[i - 1] for i, label in enumerate(labels)]
        return Documents(begins[first], column)
    headings = [match.start() for match in HEADING.finditer(separator.join(rows))]
    if headings:
        return Documents(np.array(headings), "articles")
    if are_pieces(rows):
        return Documents(begins[:0], "rows")
    return Documents(begins[[bool(row.strip()) for row in rows]], "rows")


def are_pieces(rows: Sequence[str]) -> bool:
    """Return whether rows look like pieces of longer documents."""
    written = [row for row in rows if row.strip()]
    if len(written) < 2 or sum(map(len, written)) < SHORTEST * len(written):
        return True
    compared = written[:COMPARED_ROWS]
    # two standard errors: the shares of independent rows are uniform and nearly independent of each other
    return likeness(compared) > max(ALIKE, 0.5 + 2 / np.sqrt(12 * (len(compared) - 1)))


def likeness(rows: Sequence[str]) -> float:
    """Return how much more alike neighbours are than other rows: 1/2 if they are not, 1 at most.

    It is the share of the other rows that are less like a row than the row after it is, a tie counting one half, as a
    mean over the rows. Two rows are alike by the words that both have. A word of d rows counts 1 / (d (d - 1)), so that
    all words count the same over all pairs of rows, and rare words count most between two rows that have them.
    """
    words = [frozenset(WORD.findall(row[:COMPARED_CHARACTERS].lower())) for row in rows]
    frequency = Counter(word for one in words for word in one)
    column = {word: i for i, word in enumerate(word for word, count in frequency.items() if count > 1)}
    if len(rows) < 3 or not column:
        return 0.5
    holds = np.zeros((len(rows), len(column)))
    for i, one in enumerate(words):
        holds[i, [column[word] for word in one if word in column]] = 1
    d = holds.sum(axis=0)
    alike = np.round((holds / (d * (d - 1))) @ holds.T, 12)  # ties are ties, in whatever order words are summed
    neighbour = np.diag(alike, 1)[:, None]
    others = alike[:-1]
    np.fill_diagonal(others, np.nan)
    less, equal = (others < neighbour).sum(axis=1), (others == neighbour).sum(axis=1) - 1
    return float(np.mean((less + equal / 2) / (len(rows) - 2)))
