"""What the commands take before and after a commit: start-up, planning, small studies, reports.

    python experiments/speed/startup.py --before 71f8d53 --pairs 5

Both sides run the same commands with the same interpreter, one thread and caches of their own, in turn: before, after,
after, before, and so on. A number is the processor time of one process, which a busy machine disturbs less than the
clock on the wall. Writes startup.csv and startup.md beside this file.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("HARNESS_ASSETS", ROOT.parent / "shared"))
MODEL = [
    "model=pretrained", f"model.name={ASSETS / 'models' / 'stories260K'}", "task=text", "runtime.threads=1",
    f"tasks.text.data_files={ASSETS / 'data' / 'tinystories' / 'validation_first_stories.txt'}",
]
SMALLEST = [*MODEL, "tasks.text.limit=1", "target.kind=all", "region=index", "region.intervals=['0:1']",
            "region.controls=[]"]
# 35 matrices x 2 regions, the baseline and a control
OF_72_CELLS = [*MODEL, "tasks.text.limit=4", "target=matrix", "region=fraction", "region.kinds=[large,small]"]
PROGRAM = "import sys; from harness.cli import main; sys.exit(main(sys.argv[1:]))"


def commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The name of each measurement and the words behind `harness`; later ones use what earlier ones wrote."""
    for i in range(5):
        yield f"`--help` {i}", ["--help"]
    yield "`run --help`", ["run", "--help"]
    yield "`plan`, 72 cells", ["plan", *OF_72_CELLS]
    yield "smallest study, 2 cells", ["run", "--quiet", *SMALLEST, f"output={folder / 'smallest'}"]
    yield "study of 72 cells", ["run", "--quiet", *OF_72_CELLS, f"output={folder / 'cells'}"]
    yield "`run` of a complete study", ["run", "--quiet", *OF_72_CELLS, f"output={folder / 'cells'}"]
    yield "`report`, first time", ["report", str(folder / "cells")]
    yield "`report`, again", ["report", str(folder / "cells")]


def seconds(checkout: Path, words: list[str], cache: Path) -> float:
    """Processor seconds of `harness <words>` of a checkout. Raises CalledProcessError if it fails."""
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], cwd=checkout, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return usage.ru_utime + usage.ru_stime


def measure(checkouts: dict[str, Path], pairs: int, work: Path) -> list[dict[str, object]]:
    """One row for each command, pair and side."""
    rows = []
    # compiles Python's files and fills the caches of digests and decompositions
    for side, checkout in checkouts.items():
        for _, words in commands(work / side / "first"):
            seconds(checkout, words, work / side / "cache")
    for pair in range(pairs):
        order = ("before", "after") if pair % 2 == 0 else ("after", "before")
        both = [commands(work / side / str(pair)) for side in order]
        for steps in zip(*both):
            for side, (name, words) in zip(order, steps):
                taken = seconds(checkouts[side], words, work / side / "cache")
                rows.append({"command": name.rstrip(" 0123456789") if "help" in name else name, "pair": pair,
                             "side": side, "seconds": round(taken, 4)})
                print(name, side, f"{taken:.2f}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The medians of both sides, and the median of after / before with its range over the pairs."""
    lines = ["| command | before, s | after, s | after / before (range) | pairs |", "|---|--:|--:|--:|--:|"]
    for name in dict.fromkeys(row["command"] for row in rows):
        times = {side: [float(str(row["seconds"])) for row in rows if (row["command"], row["side"]) == (name, side)]
                 for side in ("before", "after")}
        ratios = [after / before for before, after in zip(times["before"], times["after"])]
        before, after = (statistics.median(times[side]) for side in ("before", "after"))
        lines.append(f"| {name} | {before:.3g} | {after:.3g} | {statistics.median(ratios):.2f}"
                     f" ({min(ratios):.2f} to {max(ratios):.2f}) | {len(ratios)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], check=True, text=True,
                            stdout=subprocess.PIPE).stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch) / "checkout"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", "-q", str(checkout), arguments.before],
                       check=True)
        try:
            rows = measure({"before": checkout, "after": ROOT}, arguments.pairs, Path(scratch))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(checkout)], check=True)
    with open(arguments.output / "startup.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (f"# Start-up, before ({arguments.before}) and after ({commit})\n\nProcessor seconds of one process;"
            f" `{Path(__file__).name}` says how they were taken.\n\n{table(rows)}\n")
    (arguments.output / "startup.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
