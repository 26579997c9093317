"""Are the numbers of this checkout those of an earlier commit? Six small studies, run by both, compared value by value.

    python experiments/same_numbers/compare.py --before 71f8d53

Each side runs with the same interpreter, one thread, and caches of its own. Compared are the ids of all units and every
column that holds a number which depends on the model; circumstances (times, machine, versions) are left out.

With --on-purpose, rows are matched by what they are (target, region, task, metric) and not by their ids. Differences
that a change of `ON_PURPOSE` explains are counted apart; every other difference is one too many.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("HARNESS_ASSETS", ROOT.parent / "shared"))
CIRCUMSTANCES = {
    "seconds", "started_at", "rank", "hostname", "device", "harness_version", "git_commit", "torch_version",
    "transformers_version", "python_version", "seconds_decomposition", "seconds_statistics", "made_of", "study_id",
    "search_id", "run_id",
}  # fmt: skip
MODEL = ["model=pretrained", f"model.name={ASSETS / 'models' / 'stories260K'}", "runtime.threads=1"]
TEXT = [f"tasks.text.data_files={ASSETS / 'data' / 'tinystories' / 'validation_first_stories.txt'}"]
IOI = [f"tasks.ioi.data_files={ASSETS / 'data' / 'ioi' / 'ioi.jsonl'}"]
RECALL = ["model.recall.steps=60", "model.recall.dim=32", "model.recall.hidden_dim=64",
          "model.recall.context_length=32"]


@dataclass(frozen=True)
class Small:
    """One small study: the words behind `harness`, its tables, and the columns that tell its rows apart.

    rounding: relative differences up to this one are on purpose, because examples are scored in other groups.
    """

    name: str
    words: tuple[str, ...]
    tables: dict[str, tuple[str, ...]]
    rounding: float = 0.0


# The columns that follow from clusters of examples: blocks of a text, for example. Without clusters they are as before.
OF_CLUSTERS = {"stderr", "delta_stderr", "p_value", "ci_low", "ci_high", "baseline_stderr"}
# Words that give the numbers of before, where a default has changed.
WORDS_OF_BEFORE = {"text": "tasks.text.bos=false"}


@dataclass(frozen=True)
class Purpose:
    """A change of numbers on purpose. why: what changed. rows: those that it concerns, of two tables with equal index.
    columns: those that it concerns; None for all."""

    why: str
    rows: Callable[[pd.DataFrame, pd.DataFrame], pd.Series]
    columns: set[str] | None = None


def _other_ablation(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Rows of which the region holds other singular values."""
    if not {*WHICH_VALUES} <= {*before} & {*after}:  # spectra, and what a search concludes from its cells
        return pd.Series(False, before.index)
    one, other = before[WHICH_VALUES].astype(float), after[WHICH_VALUES].astype(float)
    return ~((one == other) | (one.isna() & other.isna())).all(axis=1)


def _of_words(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    return _level(before, "metric").isin({"word_perplexity", "byte_perplexity", "bits_per_byte"})


def _other_examples(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """Rows of cells that adaptive precision stopped after other numbers of examples."""
    if "n" not in before or "n" not in after:
        return pd.Series(False, before.index)
    return before["n"].astype(float) != after["n"].astype(float)


def _clustered(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    return after["n_clusters"].notna() if "n_clusters" in after else pd.Series(False, before.index)


def _level(frame: pd.DataFrame, name: str) -> pd.Series:
    if name in frame.index.names:
        return pd.Series(frame.index.get_level_values(name), frame.index)
    return frame[name] if name in frame else pd.Series("", frame.index)


ON_PURPOSE = (
    Purpose("large and small regions of one fraction hold equally many values", _other_ablation),
    Purpose("words and bytes are those of the scored tokens", _of_words),
    Purpose("standard errors and p-values over clusters", _clustered, OF_CLUSTERS),
    Purpose("adaptive precision stops after other numbers of examples", _other_examples),
)
# Texts, not numbers: ids, and protocols of tasks, which have new keys.
TEXTS = {"cell_id", "spectrum_id", "protocol", "settings", "covariance"}
WHICH_VALUES = ["n_removed", "fraction_start", "fraction_stop"]
BY_LABELS = {
    "metrics": ("target", "region", "task", "metric"),
    "examples": ("target", "region", "task", "metric", "example_id"),
    "matrices": ("checkpoint", "init", "matrix"),
    "singular_values": ("checkpoint", "init", "matrix", "index"),
    "vectors": ("checkpoint", "init", "matrix", "side", "index"),
}
CELLS = {
    "metrics": ("cell_id", "task", "metric"),
    "examples": ("cell_id", "task", "metric", "example_id"),
}
SPECTRA = {
    "matrices": ("spectrum_id",),
    "singular_values": ("spectrum_id", "index"),
    "vectors": ("spectrum_id", "side", "index"),
}
WINNERS = {
    "verdict": ("task", "metric"),
    "predictions": ("task", "metric", "target", "region"),
    "comparison": ("task", "predicted", "measured", "cells"),
    "composition": ("task", "metric", "step"),
}
SEARCH = {
    **WINNERS,
    **{f"{part}/{table}": key for part in ("selection", "held out") for table, key in CELLS.items()},
}
STUDIES = (
    Small("deciles", (
        "run", *MODEL, "target=type", "region=decile", "region.controls=[none,random]", "task=[text,ioi]", *TEXT, *IOI,
        "tasks.text.limit=12", "tasks.ioi.limit=20",
    ), CELLS),
    Small("LASER search", (
        "search", *MODEL, "target=mlp_matrix", "target.blocks=[1,3]", "target.layer_types=[up_proj,down_proj]",
        "region=fraction", "region.kinds=[small]", "region.values=[0.1,0.9]", "task=[ioi,text]", *TEXT, *IOI,
        "tasks.ioi.selection_share=0.5", "tasks.ioi.limit=40", "tasks.text.limit=4",
        "search.metrics=[accuracy,logit_difference,logprob]",
        "search.choice=compare", "search.report_limit=60", "search.gradient_examples=20", "search.compose=greedy",
        "search.control_seeds=[0,1]",
    ), SEARCH),
    Small("adaptive", (
        "run", *MODEL, "target=matrix", "target.layer_types=[down_proj]", "region=fraction", "region.values=[0.3]",
        "task=[text,ioi]", *TEXT, *IOI, "tasks.text.window=64", "tasks.text.limit=200", "tasks.ioi.limit=200",
        "runtime=adaptive", "runtime.batch_tokens=512",
    ), CELLS, rounding=1e-5),
    Small("branch in bfloat16", (
        "run", *MODEL, "model.dtype=bfloat16", "runtime.edit=branch", "target=type", "region=fraction",
        "region.kinds=[small]", "region.values=[0.05,0.1,0.5]", "task=text", *TEXT, "tasks.text.limit=6",
    ), CELLS),
    Small("spectra", (
        "spectra", *MODEL[:2], "threads=1", "init=both", "task=text", *TEXT, "tasks.text.limit=6",
        "estimator=bulk_fit", "layer_types=[mlp,o_proj]",
    ), SPECTRA),
    Small("recall", (
        "run", *RECALL, "runtime.threads=1", "task=[recall,recall_probes]", "tasks.recall.n_sequences=64",
        "tasks.recall_probes.n_sequences=16", "target=matrix",
    ), CELLS),
)  # fmt: skip


def run(checkout: Path, words: Iterable[str], folder: Path, cache: Path) -> None:
    """`harness <words>` of a checkout, its results in `folder`. Raises CalledProcessError where it fails."""
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command, *settings = words
    program = "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", program, command, "--quiet", *settings, f"output={folder}"],
        cwd=checkout, env=environment, check=True,
    )


def find(folder: Path, table: str) -> pd.DataFrame:
    """A table of a study folder, wherever this version of the harness keeps it."""
    part, _, name = table.rpartition("/")
    # the part of a search that is held out of the choice was once the folder report/
    places = {"": [folder], "selection": [folder / "selection", folder / "studies" / "selection"],
              "held out": [folder / "report", folder / "studies" / "report"]}[part]
    for place in places:
        for path in (place / name, place / f"{name}.parquet"):
            if path.is_file() or list(path.glob("*.parquet")):
                return pd.read_parquet(path)
    raise FileNotFoundError(f"{folder}: no table {table}")


def beside_in_columns(verdict: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The verdict with a group of columns per task that was measured beside the winners, as it once was one table."""
    try:
        beside = find(folder, "beside")
    except FileNotFoundError:
        return verdict
    for row in beside.to_dict("records"):
        at = (verdict.task == row["task"]) & (verdict.metric == row["metric"])
        key = f"{row['beside_task']}_{row['beside_metric']}"
        for name, column in (("", "value"), ("_baseline", "baseline"), ("_delta", "delta"), ("_p", "p_value")):
            verdict.loc[at, key + name] = row[column]
    return verdict


def compare(study: Small, folders: dict[str, Path]) -> list[dict[str, object]]:
    """One row per table: its rows and columns, and how many values differ."""
    found = []
    for table, key in study.tables.items():
        before, after = (find(folders[side], table) for side in ("before", "after"))
        if table == "verdict":
            before, after = (beside_in_columns(frame, folders[side]) for frame, side in
                             ((before, "before"), (after, "after")))
        columns = [name for name in before.columns if name not in CIRCUMSTANCES]
        missing = [name for name in columns if name not in after.columns]
        before, after = (frame.set_index(list(key)).sort_index() for frame in (before, after))
        same_rows = before.index.equals(after.index)
        values = [name for name in columns if name not in key and name not in missing]
        differing = {}
        if same_rows:
            for name in values:
                one, other = before[name], after[name]
                if pd.api.types.is_numeric_dtype(one) or pd.api.types.is_numeric_dtype(other):
                    one, other = one.astype(float), other.astype(float)
                else:  # a null is written as None or as NaN
                    one, other = one.where(one.notna(), None), other.where(other.notna(), None)
                equal = (one == other) | (one.isna() & other.isna())
                if not equal.all():
                    differing[name] = int((~equal).sum())
        found.append({
            "study": study.name, "table": table, "rows": len(before), "columns": len(values), "same rows": same_rows,
            "values compared": len(before) * len(values) if same_rows else 0,
            "differing": differing or 0, "columns gone": ", ".join(missing) or 0,
        })
    return found


def labelled(folder: Path, table: str) -> pd.DataFrame:
    """A table with the labels of each cell, or of each matrix, beside its id."""
    frame = find(folder, table)
    if "spectrum_id" in frame:  # which has them
        return frame
    if "target" not in frame:
        part, _, _ = table.rpartition("/")
        labels = find(folder, f"{part}/metrics" if part else "metrics")
        of_cell = labels[["cell_id", "target", "region", *WHICH_VALUES]].drop_duplicates("cell_id")
        frame = frame.merge(of_cell, on="cell_id")
    return frame


def _not_random(rows: pd.Index) -> int:
    if "region" not in rows.names:
        return len(rows)
    return int((~rows.get_level_values("region").str.startswith("random (")).sum())


def compare_on_purpose(study: Small, folders: dict[str, Path]) -> list[dict[str, object]]:
    """One row per table of cells or spectra: values that are equal, that differ on purpose, and that differ at all."""
    found = []
    # What a search concludes follows from its cells, which are compared.
    for table in (table for table in study.tables if table.rpartition("/")[2] in BY_LABELS):
        labels = BY_LABELS[table.rpartition("/")[2]]
        sides = {side: labelled(folders[side], table) for side in ("before", "after")}
        before, after = (frame.set_index(list(labels)).sort_index() for frame in sides.values())
        # Random controls of equally many values are one control, which has the label of one of them.
        only = {side: _not_random(one.index.difference(other.index))
                for side, one, other in (("before", before, after), ("after", after, before))}
        both = before.index.intersection(after.index)
        before, after = before.loc[both], after.loc[both]
        columns = [one for one in before.columns if one in after.columns and one not in CIRCUMSTANCES | TEXTS]
        unequal, apart = pd.DataFrame(False, before.index, columns), pd.DataFrame(0.0, before.index, columns)
        for column in columns:
            one, other = before[column], after[column]
            if pd.api.types.is_numeric_dtype(one) or pd.api.types.is_numeric_dtype(other):
                one, other = one.astype(float), other.astype(float)
                apart[column] = (one - other).abs() / one.abs().clip(lower=1.0)
            unequal[column] = ~((one == other) | (one.isna() & other.isna()))
        n_unequal, explained = int(unequal.to_numpy().sum()), []
        for purpose in ON_PURPOSE:
            of = [column for column in columns if purpose.columns is None or column in purpose.columns]
            rows = purpose.rows(before, after).to_numpy(bool)
            n = int(unequal.loc[rows, of].to_numpy().sum())
            unequal.loc[rows, of] = False
            if n:
                explained.append(f"{n}: {purpose.why}")
        rounded = unequal & (apart <= study.rounding)
        if n := int(rounded.to_numpy().sum()):
            largest = apart.where(rounded, 0.0).to_numpy().max()
            explained.append(f"{n}: examples are scored in other groups (relative difference at most {largest:.1e})")
        unequal &= ~rounded
        rest = {column: f"{n} {column} (by at most {apart[column][unequal[column]].max():.1e})"
                for column, n in unequal.sum().items() if n}
        found.append({
            "study": study.name, "table": table, "rows of both": len(both), "only before": only["before"],
            "only after": only["after"], "values": len(both) * len(columns),
            "equal": len(both) * len(columns) - n_unequal, "differ on purpose": "; ".join(explained) or 0,
            "differ otherwise": ", ".join(rest.values()) or 0,
            "columns gone": ", ".join(sorted(set(sides["before"].columns) - set(sides["after"].columns))) or 0,
        })
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the commit to compare with")
    parser.add_argument("--only", nargs="*", help="names of studies")
    parser.add_argument("--keep", type=Path, help="a folder for the results, instead of one that is removed; the side"
                        " 'before' is not run again where it is there")
    parser.add_argument("--on-purpose", action="store_true", help="match rows by their labels, and count differences"
                        " that changes on purpose explain apart")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.keep or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        checkout = Path(scratch) / "checkout"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(checkout), arguments.before],
                       check=True)
        rows = []
        try:
            for study in STUDIES:
                if arguments.only and study.name not in arguments.only:
                    continue
                folders = {side: work / side / study.name.replace(" ", "_") for side in ("before", "after")}
                for side, source in (("before", checkout), ("after", ROOT)):
                    if side == "before" and arguments.keep and folders[side].exists():
                        continue
                    print(f"{study.name}: {side}", file=sys.stderr, flush=True)
                    words = list(study.words)
                    if arguments.on_purpose and side == "after":
                        words += [word for task, word in WORDS_OF_BEFORE.items() if f"tasks.{task}." in " ".join(words)]
                    run(source, words, folders[side], work / side / "cache")
                rows += (compare_on_purpose if arguments.on_purpose else compare)(study, folders)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(checkout)], check=True)
    table = pd.DataFrame(rows)
    text = "\n".join([
        "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns),
        *("| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)),
    ])
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.on_purpose:
        same = all(not row["differ otherwise"] and not row["only before"] for row in rows)
        print("every difference is on purpose" if same else "DIFFERENCES THAT NO CHANGE ON PURPOSE EXPLAINS")
    else:
        same = all(row["same rows"] and not row["differing"] and not row["columns gone"] for row in rows)
        print("every value equal" if same else "NOT EQUAL")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
