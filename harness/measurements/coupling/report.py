"""The report of coupling as text, CSV and figures, from the tables alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.page import captioned, write_run_page
from harness.errors import InputError, printable
from harness.files import write_text
from harness.measurements.coupling import figures
from harness.measurements.coupling.summary import of_blocks, of_trajectories, summarise, with_label
from harness.measurements.coupling.tables import TABLES, read_coupling
from harness.optional import require
from harness.tables.drawing import can_draw, remove_figures, why_no_figures
from harness.tables.failures import failure_lines
from harness.tables.page import Page, Section, frame_table
from harness.tables.text import (
    aligned,
    count,
    figure_text,
    file_stem,
    markdown_lines,
    markdown_text,
    plus_minus,
    safe_for_csv,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

CSV_FORMAT = "%.6g"  # the parquet files have all digits
MOST_FIGURES = 4  # sets of unedited weights with a heat map of their own: the first, the last and others between


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path | None:
    """Print a summary, and write coupling.md, CSV files and PNG figures into <folder>/report/.

    coupling_summary.csv has one row for each set of weights, kind, order, K and choice of pairs; trajectories.csv one
    for each set of weights, blocks.csv one for each of its blocks. write: a function that prints the text. Returns the
    path of coupling.md, or None if nothing has been measured. Raises SchemaVersionError.
    """
    folder = Path(folder)
    jacobians = read_coupling(folder, "jacobians")
    if jacobians.empty:
        write(f"{folder}: no prompt has been measured yet")
        return None
    out = folder / "report"
    out.mkdir(exist_ok=True)
    remove_figures(out)
    every = jacobians = with_label(jacobians)
    problems = failure_lines(jacobians, lambda row: f"{row['weights']} prompt {row['prompt_id']}")
    jacobians = jacobians[jacobians["status"] == "ok"]
    lines, drawn = ["# Coupling", ""], []
    sections: list[Section] = []
    head: list[str] = []
    if len(jacobians):
        couplings, trajectories = (with_label(read_coupling(folder, name)) for name in ("couplings", "trajectories"))
        summary, ways, blocks = summarise(couplings), of_trajectories(trajectories), of_blocks(jacobians)
        for name, table in (("coupling_summary", summary), ("trajectories", ways), ("blocks", blocks)):
            safe_for_csv(table).to_csv(out / f"{name}.csv", index=False, float_format=CSV_FORMAT)
        head, tables = _headline(jacobians), [_summary_cells(summary), _way_cells(ways)]
        if can_draw():
            drawn = _draw(folder, out, _Shown(jacobians, couplings, summary, ways, blocks))
        else:
            problems.append(why_no_figures())
        sections = [Section("Coupling", tables=[frame_table("Coupling", summary)]),
                    Section("Trajectories", tables=[frame_table("Trajectories", ways)]),
                    Section("Blocks", tables=[frame_table("Blocks", blocks)]),
                    Section("Figures", pictures=captioned(out, drawn))]
        lines += [*map(markdown_text, head), ""]
        for cells in tables:
            lines += [*markdown_lines(cells), ""]
        write("\n".join(map(printable, [*head, "", *aligned(tables[0], 5), "", *aligned(tables[1], 1), *problems])))
    else:
        write("\n".join(map(printable, problems)))
    lines += [f"- {markdown_text(problem)}" for problem in problems]
    lines += [line for figure in drawn for line in (f"![{figure}]({figure})", "")]
    write_text(out / "coupling.md", "\n".join(lines))
    page = Page(f"Coupling of {head[0]}" if head else "Coupling", "\n".join(head[1:]), sections, problems=problems)
    write_run_page(folder, TABLES, every, page)
    write(f"\n{out / 'coupling.md'}, coupling_summary.csv, trajectories.csv, blocks.csv and"
          f" {count(len(drawn), 'figure')}")
    return out / "coupling.md"


def figure(folder: str | os.PathLike, weights: str | None = None, k: int | None = None) -> Figure:
    """Return the heat map of coupling over pairs of blocks.

    weights: "trained", "random" or the name of a checkpoint, with the ablation if any; by default the first weights in
    the table. k: the number of triples; by default the smallest. Raises InputError if there is nothing to draw.
    """
    require("matplotlib", "plots", "a figure")
    rows = with_label(read_coupling(folder, "couplings"))
    rows = rows[rows["kind"] == "depth"]
    known = list(dict.fromkeys(rows["weights"]))
    chosen = weights or (known[0] if known else None)
    k = k if k is not None or rows.empty else int(rows["k"].min())
    of_weights = rows[(rows["weights"] == chosen) & (rows["k"] == k)]
    if of_weights.empty:
        raise InputError(f"{folder}: no pairs of blocks of weights {chosen!r} with k = {k}; measured: "
                         f"{', '.join(known)}; k = {', '.join(map(str, sorted(set(rows['k']))))}")
    return figures.heat_map(of_weights[of_weights["order"] == of_weights["order"].iloc[0]], None,
                            figure_text(f"{chosen}, K = {k}"))


def _headline(jacobians: pandas.DataFrame) -> list[str]:
    one = jacobians.iloc[0]
    prompts = jacobians.drop_duplicates("prompt_id")
    tokens = prompts["n_tokens"]
    ways = jacobians.drop_duplicates(["method", "path"])
    return [
        f"{one['model']} ({one['model_type']}, {one['dtype']}): {int(one['n_blocks'])} blocks of {int(one['width'])}"
        f" dimensions, {count(len(prompts), 'prompt')} of {int(tokens.min())} to {int(tokens.max())} tokens",
        "Jacobians: " + ", ".join(f"{row['method']} by the {row['path'].replace('_', '-')} path"
                                  for _, row in ways.iterrows()),
        "coupling is 0 for unrelated vectors and 1 for a perfect match; ± is the standard error over prompts",
    ]


def _summary_cells(summary: pandas.DataFrame) -> list[list[str]]:
    def both(row: Any, name: str) -> str:
        return plus_minus(row[name], row[f"{name}_stderr"])

    head = ["weights", "kind", "order", "K", "pairs", "coupling", "m", "m null", "|m|", "|m| null"]
    return [head, *(
        [row["weights"], row["kind"], row["order"], str(row["k"]), row["pairs"], both(row, "coupling"), both(row, "m"),
         f"{row['m_null']:.4f}", both(row, "m_abs"), f"{row['m_abs_null']:.4f}"]
        for _, row in summary.iterrows()
    )]


def _way_cells(ways: pandas.DataFrame) -> list[list[str]]:
    names = {"lss": "line-shape score", "growth_mean": "growth (nats per block)", "growth_std": "its deviation",
             "expodistance": "expodistance"}
    head = ["weights", *names.values(), "sqrt(L)"]
    return [head, *(
        [row["weights"], *(plus_minus(row[name], row[f"{name}_stderr"]) for name in names), f"{row['lss_null']:.3f}"]
        for _, row in ways.iterrows()
    )]


@dataclass(frozen=True)
class _Shown:
    """What the figures show: two tables of the run, and the three tables of the report."""

    jacobians: pandas.DataFrame
    couplings: pandas.DataFrame
    summary: pandas.DataFrame
    ways: pandas.DataFrame
    blocks: pandas.DataFrame


def _draw(folder: Path, out: Path, shown: _Shown) -> list[str]:
    """Draw the figures into the folder `out` and return their file names."""
    drawn: list[str] = []
    model = Path(shown.jacobians["model"].iloc[0]).name
    plain = shown.jacobians[shown.jacobians["region"].isna()]
    unedited = list(dict.fromkeys(plain["weights"]))
    some = _spread(unedited, MOST_FIGURES)

    def path(kind: str, weights: str | None = None) -> Path:
        drawn.append(f"{kind}.png" if weights is None else f"{kind}-{file_stem(weights)}.png")
        return out / drawn[-1]

    depth, summary = shown.couplings[shown.couplings["kind"] == "depth"], shown.summary
    if len(depth) and depth["block_i"].max() > 0:
        order, k = depth["order"].iloc[0], int(depth["k"].min())
        depth = depth[(depth["order"] == order) & (depth["k"] == k)]
        of_depth = summary[(summary["kind"] == "depth") & (summary["order"] == order) & (summary["k"] == k)]
        about = f"K = {k}, {order}"
        for weights in some:
            figures.heat_map(depth[depth["weights"] == weights], path("pairs", weights),
                             figure_text(f"{model}, {weights}, {about}"))
        checkpoints = plain.dropna(subset=["checkpoint_index"]).sort_values("checkpoint_index", kind="stable")
        names = [one for one in dict.fromkeys(checkpoints["weights"]) if one != "random"]
        if len(names) > 1:
            figures.training_figure(of_depth, shown.ways, names, path("training"), figure_text(f"{model}, {about}"))
        if len(of_depth["weights"].unique()) > len(unedited):
            trained = of_depth[of_depth["weights"] != "random"]
            figures.ablation_figure(trained, path("ablations"), figure_text(f"{model}, {about}"))
    figures.block_figure(shown.blocks[shown.blocks["weights"].isin(some)], path("blocks"), figure_text(model))
    points = with_label(read_coupling(folder, "points"))
    chosen = list(dict.fromkeys([unedited[-1 if "random" not in unedited else -2 if len(unedited) > 1 else 0],
                                *(["random"] if "random" in unedited else [])]))
    first = points[points["weights"].isin(chosen)]
    first = first[first["prompt_id"] == first["prompt_id"].iloc[0]]
    figures.trajectory_figure(first, path("trajectories"),
                              figure_text(f"{model}, prompt {first['prompt_id'].iloc[0]}"))
    return drawn


def _spread(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
