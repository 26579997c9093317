"""Feed-forward layers store the noise, attention the recall: the claim of arXiv 2406.03068 on the embedded model.

    python experiments/recall/run.py                 # 2 processes of one thread each
    python experiments/recall/run.py --workers 8     # one training per process
    python experiments/recall/run.py --report-only   # tables and figures from what is there

Studies go to results/recall_experiment/ (--studies for elsewhere), trained models to the cache beside them; what is
there is not done again. Tables and figures go beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2, 3, 4)
CHECKPOINTS = (0, 50, 100, 150, 200, 300, 400)
NOISE = (0.1, 0.3, 0.5, 0.7, 0.9)
TRIGGERS = (1, 3, 10)
DEFAULT = {"noise": 0.5, "n_triggers": 1, "feed_forward": "mlp"}


@dataclass(frozen=True)
class Job:
    """One study: one trained model and the ablations of its matrices."""

    noise: float
    n_triggers: int
    feed_forward: str
    seed: int
    checkpoint: int

    @property
    def is_default(self) -> bool:
        return all(getattr(self, key) == value for key, value in DEFAULT.items())

    @property
    def folder(self) -> str:
        return (
            f"noise-{self.noise:g}_triggers-{self.n_triggers}_{self.feed_forward}_seed-{self.seed}"
            f"_step-{self.checkpoint:04d}"
        )

    def overrides(self, studies: Path) -> list[str]:
        # Beyond the default only the feed-forward layers are cut: they are what the claim is about.
        layers = "all" if self.is_default else "attn" if self.feed_forward == "none" else "mlp"
        return [
            "experiment=recall",
            f"output={studies / self.folder}",
            f"model.recall.cache_dir={studies / 'models'}",
            f"model.recall.noise={self.noise}",
            f"model.recall.n_triggers={self.n_triggers}",
            f"model.recall.feed_forward={self.feed_forward}",
            f"model.recall.seed={self.seed}",
            f"model.recall.checkpoint={self.checkpoint}",
            f"target.layer_types=[{layers}]",
            "model.device=cpu",
            "runtime.threads=1",
            "runtime.examples=false",
        ]


def trainings() -> list[list[Job]]:
    """The jobs of one training run together, in the order of their checkpoints. The noise levels come first, then the
    default over training, then the other settings; the seeds of one kind follow each other."""
    last = CHECKPOINTS[-1]

    def finished(settings: list[dict]) -> list[list[Job]]:
        return [[Job(**setting, seed=seed, checkpoint=last)] for seed in SEEDS for setting in settings]

    return [
        *finished([DEFAULT | {"noise": noise} for noise in NOISE]),
        *([Job(**DEFAULT, seed=seed, checkpoint=step) for step in CHECKPOINTS[:-1]] for seed in SEEDS),
        *finished([DEFAULT | {"feed_forward": kind} for kind in ("linear", "none")]),
        *finished([DEFAULT | {"n_triggers": n} for n in TRIGGERS if n != DEFAULT["n_triggers"]]),
    ]


def run_training(jobs: list[Job], studies: Path) -> float:
    """Train and ablate at every checkpoint; returns the CPU seconds it took."""
    from harness.engine.run import RunOptions, run
    from harness.measurements import ABLATION, compose_settings
    from harness.models.recall_training import ensure_trained

    started = time.process_time()
    for job in jobs:
        settings = compose_settings(ABLATION, job.overrides(studies))
        ensure_trained(settings.model.recall, progress=False)
        run(ABLATION, settings, RunOptions(progress=False, say=lambda line: None, tidy=True))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--studies", type=Path, default=Path("results/recall_experiment"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--report-only", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    groups = trainings()
    if not arguments.report_only:
        started, cpu = time.perf_counter(), 0.0
        with ProcessPoolExecutor(arguments.workers) as pool:
            futures = {pool.submit(run_training, jobs, arguments.studies.resolve()): jobs[0] for jobs in groups}
            for i, future in enumerate(as_completed(futures)):
                cpu += future.result()
                print(f"{i + 1}/{len(groups)} {futures[future].folder}: {cpu:.0f} CPU seconds so far,"
                      f" {time.perf_counter() - started:.0f} s on the clock", file=sys.stderr, flush=True)
    from report import write_report

    write_report([job for jobs in groups for job in jobs], arguments.studies, arguments.output)


if __name__ == "__main__":
    main()
