"""What a cell under adaptive precision costs that scores every example, against the same cell in exact mode.

    python experiments/speed/adaptive_overhead.py            # about four minutes of one CPU thread

One cell of stories260K (a tenth of 3.down_proj) on sets of several sizes. No tolerance is ever met, so that the cell
scores every group and computes an interval after each. In every repeat the two modes take turns in one process. Seconds
are those of the processor (user and system) from the edited weights to the outcome of the cell, in --assets
($HARNESS_ASSETS, ../shared). Prints one line for each set: groups, passes (batches of both modes), padded tokens of all
groups over those of exact, and the median over repeats of the ratio of seconds, with its quartiles.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from harness.engine.measurement import Context
from harness.engine.ranks import Ranks
from harness.evaluation.scoring import Scorer
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.cell_run import CellRun
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.measure import open_session
from harness.measurements.ablation.outcomes import Failed
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.units import plan
from harness.models.editing import ablated

MODES = {
    "exact": [],
    "adaptive": ["runtime.precision=adaptive", "runtime.adaptive.relative=1e-9", "runtime.adaptive.of_baseline=null"],
}


def text(n: int, window: int) -> list[str]:
    return ["task=wikitext", "tasks.wikitext.data_files={assets}/data/wikitext-2-raw/test.jsonl",
            f"tasks.wikitext.window={window}", f"tasks.wikitext.limit={n}"]


def pairs(per_paradigm: int) -> list[str]:
    return ["task=blimp", "tasks.blimp.data_files={assets}/data/blimp", f"tasks.blimp.limit={per_paradigm}"]


# name -> overrides, tokens of a batch, repeats
SETS = {
    "1500 windows of 128 tokens": (text(1500, 128), 8192, 5),
    "1800 pairs of BLiMP": (pairs(150), 8192, 9),
    "400 windows of 64 tokens": (text(400, 64), 2048, 25),
    "360 pairs of BLiMP": (pairs(30), 2048, 25),
    "360 pairs of BLiMP, larger batch": (pairs(30), 8192, 25),
    "120 pairs of BLiMP": (pairs(10), 2048, 41),
    "100 windows of 128 tokens": (text(100, 128), 2048, 41),
}


def prepared(assets: Path, folder: Path, overrides: list[str], batch_tokens: int) -> Study:
    common = ["model=pretrained", f"model.name={assets}/models/stories260K", "model.device=cpu", "region=fraction",
              "region.values=[0.1]", "region.kinds=[large]", "region.controls=[]", "target.layer_types=[down_proj]",
              "target.blocks=[3]", "runtime.threads=1", "runtime.cache_gib=0", f"output={folder}",
              f"runtime.batch_tokens={batch_tokens}"]
    return plan(compose_settings(ABLATION, [*common, *(one.format(assets=assets) for one in overrides)]))


def seconds(run: CellRun, cell: Cell) -> float:
    started = time.process_time()
    outcome = run.outcome(cell)
    taken = time.process_time() - started
    if isinstance(outcome, Failed):
        raise RuntimeError(f"the cell failed: {outcome}")
    return taken


def layout(scorer: Scorer) -> tuple[int, int, int]:
    """The number of tasks that the scorer knows, which are groups, of batches, and of padded tokens."""
    batches = [batch for packed in scorer.packed.values() for batch in packed.batches]
    return len(scorer.packed), len(batches), sum(batch.input_ids.numel() for batch in batches)


def measure(assets: Path, name: str) -> str:
    overrides, batch_tokens, repeats = SETS[name]
    runs, cells = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, more in MODES.items():
            study = prepared(assets, Path(folder) / mode, [*overrides, *more], batch_tokens)
            session = next(iter(runs.values())).loaded if runs else open_session(study, Ranks(), False)
            runs[mode] = CellRun(study, Context(session), set(study.tasks))
            list(runs[mode].baselines(set()))
            cells[mode] = next(cell for cell in study.units if not cell.is_baseline)
        ablation, ratios = cells["exact"].ablation, []
        for run in runs.values():
            run.scorers.advance(ablation.target.first_block)
        with ablated(runs["exact"].loaded, ablation, runs["exact"].sources):
            for number in range(repeats + 1):
                order = list(MODES) if number % 2 else list(MODES)[::-1]
                taken = {mode: seconds(runs[mode], cells[mode]) for mode in order}
                if number:  # the first pass moves the stream to the frontier
                    ratios.append((taken["adaptive"] / taken["exact"], taken["exact"]))
    layouts = [layout(run.scorers.of(next(iter(run.tasks)))) for run in runs.values()]
    (_, passes, tokens), (groups, own, padded) = layouts
    low, middle, high = statistics.quantiles((ratio for ratio, _ in ratios), n=4)
    return (f"| {name}, batch of {batch_tokens} | {groups} | {own} / {passes} | {padded / tokens:.3f} |"
            f" {middle:.3f} ({low:.3f} to {high:.3f}) | {statistics.median(exact for _, exact in ratios):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("HARNESS_ASSETS", "../shared")))
    parser.add_argument("sets", nargs="*", help="beginnings of the names of the sets to measure; by default all")
    args = parser.parse_args()
    print("| examples | groups | passes, adaptive / exact | padded tokens | seconds | exact, s |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in SETS:
        if not args.sets or any(name.startswith(one) for one in args.sets):
            print(measure(args.assets.resolve(), name), flush=True)


if __name__ == "__main__":
    main()
