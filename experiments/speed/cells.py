"""Cells per second of two commits, and what a cell costs beside its scoring pass.

    git worktree add ../before COMMIT
    python experiments/speed/cells.py --before ../before        # about two minutes of two CPUs

Each commit measures the same small study (tenths of up_proj and down_proj on windows of WikiText-2) with rows on disk,
in processes of its own with one thread each, in turn: before, after, after, before, and so on. Overhead is what a cell
takes beside `Scorer.score`: the edit, the statistics and the rows, of which the wall clock sees only what the scoring
waits for. Prints a table, and writes cells.csv beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# model -> windows of 64 tokens, pairs of runs
MODELS = {"stories260K": (32, 2), "stories15M": (2, 1)}
FIELDS = ("model", "pair", "version", "cells", "wall_ms", "cpu_ms", "own_cpu_ms", "score_wall_ms", "score_cpu_ms")


def measure_one(model: str, folder: Path, assets: Path) -> dict[str, Any]:
    """Measure one study in this process; milliseconds per cell."""
    import pandas  # noqa: F401  imported before the clock starts, like everything that a cell imports
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401

    from harness.engine.manifest import freeze
    from harness.engine.measurement import Context
    from harness.engine.ranks import Ranks
    from harness.engine.run import measure_units
    from harness.evaluation.scoring import Scorer
    from harness.measurements import ABLATION, compose_settings
    from harness.measurements.ablation.measure import open_session
    from harness.measurements.ablation.units import plan

    windows = MODELS[model][0]
    study = plan(compose_settings("ablation", [
        "model=pretrained", f"model.name={assets}/models/{model}", "model.device=cpu", "region=decile",
        "region.controls=[]", "target.layer_types=[up_proj,down_proj]", "runtime.threads=1", "runtime.cache_gib=0",
        f"output={folder}", "task=wikitext", "tasks.wikitext.window=64", f"tasks.wikitext.limit={windows}",
        f"tasks.wikitext.data_files={assets}/data/wikitext-2-raw/test.jsonl",
    ]))
    session = open_session(study, Ranks(), False)
    freeze(ABLATION, study)
    spent, score = [0.0, 0.0], Scorer.score

    def timed(self: Scorer, *arguments: Any) -> Any:
        started = time.perf_counter(), time.thread_time()
        try:
            return score(self, *arguments)
        finally:
            spent[0] += time.perf_counter() - started[0]
            spent[1] += time.thread_time() - started[1]

    Scorer.score = timed  # type: ignore[method-assign]
    clocks = time.perf_counter, time.process_time, time.thread_time
    started_at = [clock() for clock in clocks]
    measure_units(ABLATION, study, study.units, Context(session))
    wall, cpu, own = (1000 * (clock() - at) / len(study.units) for clock, at in zip(clocks, started_at))
    score_wall, score_cpu = (1000 * seconds / len(study.units) for seconds in spent)
    return {"cells": len(study.units), "wall_ms": wall, "cpu_ms": cpu, "own_cpu_ms": own,
            "score_wall_ms": score_wall, "score_cpu_ms": score_cpu}


def in_process(checkout: Path, model: str, assets: Path) -> dict[str, Any]:
    """The same in a new process, by the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(dir=HERE) as folder:  # on the disk, and not in memory as /tmp may be
        command = [sys.executable, __file__, "--one", model, "--assets", str(assets), "--folder", f"{folder}/study"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=checkout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the page: medians over the runs, and the median over the pairs of after / before."""
    lines = ["| model | | before | after | after / before, by pairs |", "|---|---|--:|--:|--:|"]
    what = {
        "cells per second": lambda row: 1000 / row["wall_ms"],
        "processor time of a cell, ms": lambda row: row["cpu_ms"],
        "overhead of a cell, wall clock, ms": lambda row: row["wall_ms"] - row["score_wall_ms"],
        "overhead of a cell, processor time of the thread that scores, ms":
            lambda row: row["own_cpu_ms"] - row["score_cpu_ms"],
        "overhead of a cell, processor time of all threads, ms": lambda row: row["cpu_ms"] - row["score_cpu_ms"],
    }
    for model in dict.fromkeys(row["model"] for row in rows):
        for label, value in what.items():
            of = {version: [value(row) for row in rows if row["model"] == model and row["version"] == version]
                  for version in ("before", "after")}
            ratios = sorted(after / before for before, after in zip(of["before"], of["after"]))
            lines.append(f"| {model} | {label} | {statistics.median(of['before']):.3g} |"
                         f" {statistics.median(of['after']):.3g} |"
                         f" {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--after", type=Path, default=HERE.parents[1], help="of the later one; by default this")
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("HARNESS_ASSETS", "../shared")))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_one(args.one, args.folder, args.assets)))
        return
    if args.before is None:
        parser.error("--before is needed")
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    rows: list[dict[str, Any]] = []
    with (HERE / "cells.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for model, (_, pairs) in MODELS.items():
            for pair in range(pairs):
                for version in list(checkouts) if pair % 2 == 0 else list(checkouts)[::-1]:
                    found = in_process(checkouts[version], model, args.assets.resolve())
                    rows.append({"model": model, "pair": pair, "version": version, **found})
                    writer.writerow({key: round(value, 3) if isinstance(value, float) else value
                                     for key, value in rows[-1].items()})
                    file.flush()
    print(table(rows))


if __name__ == "__main__":
    main()
