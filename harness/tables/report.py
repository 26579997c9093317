"""A study's tables as text, Markdown, CSV and figures. Reads parquet only."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.tables.reader import corrupt_parts, read_metrics
from harness.tables.summary import Measured, is_baseline, measured, ranked, region_order, target_order

BEST = 5  # cells shown at each end
WIDE = 72  # columns of a terminal from which the adjusted p-values have room
TERMINAL_ROWS = 24  # a study up to this size is printed whole
MARKDOWN_ROWS, MARKDOWN_COLUMNS = 120, 24
MAX_FIGURES = 8
LARGE, FIGURES_OF_LARGE = 50_000, 4  # rows from which a report takes its time, and the figures that it may draw then
CSV_COLUMNS = (
    "cell_id", "task", "metric", "status", "target", "target_kind", "block", "layer_type", "region", "region_kind",
    "fraction_start", "fraction_stop", "value", "stderr", "n", "baseline", "delta", "delta_stderr", "p_value",
    "q_value", "ci_low", "ci_high", "n_available", "precision", "higher_is_better", "n_removed", "energy_removed",
    "realised_removal", "seconds",
)  # fmt: skip


def report(
    folder: str | os.PathLike, write: Callable[[str], object] | None = None, figures: bool = True
) -> Path | None:
    """Print the summary of a study and write <folder>/report/: report.md, metrics.csv and PNG figures.

    write: where the terminal text goes, by default print. Returns the path of report.md; None when no cell has rows yet
    (nothing is written then). Partial studies and studies of failures only are reported as they are.
    Raises SchemaVersionError.
    """
    folder = Path(folder)
    write = write or (lambda text: print(text, file=sys.stdout))
    metrics = read_metrics(folder)
    if metrics.empty:
        write(f"{folder}: no cell has been measured yet")
        return None
    found = measured(metrics)
    problems = _problems(folder, metrics)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    for old in out.glob("*.png"):
        old.unlink()
    _write_csv(metrics, found, out / "metrics.csv")
    most = MAX_FIGURES if len(metrics) < LARGE else FIGURES_OF_LARGE
    drawn, left_out = _draw(found, out, most) if figures else ({}, [])
    text = _markdown(metrics, found, problems, drawn, left_out)
    temporary = out / ".report.md.tmp"
    temporary.write_text(text)
    os.replace(temporary, out / "report.md")
    write(terminal_summary(metrics, problems, found=found))
    write(f"\n{out / 'report.md'}, metrics.csv and {count(sum(map(len, drawn.values())), 'figure')}")
    return out / "report.md"


# ---------------------------------------------------------------- text


def terminal_summary(
    metrics, problems: Sequence[str] = (), width: int | None = None, found: Sequence[Measured] | None = None
) -> str:
    """The summary as plain text, at most `width` columns wide (the terminal's): primary metrics only.

    found: `measured` of the metrics, where it is known already.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    lines = [_headline(metrics)]
    for one in measured(metrics) if found is None else found:
        if not one.primary:
            continue
        lines += ["", f"{one.task}: {one.metric} ({_better(one)})"]
        if one.baseline is not None:
            lines.append(f"  baseline {plus_minus(one.baseline['value'], one.baseline['stderr'])}")
        if one.control is not None:
            lines.append(f"  control: {_control(one)}")
        if len(one.cells) == 0:
            continue
        if len(one.cells) <= TERMINAL_ROWS:
            lines += _text_table(_in_order(one.cells), width)
        else:
            order = ranked(one)
            n = min(BEST, len(order) // 2)
            lines += [f"  best {n} of {len(order)}:", *_text_table(order.head(n), width)]
            lines += [f"  worst {n}:", *_text_table(order.tail(n)[::-1], width)]
    if problems:
        lines += ["", *(line[: max(width, 40)] for line in problems)]
    return "\n".join(lines)


def plus_minus(value, stderr) -> str:
    """`value ± stderr` with two significant digits of the error; four digits of the value when it has none."""
    if _missing(value):
        return "-"
    if _missing(stderr) or stderr <= 0 or abs(value) >= 1e7 or stderr < 1e-9:
        return _number(value)
    decimals = _decimals(stderr)
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def is_adaptive(rows) -> bool:
    return bool((rows["precision"] == "adaptive").any())


def _used(row) -> str:
    return "-" if _missing(row.n) else f"{int(row.n)}/{int(row.n_available)}"


def count(n: int, thing: str) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def p_text(p) -> str:
    if _missing(p):
        return "-"
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _delta_text(delta, stderr) -> str:
    text = plus_minus(delta, stderr)
    return text if text.startswith("-") else "+" + text


def _decimals(stderr: float) -> int:
    # the exponent after rounding to two digits: 0.0996 is 0.10, not 0.100
    return min(9, max(0, 1 - int(f"{stderr:.1e}".split("e")[1])))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _text_table(cells, width: int) -> list[str]:
    adaptive, wide = is_adaptive(cells), width >= WIDE
    head = ("target", "region", "value", "delta", "p", *(("q",) if wide else ()), *(("n",) if adaptive else ()))
    body = [
        (
            row.target,
            row.region,
            plus_minus(row.value, row.stderr),
            _delta_text(row.delta, row.delta_stderr),
            p_text(row.p_value),
            *((p_text(row.q_value),) if wide else ()),
            *((_used(row),) if adaptive else ()),
        )
        for row in cells.itertuples()
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    # Labels give way before numbers do, the longer one first.
    while sum(widths) + 2 * len(head) > width and max(widths[:2]) > 8:
        widths[widths.index(max(widths[:2]))] -= 1
    lines = []
    for row in [head, *body]:
        labels = [_shorten(row[i], widths[i]).ljust(widths[i]) for i in (0, 1)]
        lines.append("  " + "  ".join([*labels, *(row[i].rjust(widths[i]) for i in range(2, len(head)))]))
    return lines


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    # both ends matter: "0.q_proj" and "11.q_proj", "seed 0" and "seed 1"
    left = (width - 1) // 2
    return text[:left] + "…" + text[len(text) - (width - 1 - left) :]


# ---------------------------------------------------------------- Markdown and CSV


def _markdown(metrics, found: list[Measured], problems, drawn, left_out) -> str:
    lines = [f"# {_headline(metrics)}", "", _origin(metrics), ""]
    lines += [f"> {line}" for line in problems] + ([""] if problems else [])
    lines += [
        "`±` is the standard error; that of a delta is paired over the same examples. "
        "p is two-sided and of one cell alone; q is p adjusted for the number of ablations of that task and metric "
        "(Benjamini-Hochberg): of the cells with q below 0.05, about one in twenty or fewer moved by chance. "
        "All rows, other metrics included, are in [metrics.csv](metrics.csv) and in `../metrics/`.",
        "",
    ]
    if is_adaptive(metrics):
        lines += [
            "Adaptive precision: `n` of the examples were used, until the delta was decided; metrics.csv holds the "
            "interval (`ci_low`, `ci_high`) of the delta over all of them. These p hold whenever one stops.",
            "",
        ]
    for one in found:
        figures = drawn.get((one.task, one.metric), [])
        if not one.primary and not figures:
            continue
        lines += [f"## {one.task}: {one.metric} ({_better(one)})", ""]
        if one.baseline is not None:
            baseline = plus_minus(one.baseline["value"], one.baseline["stderr"])
            n = "" if _missing(one.baseline["n"]) else f" over {int(one.baseline['n'])} examples"
            lines += [f"Baseline: **{baseline}**{n}.", ""]
        if one.control is not None:
            lines += [f"Control: {_control(one)}.", ""]
        if len(one.cells):
            if one.primary:
                order = ranked(one)
                n = min(BEST, len(order))
                lines += [f"Best {n} of {len(order)} ablations:", "", *_markdown_cells(order.head(n)), ""]
                lines += [f"Worst {n}:", "", *_markdown_cells(order.tail(n)[::-1]), ""]
            lines += _pivot(one)
        for name, caption in figures:
            lines += [f"![{caption}]({name})", ""]
    if left_out:
        n = sum(map(len, drawn.values()))
        lines += [f"Only {count(n, 'figure')} drawn; not drawn: {', '.join(left_out)}.", ""]
    return "\n".join(lines)


def _markdown_cells(cells) -> list[str]:
    adaptive = is_adaptive(cells)
    lines = ["| target | region | value | delta | p | q |", "|---|---|--:|--:|--:|--:|"]
    if adaptive:
        lines = [lines[0] + " n |", lines[1] + "--:|"]
    for row in cells.itertuples():
        value = plus_minus(row.value, row.stderr)
        delta = _delta_text(row.delta, row.delta_stderr)
        chances = f"{p_text(row.p_value)} | {p_text(row.q_value)}"
        line = f"| {_cell(row.target)} | {_cell(row.region)} | {value} | {delta} | {chances} |"
        lines.append(f"{line} {_used(row)} |" if adaptive else line)
    return lines


def _pivot(one: Measured) -> list[str]:
    targets, regions = target_order(one.cells), region_order(one.cells)
    if len(targets) > MARKDOWN_ROWS or len(regions) > MARKDOWN_COLUMNS:
        return [f"{len(targets)} targets x {len(regions)} regions: too many for a table here, see metrics.csv.", ""]
    texts = {
        (row.target, row.region): plus_minus(row.value, row.stderr)
        for row in one.cells[["target", "region", "value", "stderr"]].itertuples()
    }
    lines = ["| target | " + " | ".join(map(_cell, regions)) + " |", "|---" + "|--:" * len(regions) + "|"]
    for target in targets:
        lines.append(f"| {_cell(target)} | " + " | ".join(texts.get((target, r), "") for r in regions) + " |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _write_csv(metrics, found: list[Measured], path: Path) -> None:
    import pandas
    import pyarrow as pa
    import pyarrow.csv

    q_values = [one.cells["q_value"] for one in found]
    metrics = metrics.assign(q_value=pandas.concat(q_values) if q_values else math.nan)
    table = pa.Table.from_pandas(metrics[list(CSV_COLUMNS)], preserve_index=False)
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.csv.write_csv(table, temporary)
    os.replace(temporary, path)


# ---------------------------------------------------------------- shared


def _control(one: Measured) -> str:
    delta, n = one.control["delta"], int(one.control["n_matrices"])
    moved = "unknown" if _missing(delta) else f"{delta:.3g}"
    return f"{n} {'matrix' if n == 1 else 'matrices'} decomposed, nothing removed, moves it by {moved}"


def _headline(metrics) -> str:
    cells = metrics.drop_duplicates("cell_id")
    failed = metrics.loc[metrics["status"] == "error", "cell_id"].nunique()
    models = ", ".join(sorted(set(cells["model"])))
    baselines = int(is_baseline(cells).sum())
    return (
        f"Study {', '.join(sorted(set(cells['study_id'])))} of {models}: "
        f"{count(len(cells) - baselines, 'ablation')}, {count(baselines, 'baseline')}, {failed} failed"
    )


def _origin(metrics) -> str:
    names = {"dtype": "", "device": "", "edit": "edit ", "harness_version": "harness ", "git_commit": "commit ",
             "torch_version": "torch ", "transformers_version": "transformers ", "hostname": "on "}  # fmt: skip
    parts = []
    for column, prefix in names.items():
        values = sorted(set(metrics[column].dropna()))
        if values:
            parts.append(prefix + ", ".join(values[:4]) + (", ..." if len(values) > 4 else ""))
    return "; ".join(parts) + "." if parts else ""


def _problems(folder: Path, metrics) -> list[str]:
    lines = []
    errors = metrics[metrics["status"] == "error"]
    if len(errors):
        text = (errors["error"].iloc[0] or "").strip()
        n = errors["cell_id"].nunique()
        lines.append(f"{count(n, 'cell')} failed; the first: {text.splitlines()[-1] if text else 'unknown'}")
    damaged = corrupt_parts(folder)
    if damaged:
        lines.append(
            f"{count(len(damaged), 'damaged file')}, such as {damaged[0].path}: run the study again to replace them"
        )
    return lines


def _draw(
    found: list[Measured], out: Path, most: int
) -> tuple[dict[tuple[str, str], list[tuple[str, str]]], list[str]]:
    """At most `most` figures by (task, metric): primary metrics first, then the others in turn while there is room."""
    from harness.tables.plots import has_heat_map, heat_map_figure, region_figure

    drawn: dict[tuple[str, str], list[tuple[str, str]]] = {}
    left_out: list[str] = []
    n = 0
    # Second metrics of every task before third ones, so that no task takes all the room.
    rank_in_task = {id(one): i for one, i in zip(found, _rank_in_task(found))}
    for one in sorted(found, key=lambda one: rank_in_task[id(one)]):
        if not len(one.cells):
            continue
        heat = has_heat_map(one)
        if n + 1 + heat > most:
            left_out.append(f"{one.task} {one.metric}")
            continue
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{one.task}-{one.metric}")
        region_figure(one, out / f"{stem}-regions.png")
        figures = [(f"{stem}-regions.png", f"{one.metric} of {one.task} against the removed region")]
        if heat:
            shown = heat_map_figure(one, out / f"{stem}-blocks.png")
            figures.append(
                (f"{stem}-blocks.png", f"Change of {one.metric} by block and layer type: {', '.join(shown)}")
            )
        drawn[one.task, one.metric] = figures
        n += len(figures)
    return drawn, left_out


def _rank_in_task(found: list[Measured]) -> list[int]:
    seen: dict[str, int] = {}
    ranks = []
    for one in found:
        ranks.append(seen.get(one.task, 0))
        seen[one.task] = ranks[-1] + 1
    return ranks


def _in_order(cells):
    targets = {label: i for i, label in enumerate(target_order(cells))}
    regions = {label: i for i, label in enumerate(region_order(cells))}
    return cells.assign(_t=cells["target"].map(targets), _r=cells["region"].map(regions)).sort_values(["_t", "_r"])


def _better(one: Measured) -> str:
    return f"{'higher' if one.higher_is_better else 'lower'} is better"


def _missing(value) -> bool:
    return value is None or value != value
