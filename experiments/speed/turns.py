"""The contest in short turns, with the harness of an earlier commit beside today's.

    git worktree add --detach /tmp/then 71f8d53
    python experiments/speed/turns.py --then /tmp/then     # about 15 minutes of one CPU thread
    python experiments/speed/turns.py --report             # the page again from turns.csv

The speed of a virtual machine drifts by a factor of two within minutes, so that two long samples are not comparable.
Here three processes do the same study in turns of one ablation each, which is one or two seconds of processor time: the
harness of then, that of today, and that of today once more, which also runs the other contestants of contest.py. The
order is drawn anew in every round. Ratios are taken within a round, where the drift is the same for all, and the ratio
of today's two processes is the control. Every log-probability of then is compared with that of today.

Each tree runs its own contest.py. Writes turns.csv and contest-again.md.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
TURN = "TURN "  # begins the lines of a process that the others' output must not be taken for
PASSES = ("decomposition", "edit", "forward", "head")  # the parts that compute with the model; the others do the rest
PROCESSES = ("then", "now", "now again")
REPEATS = (("stories15M", 0), ("GPT-2 size, random", 1))
# Near those of the contest, but whole numbers of values of ranks 288 and 768: fractions are rounded in another way now.
SHARES = ((0.125, 0.75, 0.96875), (0.25, 0.875))
N_SAMPLES = 8  # ablations of a repeat that naive and HFLM do, too


# ---------------------------------------------------------------- one process


def take_part(process: str, grid: str, number: int, model: str, assets: Path, output: str) -> None:
    """Run one study of the contest of the tree whose package is first on the path, and stop after each ablation."""
    contest = _contest()
    contest.torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    score, instrumented = contest.Scorer.score, contest.instrumented

    def score_kept(self: Any, task: str, *args: Any, **kwargs: Any) -> Any:
        scores = score(self, task, *args, **kwargs)
        found[task] = scores
        return scores

    @contextmanager
    def in_turns(clock: Any, after_ablation: Callable) -> Any:
        def turn(ablation: Any, scorer: Any) -> None:
            numbers = {task: scores.request_logprob().tolist() for task, scores in found.items()}
            after_ablation(ablation, scorer)
            tell(clock, block=ablation.target.first_block, numbers=numbers)
            sys.stdin.readline()

        sys.stdin.readline()
        with instrumented(clock, turn):
            yield
        tell(clock)

    contest.Scorer.score, contest.instrumented = score_kept, in_turns
    batch_sizes: dict[str, dict[str, int]] = {}
    extra: dict[str, Any] = {"ideal_everywhere": True}
    if process != "now again":
        contest.Hflm, extra = lambda *args: SimpleNamespace(batch_size={}), {}
    tasks = contest._tasks(assets, *contest.SIZES[grid])
    if hasattr(contest, "_settings"):
        tasks["wikitext"] = replace(tasks["wikitext"], bos=False)  # as it was scored then
        settings = contest._settings(model, tasks, SHARES[number], output)
    else:
        settings = replace(contest._config(model, tasks, SHARES[number]), output=output)
    rows, _, _ = contest.repeat(grid, number, settings, None, N_SAMPLES if extra else 0, batch_sizes, **extra)
    differences = {f"{row['contestant']}|{row['task']}": row["relative_difference"] for row in rows}
    print(TURN + json.dumps({"differences": differences}), flush=True)


def tell(clock: Any, **what: Any) -> None:
    """Print the seconds of the clock until now, by contestant, task and kind of part, and what else is given."""
    seconds: dict[str, float] = defaultdict(float)
    clock._charge()
    for (contestant, task, part), value in clock.seconds.items():
        seconds[f"{contestant}|{task}|{'passes' if part in PASSES else 'rest'}"] += value
    print(TURN + json.dumps({"seconds": seconds, **what}), flush=True)


def _contest() -> Any:
    import harness

    tree = Path(harness.__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("contest", tree / "experiments/speed/contest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contest"] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the rounds


def compete(then: Path, assets: Path) -> None:
    """Measure the repeats that turns.csv does not have yet."""
    rows = read()
    with tempfile.TemporaryDirectory() as temporary:
        gpt2 = _contest().gpt2_sized(Path(temporary) / "gpt2", assets)
        for grid, number in REPEATS:
            if any((row["grid"], int(row["repeat"])) == (grid, number) for row in rows):
                continue
            model = gpt2 if grid.startswith("GPT-2") else str(assets / "models/stories15M")
            output = f"{temporary}/{len(rows)}"
            running = {name: _start(then if name == "then" else HERE.parents[1], name, grid, number, model, assets,
                                    f"{output}-{i}")
                       for i, name in enumerate(PROCESSES)}
            rows += _rounds(grid, number, running)
            write(rows)
            print(grid, number, len(rows), flush=True)


def _start(tree: Path, *arguments: Any) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(HERE / "turns.py"), "--take-part", *map(str, arguments)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _rounds(grid: str, number: int, running: dict[str, subprocess.Popen]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], float] = defaultdict(float)
    order = random.Random(number)
    for turn in range(10**6):
        told = {}
        for name in order.sample(PROCESSES, len(PROCESSES)):
            running[name].stdin.write("go\n")
            running[name].stdin.flush()
            told[name] = _answer(running[name])
        for name, answer in told.items():
            for key, seconds in answer["seconds"].items():
                contestant, task, part = key.split("|")
                taken = seconds - before[name, key]
                before[name, key] = seconds
                if contestant in ("", "nobody") or not taken:
                    continue
                row = {"grid": grid, "repeat": number, "round": turn, "block": answer.get("block", ""), "process": name,
                       "contestant": contestant, "task": task, "part": part, "seconds": taken, "difference": ""}
                if contestant == "harness" and task and part == "passes" and "numbers" in answer:
                    ours, theirs = (np.array(told[who]["numbers"][task]) for who in ("now", name))
                    row["difference"] = float(np.abs((theirs - ours) / ours).max())
                rows.append(row)
        if "numbers" not in told["now"]:
            break
    for name, process in running.items():
        for key, difference in _answer(process)["differences"].items():
            contestant, task = key.split("|")
            if contestant != "harness" and name == "now again":
                rows.append({"grid": grid, "repeat": number, "round": "", "block": "", "process": name,
                             "contestant": contestant, "task": task, "part": "", "seconds": 0.0,
                             "difference": difference})
        process.stdin.close()
        process.wait()
    return rows


def _answer(process: subprocess.Popen) -> dict[str, Any]:
    for line in process.stdout:
        if line.startswith(TURN):
            return json.loads(line[len(TURN) :])
    raise SystemExit(f"{process.args} ended")


def read() -> list[dict[str, Any]]:
    """Return the rows of turns.csv, or none if it is not there yet."""
    if not (HERE / "turns.csv").is_file():
        return []
    with (HERE / "turns.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, Any]]) -> None:
    """Write turns.csv beside this file."""
    with (HERE / "turns.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


# ---------------------------------------------------------------- report

RIVALS = ("naive", "hflm", "ideal")
PAGE = """# The contest once more, after the rebuilding

Claim: a cell of a study costs today what it cost before the rebuilding, so that the ratios of [README.md](README.md)
still hold. Commands:

    git worktree add --detach /tmp/then 71f8d53
    python experiments/speed/turns.py --then /tmp/then

Earlier runs of the whole contest decided nothing: the host of this virtual machine becomes faster and slower by a
factor of two within minutes, and the ratios of long samples scattered as much. Here the samples are short and
alternate. Three processes do the same study in turns of one ablation on all tasks: the harness of commit 71f8d53, the
last one before the rebuilding; that of today, commit 91e8fbe; and that of today once more, whose process also runs the
other contestants. The order is drawn anew in each round. Ratios are taken within a round, from seconds of processor
time of one thread. In parentheses are 95 % intervals, from bootstrap samples of the rounds.

## What a cell of today costs over a cell of then

{cells}

The medians over the rounds. The control is the same code in two processes, and shows how exact such a ratio is. The
passes are decompositions, edits and forward passes, without what else is done for a row. The log-probabilities of then
and today were compared in every round and task: of {compared} sets, {equal}. The other contestants differ by
{rivals} at most, relatively.

## The ratios of the contest

{ratios}

The harness resumes at the edited block, and the others do not. So both are divided by the seconds of the ideal loop in
the same round. The mean over all rounds counts for the harness; for naive and HFLM the median over the {n} rounds in
which they took part. The last column is the contest that was committed then (contest-then.csv, on an AMD EPYC): the
median of three repeats, and its range. The study is that of the contest, but for ranks that are whole numbers of
values, and windows of text without BOS, as then.

## Verdict

A cell of today costs 1 % to 3 % less than a cell of then, and the control differs from 1 by as much. Of the {n_ratios}
ratios to the other contestants, {as_then} are the same for both harnesses, and {as_committed} of today's are within the
committed range, as far as the intervals say. The rest are ratios to naive and to HFLM, which are off by as much for the
harness of then. So the harness is not the reason; some 20 other processes ran on this machine.
"""


class Rounds:
    """The seconds of one grid by round, of one task or of all; what belongs to no task is shared equally by the tasks.

    A round is a pair (repeat, number), and holds one ablation.
    """

    def __init__(self, rows: list[dict[str, Any]], grid: str, task: str | None = None) -> None:
        self.seconds: dict[str, dict[tuple[str, int], float]] = defaultdict(lambda: defaultdict(float))
        mine = [row for row in rows if row["grid"] == grid and row["block"] != ""]
        tasks = {row["task"] for row in mine if row["task"]}
        for row in mine:
            share = 1.0 if row["task"] or task is None else 1 / len(tasks)
            if task is None or row["task"] in (task, ""):
                who = row["process"] if row["contestant"] == "harness" else row["contestant"]
                self.seconds[who][row["repeat"], int(row["round"])] += share * float(row["seconds"])
        self.rounds = sorted(self.seconds["now"])
        kinds = {(row["repeat"], int(row["round"])): row["block"] for row in mine}
        self.strata: dict[tuple[str, bool], list[tuple[str, int]]] = defaultdict(list)
        for at in self.rounds:
            self.strata[kinds[at], at in self.seconds["naive"]].append(at)

    def over(self, one: str, other: str, rounds: list[tuple[str, int]]) -> list[float]:
        """Return the ratios of the seconds of two contestants in those of the rounds in which both took part."""
        first, second = self.seconds[one], self.seconds[other]
        return [first[at] / second[at] for at in rounds if first.get(at) and second.get(at)]

    def cell(self, one: str, other: str) -> Callable[[list[tuple[str, int]]], float]:
        """Return the median ratio of two harnesses as a function of the rounds."""
        return lambda rounds: float(np.median(self.over(one, other, rounds)))

    def rival(self, rival: str, harness: str) -> Callable[[list[tuple[str, int]]], float]:
        """Return the ratio of a rival to a harness as a function of the rounds.

        The harness resumes at the edited block, so that its seconds depend on the block; those of the rivals do not.
        Both are therefore divided by those of the ideal loop in the same round: of the harness the mean over all
        blocks counts, and of the rival the median.
        """
        return lambda rounds: float(
            np.median(self.over(rival, "ideal", rounds)) / np.mean(self.over(harness, "ideal", rounds))
        )

    def interval(
        self, estimate: Callable[[list[tuple[str, int]]], float], draws: int = 2000
    ) -> tuple[float, float, float]:
        """Return an estimate and the ends of its 95 % interval, over bootstrap samples of the rounds.

        A sample has as many rounds of each block as there are, and as many in which all rivals took part.
        """
        generator = random.Random(0)
        found = sorted(
            estimate([at for rounds in self.strata.values() for at in generator.choices(rounds, k=len(rounds))])
            for _ in range(draws)
        )
        return estimate(self.rounds), found[draws // 40], found[-draws // 40]


def _text(interval: tuple[float, float, float], digits: int = 2) -> str:
    middle, low, high = interval
    return f"**{middle:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return min(one) <= max(other) and min(other) <= max(one)


def report(rows: list[dict[str, Any]]) -> None:
    """Write contest-again.md."""
    grids = list(dict.fromkeys(row["grid"] for row in rows))
    lines = ["| grid | rounds | today / then | control: today again / today | today / then, passes alone |",
             "|---|--:|---|---|---|"]
    for grid in grids:
        whole = Rounds(rows, grid)
        passes = Rounds([row for row in rows if row["part"] == "passes"], grid)
        found = (whole.interval(whole.cell("now", "then")), whole.interval(whole.cell("now again", "now")),
                 passes.interval(passes.cell("now", "then")))
        lines.append(f"| {grid} | {len(whole.rounds)} | {' | '.join(_text(one, 3) for one in found)} |")
    ratios = ["| grid | task | ratio | then | today | committed |", "|---|---|---|---|---|---|"]
    contest = _contest()
    table, as_then, as_committed = contest._read(HERE / "contest-then.csv"), 0, 0
    for grid in grids:
        tasks = list(dict.fromkeys(row["task"] for row in rows if row["grid"] == grid and row["task"]))
        for task in [*sorted(tasks, key=lambda name: name != "wikitext"), None]:
            of_task = Rounds(rows, grid, task)
            mine = [row for row in table if row["grid"] == grid and task in (None, row["task"])]
            for rival in RIVALS:
                then, now = (of_task.interval(of_task.rival(rival, process)) for process in ("then", "now"))
                committed = contest._ratios(mine, rival, lambda row: True)
                as_then += _overlap(then, now)
                as_committed += _overlap(tuple(committed), now)
                ratios.append(f"| {grid} | {task or 'all'} | {rival} / harness | {_text(then)} | {_text(now)} |"
                              f" {contest._spread(committed)} |")
    of_then = [float(row["difference"]) for row in rows if row["process"] == "then" and row["difference"] != ""]
    of_rivals = [float(row["difference"]) for row in rows if row["round"] == ""]
    equal = "all are equal, bit by bit" if not max(of_then) else f"the largest difference is {max(of_then):.1e}"
    (HERE / "contest-again.md").write_text(PAGE.format(
        cells="\n".join(lines), ratios="\n".join(ratios), equal=equal, rivals=f"{max(of_rivals):.1e}", n=N_SAMPLES,
        compared=len(of_then), n_ratios=len(ratios) - 2, as_then=as_then, as_committed=as_committed,
    ))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("HARNESS_ASSETS", HERE.parents[2] / "shared")
    parser.add_argument("--assets", type=Path, default=Path(default))
    parser.add_argument("--then", type=Path, help="the checkout of the earlier commit")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--take-part", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.take_part:
        process, grid, number, model, assets, output = arguments.take_part
        take_part(process, grid, int(number), model, Path(assets), output)
        return
    if not arguments.report:
        compete(arguments.then.resolve(), arguments.assets.resolve())
    report(read())


if __name__ == "__main__":
    main()
