"""What the figures of all reports have in common: colours, markers, and how a figure is made and saved.

The colours are those of Okabe and Ito, which people with any colour vision can distinguish. Series also differ by their
markers.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DPI = 120
LOG_SPAN = 30  # colours are logarithmic if the largest delta is more than so many times the median
NO_FIGURES = "no figures: they need matplotlib, pip install 'spectral-ablation-harness[plots]'"


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def colour_map(name: str) -> Colormap:
    """Return the colour map of matplotlib with this name."""
    from matplotlib import colormaps

    return colormaps[name]


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure  # pyplot would have global state and might need a display

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file. Missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # By itself savefig would lay the figure out twice, which takes most of the time for a figure of many panels.
    figure.set_dpi(DPI)
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=DPI, format="png", pil_kwargs={"compress_level": 3})
