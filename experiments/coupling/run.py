"""Block coupling of trained, random, growing and ablated models, and what it costs; see README.md.

    python experiments/coupling/run.py --assets ../shared

One process of one thread. A part whose CSV file is there is not done again (delete it to repeat the part), and the runs
of the harness below results/coupling_experiment/ resume by themselves. Tables and figures go beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import cost  # noqa: E402
import exactness  # noqa: E402
import figures  # noqa: E402
import pandas as pd  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402

from harness.cli import main as harness  # noqa: E402
from harness.measurements import COUPLING, compose_settings  # noqa: E402
from harness.measurements.coupling.summary import of_pairs, of_trajectories, summarise, with_label  # noqa: E402
from harness.measurements.coupling.tables import read_coupling  # noqa: E402
from harness.models.loading import load  # noqa: E402
from harness.tables.store import read_table  # noqa: E402

K = {"stories260K": [5, 10], "stories15M": [10, 30, 50], "SmolLM2": [10, 30, 50]}
PROMPTS = {"stories260K": 16, "stories15M": 16, "SmolLM2": 4}
RANDOM_PROMPTS = {"stories260K": 8, "stories15M": 4, "SmolLM2": 2}
RANDOM_SEEDS = {"stories260K": 4, "stories15M": 2, "SmolLM2": 2}
LINE_SEEDS = {"stories260K": 20, "stories15M": 5, "SmolLM2": 2}
SOME_BLOCKS = {"stories15M": [0, 3, 5], "SmolLM2": [0, 15, 29]}
TRAINING_SEEDS = (0, 1, 2)


class Experiment:
    """Where everything is. assets: the folder with models/ and data/. runs: the folder of the harness's runs."""

    def __init__(self, assets: Path, runs: Path) -> None:
        self.assets, self.runs = assets.resolve(), runs.resolve()

    def model(self, name: str) -> list[str]:
        """Settings of a model."""
        folder = self.assets / "models"
        words = ["model=pretrained", "model.dtype=float32", "model.device=cpu"]
        if name == "SmolLM2":
            return [*words, f"model.name={folder}", "model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf"]
        return [*words, f"model.name={folder / name}"]

    def text(self, name: str, window: int | None = None) -> list[str]:
        """Settings of the text on which a model is measured."""
        if name == "SmolLM2":
            data = self.assets / "data" / "wikitext-2-raw" / "test.jsonl"
            return ["task=wikitext", f"tasks.wikitext.data_files={data}", f"tasks.wikitext.window={window or 49}"]
        data = self.assets / "data" / "tinystories" / "validation_first_stories.txt"
        return ["task=text", f"tasks.text.data_files={data}", f"tasks.text.window={window or 64}"]

    def plan(self, name: str, n: int, window: int | None = None) -> tuple[object, list[torch.Tensor]]:
        """The settings of a model, and n prompts of it as int64 [1, T]."""
        settings = compose_settings("coupling", [*self.model(name), *self.text(name, window), f"prompts={n}", "k=[5]"])
        return settings.model, [torch.tensor([unit.prompt.tokens]) for unit in COUPLING.units.plan(settings).units]

    def coupling(self, folder: str, *words: str) -> Path:
        """Run what is missing of harness coupling, and return its folder."""
        out = self.runs / folder
        if harness(["coupling", "--quiet", *words, "threads=1", f"output={out}"]) != 0:
            raise SystemExit(f"{out}: harness coupling failed")
        return out


def part(name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Make a table and write it, or read it if it is there."""
    path = HERE / f"{name}.csv"
    if not path.exists():
        print(name, flush=True)
        exactness.write(make(), path)
    return pd.read_csv(path)


def exact_parts(experiment: Experiment) -> None:
    part("families", exactness.families)

    def loaded(names: list[str]) -> dict:
        found = {}
        for name in names:
            settings, prompts = experiment.plan(name, 2)
            found[name] = (load(settings, progress=False), prompts)
        return found

    names = list(SOME_BLOCKS)
    part("real_models", lambda: exactness.real_models(loaded(names), SOME_BLOCKS))
    part("krylov", lambda: exactness.krylov(loaded(names), SOME_BLOCKS))
    part("null_simulation", lambda: exactness.null_simulation(loaded(names)))
    plans = {name: experiment.plan(name, 4) for name in K}
    part("random_lines", lambda: exactness.random_lines(
        {name: one[0] for name, one in plans.items()}, {name: one[1] for name, one in plans.items()}, LINE_SEEDS))


def trial(experiment: Experiment, name: str) -> pd.DataFrame:
    """Trained and random weights of one model: one row for each K and choice of pairs."""
    words = [*experiment.model(name), *experiment.text(name), f"k={K[name]}".replace(" ", "")]
    folders = [("trained", experiment.coupling(f"{name}-trained", *words, f"prompts={PROMPTS[name]}"))]
    for seed in range(RANDOM_SEEDS[name]):
        folders.append((f"random {seed}", experiment.coupling(
            f"{name}-random-{seed}", *words, "init=random", f"seed={seed}", f"prompts={RANDOM_PROMPTS[name]}")))
    rows = []
    for weights, folder in folders:
        summary = summarise(with_label(read_coupling(folder, "couplings")))
        ways = of_trajectories(with_label(read_coupling(folder, "trajectories"))).iloc[0]
        rows.append(summary.assign(weights=weights, model=name, **{
            key: ways[key] for key in ("lss", "lss_stderr", "lss_null", "growth_mean", "growth_mean_stderr",
                                       "expodistance", "expodistance_stderr")}))
    return pd.concat(rows)


def growing(experiment: Experiment) -> pd.DataFrame:
    """Coupling, line-shape score and loss over trainings from several seeds."""
    rows = []
    for seed in TRAINING_SEEDS:
        folder = experiment.runs / f"training-{seed}"
        log = folder / "training.csv"
        if not log.exists():
            data = experiment.assets / "data" / "tinystories"
            if not (folder / f"step{training.STEPS[-1]}" / "model.safetensors").exists():
                training.train(experiment.assets / "models" / "stories260K", data / "tinystories_1000_train.jsonl",
                               folder, seed)
            exactness.write(training.losses(folder, data / "validation_first_stories.txt", seed), log)
        steps = ",".join(f"step{step}" for step in training.STEPS)
        out = experiment.coupling(f"training-{seed}-coupling", "model=pretrained", f"model.name={folder}",
                                  "model.dtype=float32", "model.device=cpu", *experiment.text("stories260K"),
                                  f"revisions=[{steps}]", "k=[5,10]", "prompts=8")
        summary = summarise(with_label(read_coupling(out, "couplings")))
        summary["step"] = summary["weights"].str.removeprefix("step").astype(int)
        ways = of_trajectories(with_label(read_coupling(out, "trajectories")))
        ways["step"] = ways["weights"].str.removeprefix("step").astype(int)
        table = summary.merge(ways[["step", "lss", "lss_stderr", "lss_null", "growth_mean"]], on="step")
        rows.append(table.merge(pd.read_csv(log)[["step", "nll", "tokens"]], on="step").assign(seed=seed))
    return pd.concat(rows).drop(columns="weights")


def ablations(experiment: Experiment, name: str = "stories260K") -> pd.DataFrame:
    """What removing the largest and the smallest tenth of each layer type does to coupling and to perplexity."""
    region = ["target=type", "region=fraction", "region.kinds=[large,small]", "region.values=[0.1]"]
    out = experiment.coupling(f"{name}-ablations", *experiment.model(name), *experiment.text(name), *region, "k=[5]",
                              "prompts=8", "normality=false")
    study = experiment.runs / f"{name}-perplexity"
    if harness(["run", "--quiet", *experiment.model(name), *experiment.text(name, 256), "tasks.text.limit=16", *region,
                "region.controls=[none]", f"output={study}"]) != 0:
        raise SystemExit(f"{study}: harness run failed")
    couplings = with_label(read_coupling(out, "couplings"))
    from harness.measurements import ABLATION

    metrics = read_table(study, ABLATION.tables, "metrics")
    metrics = metrics[metrics["metric"] == "nll"].set_index(["target", "region"])
    ways = with_label(read_coupling(out, "trajectories")).groupby(["weights", "prompt_id"])["lss"].mean()
    rows = []
    for pairs in ("all", "neighbours"):
        per_prompt = of_pairs(couplings, pairs).groupby(["weights", "prompt_id"])["coupling"].mean()
        unedited = per_prompt["trained"]
        for weights, group in couplings.groupby("weights", sort=False):
            if weights == "trained":
                continue
            target, label = group[["target", "region"]].iloc[0]
            delta, lines = per_prompt[weights] - unedited, ways[weights] - ways["trained"]
            cell = metrics.loc[(target, label)]
            rows.append({
                "layer_type": target, "region": label, "pairs": pairs, "coupling_unedited": unedited.mean(),
                "coupling": per_prompt[weights].mean(), "coupling_delta": delta.mean(),
                "coupling_delta_stderr": delta.sem(),
                "lss_delta": lines.mean(), "lss_delta_stderr": lines.sem(), "nll_unedited": cell["baseline"],
                "nll_delta": cell["delta"], "nll_delta_stderr": cell["delta_stderr"],
                "energy_removed": cell["energy_removed"],
            })  # fmt: skip
    return pd.DataFrame(rows)


def costs(experiment: Experiment) -> None:
    prompts = {length: experiment.plan("SmolLM2", 2, length + 1)[1] for length in (48, 211)}
    settings = experiment.plan("SmolLM2", 2)[0]

    def jacobians() -> pd.DataFrame:
        return cost.jacobians(load(settings, progress=False), prompts, {48: [0, 15], 211: [15]})

    part("cost_pairs", lambda: cost.pairs(load(settings, progress=False), prompts[48]))
    part("cost_jacobians", jacobians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--runs", type=Path, default=ROOT / "results" / "coupling_experiment")
    parser.add_argument("--only", nargs="+", metavar="PART", help="trial-<model>, training, ablations, exactness, cost")
    arguments = parser.parse_args()
    experiment = Experiment(arguments.assets, arguments.runs)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], object]] = {
        **{f"trial-{name}": lambda name=name: part(f"trial-{name}", lambda: trial(experiment, name)) for name in K},
        "training": lambda: part("training", lambda: growing(experiment)),
        "ablations": lambda: part("ablations", lambda: ablations(experiment)),
        "ablations-stories15M": lambda: part("ablations-stories15M", lambda: ablations(experiment, "stories15M")),
        "exactness": lambda: exact_parts(experiment),
        "cost": lambda: costs(experiment),
    }
    for name in arguments.only or parts:
        parts[name]()
    draw()
    tables.write_tables(HERE)


def draw() -> None:
    """Draw the figures of the tables that are there."""
    there = {path.stem: pd.read_csv(path) for path in HERE.glob("*.csv")}
    if "training" in there:
        figures.training_figure(there["training"], HERE / "training.png")
    for name in ("ablations", "ablations-stories15M"):
        if name in there:
            figures.ablation_figure(there[name], HERE / f"{name}.png")
    trials = [there[f"trial-{name}"] for name in K if f"trial-{name}" in there]
    if trials:
        figures.trial_figure(pd.concat(trials), HERE / "trial.png")


if __name__ == "__main__":
    main()
