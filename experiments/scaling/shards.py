"""What splitting costs: one process against N shards of the same study, each a process of its own.

    python experiments/scaling/shards.py [--shards 1 2 4] [--sequences 1600] [--repeats 1] [--out shards.csv]

Another checkout is measured where PYTHONPATH names it.

Shards run at once where there are as many processors, otherwise one after the other. dearest, cheapest, total:
processor seconds, which hold on a machine that others use too. system: those of them that the system spent, and
page_faults, both of all shards. wall: from the start of the first to the end of the
last, of shards that ran at once; wall_ratio: over the wall time of one process divided by N, for which the machine must
be quiet.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = ("repeat", "shards", "dearest", "cheapest", "total", "ratio", "more_per_shard", "system", "page_faults",
           "wall", "wall_ratio")


def started(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "harness", *arguments], stdout=subprocess.DEVNULL,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def usage_of(process: subprocess.Popen) -> resource.struct_rusage:
    """Waits for the process. Raises RuntimeError where it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")
    return usage


def measured(n: int, study: Path, settings: list[str]) -> dict[str, float]:
    """Seconds and page faults of `n` shards of a new study; `wall` only where they ran at once."""
    usage_of(started("plan", "--freeze", *settings, f"output={study}"))
    commands = [("work", str(study), "--quiet", "--shard", str(i), "--of", str(n)) for i in range(n)]
    at_once, wall = n <= (os.cpu_count() or 1), time.monotonic()
    if at_once:
        used = [usage_of(process) for process in [started(*command) for command in commands]]
    else:
        used = [usage_of(started(*command)) for command in commands]
    wall = time.monotonic() - wall
    seconds = [usage.ru_utime + usage.ru_stime for usage in used]
    return {
        "dearest": max(seconds), "cheapest": min(seconds), "total": sum(seconds),
        "system": sum(usage.ru_stime for usage in used), "page_faults": sum(usage.ru_minflt for usage in used),
        **({"wall": wall} if at_once else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4], help="1 must come first")
    parser.add_argument("--sequences", type=int, default=1600, help="of the recall task: how long a cell takes")
    parser.add_argument("--repeats", type=int, default=1, help="of all of them in turn")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scaling-shards"))
    parser.add_argument("--out", type=Path, default=HERE / "shards.csv")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    # without the cache on disk, from which later contestants would profit
    settings = ["model.recall.steps=20", f"model.recall.cache_dir={arguments.folder}", "region=decile",
                f"tasks.recall.n_sequences={arguments.sequences}", "runtime.threads=1", "runtime.cache_gib=0"]
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for repeat in range(arguments.repeats):
            one: dict[str, float] = {}
            for n in arguments.shards:
                row = measured(n, arguments.folder / f"of-{n}-{repeat}", settings)
                one = row if n == 1 else one
                row |= {"ratio": row["dearest"] * n / one["total"],
                        "more_per_shard": (row["total"] - one["total"]) / max(1, n - 1)}
                if "wall" in row:
                    row["wall_ratio"] = row["wall"] * n / one["wall"]
                writer.writerow({"repeat": repeat, "shards": n} | {key: f"{value:.4g}" for key, value in row.items()})
                file.flush()
                print(repeat, n, row, flush=True)


if __name__ == "__main__":
    main()
