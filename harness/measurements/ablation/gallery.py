"""The figures of a report: which metrics are drawn, and which files of an earlier report are still right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.measurements.ablation import effects
from harness.measurements.ablation.heat_map import heat_map_figure
from harness.measurements.ablation.kept_figure import kept_cells, kept_figure
from harness.measurements.ablation.region_figure import region_figure
from harness.measurements.ablation.summary import MeasuredMetric, ranks_in_task
from harness.measurements.ablation.titles import measured_on
from harness.tables import figure_record, labels, text

MAX_FIGURES = 8
LARGE, FIGURES_OF_LARGE = 4_000, 4  # from so many rows on, drawing is slow, and fewer figures are drawn
VERY_LARGE, FIGURES_OF_VERY_LARGE = 50_000, 2
# Papers count deciles from either end.
FIRST_DECILE = "decile 1 is the largest tenth; arXiv 2410.17770 counts from the smallest"
# All that figures read of a cell. They get no other column, so that what changes a figure changes its digest.
COLUMNS = ["target", "target_kind", "block", "layer_type", "region", "region_by", "region_kind", "fraction_start",
           "fraction_stop", "region_keep", "q_value", "model", "gguf_file", *effects.COLUMNS]


@dataclass(frozen=True)
class Gallery:
    """The figures of a report.

    drawn: (task, metric) -> file name and caption of each figure. left_out: the metrics without a figure.
    """

    drawn: dict[tuple[str, str], list[tuple[str, str]]]
    left_out: list[str]

    @property
    def n_figures(self) -> int:
        """The number of figures."""
        return sum(map(len, self.drawn.values()))


def draw(found: Sequence[MeasuredMetric], n_rows: int, out: Path) -> Gallery:
    """Draw the primary metric of each task as PNG files in a folder, and return them.

    Figures of an earlier report are kept if they show the same rows, drawn by the same code; drawing takes longer than
    all the rest of a report. Those that are not of this report are removed. n_rows: the number of rows of the study.
    """
    most = MAX_FIGURES if n_rows < LARGE else FIGURES_OF_LARGE if n_rows < VERY_LARGE else FIGURES_OF_VERY_LARGE
    with_cells = [one for one in found if len(one.cells)]
    # The first metrics of all tasks come before their second metrics, so that no task takes all the figures.
    ranks = {id(one): rank for one, rank in zip(found, ranks_in_task(list(found)))}
    record = figure_record.FigureRecord(out)
    gallery = Gallery({}, [])
    for one in sorted(with_cells, key=lambda one: ranks[id(one)]):
        heat, kept = _has_heat_map(one), len(kept_cells(one)) > 0
        if not one.primary or gallery.n_figures + 1 + heat + kept > most:
            gallery.left_out.append(f"{one.task} {one.metric}")
            continue
        digest = _digest(one)
        figures = record.kept(digest) or record.add(digest, _drawn(one, out, heat))
        gallery.drawn[one.task, one.metric] = list(figures)
    record.close()
    return gallery


def clear(out: Path) -> Gallery:
    """Remove the figures of an earlier report, and return a gallery without figures."""
    figure_record.clear(out)
    return Gallery({}, [])


def _drawn(one: MeasuredMetric, out: Path, heat: bool) -> list[tuple[str, str]]:
    of_columns = replace(one, cells=one.cells[COLUMNS])
    stem = text.file_stem(one.task, one.metric)
    tenths = f" ({FIRST_DECILE})" if (one.cells["region_by"] == "decile").any() else ""
    region_figure(of_columns, out / f"{stem}-regions.png")
    about = f"{measured_on(one)}{tenths}"
    figures = [(f"{stem}-regions.png", f"{one.title} against the removed region; bars are 95 % intervals"
                f" of the change, paired over the same examples; {about}")]
    if heat:
        shown = heat_map_figure(of_columns, out / f"{stem}-blocks.png")
        figures.append(
            (f"{stem}-blocks.png", f"Change of {one.metric} by block and layer type; stars mark q < {effects.LEVEL}:"
                                   f" {_words(shown)}; {about}")
        )
    if len(kept_cells(of_columns)):
        kept_figure(of_columns, out / f"{stem}-kept.png")
        figures.append(
            (f"{stem}-kept.png", f"{one.title} with only the largest, and with only the smallest singular values (as"
                                 f" Figure 5 of LASER, arXiv 2312.13558); {about}")
        )
    return figures


def _words(regions: Sequence[str]) -> str:
    return ", ".join(map(labels.region_words, regions))


def _has_heat_map(one: MeasuredMetric) -> bool:
    """Return whether the targets are single matrices and there are deltas, as a heat map needs."""
    cells = one.cells[one.cells["delta"].notna()]
    return len(cells) > 0 and bool((cells["target_kind"] == "matrix").all())


def _digest(one: MeasuredMetric) -> str:
    """Return a digest of everything that the figures of a metric show, and of the code that draws them."""
    value = None if one.baseline is None else [str(one.baseline[name]) for name in ("value", "n", "protocol")]
    here = Path(__file__)
    names = ("region_figure", "heat_map", "kept_figure", "series", "titles", "effects", "summary")
    return figure_record.digest_of(
        [(one.task, one.metric, one.higher_is_better, value, one.noise_floor), one.cells[COLUMNS]],
        [here, *(here.with_name(f"{name}.py") for name in names)],
    )
