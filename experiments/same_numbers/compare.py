"""Are the numbers of this checkout those of an earlier commit? Six small studies, run by both, compared value by value.

    python experiments/same_numbers/compare.py --before 71f8d53

Each side runs with the same interpreter, one thread, and caches of its own. Compared are the ids of all units and every
column that holds a number which depends on the model; circumstances (times, machine, versions) are left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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
    """One small study: the words behind `harness`, its tables, and the columns that tell its rows apart."""

    name: str
    words: tuple[str, ...]
    tables: dict[str, tuple[str, ...]]


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
    ), CELLS),
    Small("branch in bfloat16", (
        "run", *MODEL, "model.dtype=bfloat16", "runtime.edit=branch", "target=type", "region=fraction",
        "region.kinds=[small]", "region.values=[0.01,0.1,0.5]", "task=text", *TEXT, "tasks.text.limit=6",
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the commit to compare with")
    parser.add_argument("--only", nargs="*", help="names of studies")
    parser.add_argument("--keep", type=Path, help="a folder for the results, instead of one that is removed; the side"
                        " 'before' is not run again where it is there")
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
                    run(source, study.words, folders[side], work / side / "cache")
                rows += compare(study, folders)
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
    same = all(row["same rows"] and not row["differing"] and not row["columns gone"] for row in rows)
    print("every value equal" if same else "NOT EQUAL")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
