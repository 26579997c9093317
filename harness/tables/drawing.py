"""What the figures of all reports have in common: colours, markers, and how a figure is made and saved.

The colours are those of Okabe and Ito, which people with any colour vision can distinguish. Series also differ by their
markers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import wrong

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DPI = 120
LOG_SPAN = 30  # colours are logarithmic if the largest delta is more than so many times the median
FORMATS = ("png", "pdf", "svg")
WIDTHS = {"screen": None, "column": 3.5, "page": 7.2}  # inches: one column of a journal, and both
_FONT = {"screen": 10.0, "column": 6.5, "page": 8.0}  # points
NO_FIGURES = "no figures: they need matplotlib, pip install 'spectral-ablation-harness[plots]'"
NOT_WANTED = "no figures, because of report.figures=none; harness report <folder> draws them"


@dataclass(frozen=True)
class FigureSettings:
    """How figures are saved. format: pdf and svg are written beside the PNG files, which the pages of a report show.

    width: `screen`, as wide as the content needs; `column`, 3.5 inches; or `page`, 7.2 inches.
    """

    format: str = "png"
    width: str = "screen"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise wrong("figures.format", self.format, f"one of {', '.join(FORMATS)} is right")
        if self.width not in WIDTHS:
            raise wrong("figures.width", self.width, f"one of {', '.join(WIDTHS)} is right")


_SETTINGS: ContextVar[FigureSettings | None] = ContextVar("figures", default=None)
_WANTED: ContextVar[bool] = ContextVar("figures_wanted", default=True)


def figure_settings() -> FigureSettings:
    """Return the settings with which figures are drawn now."""
    return _SETTINGS.get() or FigureSettings()


@contextmanager
def drawn_as(settings: FigureSettings) -> Iterator[None]:
    """Draw the figures of the block with these settings."""
    before = _SETTINGS.set(settings)
    try:
        if can_draw() and settings.width != "screen":
            from matplotlib import rc_context

            with rc_context({"font.size": _FONT[settings.width], "axes.linewidth": 0.6, "legend.handlelength": 1.4}):
                yield
        else:
            yield
    finally:
        _SETTINGS.reset(before)


@contextmanager
def reports_with(figures: str) -> Iterator[None]:
    """Let the reports of the block have "all" of their figures, or "none"."""
    before = _WANTED.set(figures != "none")
    try:
        yield
    finally:
        _WANTED.reset(before)


def can_draw() -> bool:
    """Return whether reports are to have figures, and matplotlib is installed."""
    return _WANTED.get() and find_spec("matplotlib") is not None


def why_no_figures() -> str:
    """Return the sentence of a report that has no figures."""
    return NO_FIGURES if _WANTED.get() else NOT_WANTED


def colour_map(name: str) -> Colormap:
    """Return the colour map of matplotlib with this name."""
    from matplotlib import colormaps

    return colormaps[name]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, which the settings of figures may make as wide as a column."""
    from matplotlib.figure import Figure  # pyplot would have global state and might need a display

    narrow = WIDTHS[figure_settings().width]
    if narrow is not None:
        width, height = narrow, height * min(1.0, max(0.55, narrow / width))
    return Figure(figsize=(width, height), layout="constrained")


def figure_scale() -> float:
    """Return the size of writing and markers in comparison with figures as wide as they need."""
    return _FONT[figure_settings().width] / _FONT["screen"]


def wrapped(figure: Figure, text: str) -> str:
    """Return a text of a title in lines that leave room for a legend at the right of a figure."""
    letters = int(8.5 * figure.get_figwidth() / figure_scale())
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, letters) or [""])


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, and beside it in the format of the settings. Missing folders are created."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    # By itself savefig would lay the figure out twice and draw it twice, which takes most of the time for a figure of
    # many panels.
    figure.set_dpi(DPI)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    FigureCanvasAgg(figure).print_png(path, pil_kwargs={"compress_level": 3, "dpi": (DPI, DPI)})
    for other in FORMATS[1:]:
        if figure_settings().format == other:
            figure.savefig(path.with_suffix(f".{other}"), format=other)
        else:
            path.with_suffix(f".{other}").unlink(missing_ok=True)


def remove_figures(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove the PNG files in a folder but those to keep, and with each its files in other formats."""
    for old in folder.glob("*.png"):
        if old.name not in keep:
            for suffix in FORMATS:
                old.with_suffix(f".{suffix}").unlink(missing_ok=True)
