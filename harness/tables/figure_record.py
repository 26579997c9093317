"""Which figures of an earlier report are still right: drawing takes longer than all the rest of a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.files import write_json
from harness.tables import drawing, labels, text

RECORD = "figures.json"
Figures = Sequence[tuple[str, str]]  # the file name and the caption of each


class FigureRecord:
    """The figures in a folder, by the digest of what they show.

    While it is open there is no record on the disk, so that no file is taken for a complete one if drawing is
    interrupted.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._known, self._record = out, _read(out / RECORD), {}  # type: Path, dict, dict[str, Figures]
        (out / RECORD).unlink(missing_ok=True)

    def kept(self, digest: str) -> Figures:
        """Return the figures of an earlier report with this digest, which are kept; none if there are none."""
        figures: Figures = self._known.get(digest, ())
        if not figures or not all((self._out / name).is_file() for name, _ in figures):
            return ()
        return self.add(digest, figures)

    def add(self, digest: str, figures: Figures) -> Figures:
        """Keep figures that were drawn, and return them."""
        self._record[digest] = figures
        return figures

    def close(self) -> None:
        """Remove the figures that were neither kept nor drawn, and write the record."""
        drawing.remove_figures(self._out, {name for figures in self._record.values() for name, _ in figures})
        write_json(self._out / RECORD, {digest: [list(figure) for figure in figures]
                                        for digest, figures in self._record.items()})


def clear(out: Path) -> None:
    """Remove the figures and the record of an earlier report."""
    drawing.remove_figures(out)
    (out / RECORD).unlink(missing_ok=True)


def digest_of(shown: Iterable[Any], code: Iterable[Path]) -> str:
    """Return a digest of everything that figures show, and of the code that draws them.

    shown: tables of pandas, and values whose repr says all. code: the files that draw, but those that all share.
    """
    import pandas

    whole = hashlib.sha256(repr(drawing.figure_settings()).encode())
    for one in shown:
        if isinstance(one, pandas.DataFrame):
            whole.update(repr(list(one.columns)).encode())
            whole.update(pandas.util.hash_pandas_object(one, index=False).to_numpy().tobytes())
        else:
            whole.update(repr(one).encode())
    for source in (*code, *(Path(str(module.__file__)) for module in (drawing, labels, text))):
        whole.update(source.read_bytes())
    whole.update(version("matplotlib").encode())
    return whole.hexdigest()


def _read(path: Path) -> dict[str, Figures]:
    """Return the record of an earlier report; nothing if there is none, or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(digest): [(str(name), str(caption)) for name, caption in figures]
                for digest, figures in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
