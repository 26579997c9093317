"""experiments/recall on two tiny models: what it plans, and that its tables are the studies' numbers."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.measurements import compose_settings
from harness.measurements.ablation.tables import read_metrics
from tests.studies import run_settings

FOLDER = Path(__file__).parents[2] / "experiments/recall"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(FOLDER))
    try:
        import report
        import run as script
    finally:
        sys.path.remove(str(FOLDER))
    yield script, report
    del sys.modules["run"], sys.modules["report"]


def test_every_job_is_one_study_of_the_product(experiment):
    script, _ = experiment
    jobs = [job for group in script.trainings() for job in group]
    assert len({job.folder for job in jobs}) == len(jobs)
    assert {job.noise for job in jobs} == set(script.NOISE) and {job.n_triggers for job in jobs} == set(script.TRIGGERS)
    over_training = {(job.seed, job.checkpoint) for job in jobs if job.is_default}
    assert over_training == {(seed, step) for seed in script.SEEDS for step in script.CHECKPOINTS}
    assert len(script.SEEDS) >= 5
    config = compose_settings("ablation", jobs[0].overrides(Path("somewhere")))
    assert (config.model.recall.seed, config.model.recall.noise) == (jobs[0].seed, jobs[0].noise)
    assert config.model.recall.steps == script.CHECKPOINTS[-1]
    # 0, 1, 2, 4, 10 % and 20 % of the rank
    dim = config.model.recall.dim
    assert config.region.rule.intervals == [f"{kept}:" for kept in (0, 1, 2, 4, int(0.1 * dim), int(0.2 * dim))]
    published = compose_settings("ablation", ["experiment=recall_published"])
    assert published.region.rule.intervals == [f"{kept}:" for kept in (0, 1, 2, 4, 25, 51)]
    recall = published.model.recall
    assert (recall.dim, recall.context_length, recall.batch_size, recall.steps) == (256, 256, 512, 5000)


def test_report_of_two_seeds(experiment, tmp_path):
    script, report = experiment
    jobs = [script.Job(0.5, 1, "mlp", seed, 2) for seed in (0, 1)]
    studies = tmp_path / "studies"
    for job in jobs:
        run_settings(compose_settings("ablation", [
            *job.overrides(studies), "model.recall.steps=2", "model.recall.context_length=16",
            "model.recall.batch_size=4", "tasks.recall.n_sequences=20",
        ]))
    output = tmp_path / "output"
    output.mkdir()
    report.write_report(jobs, studies, output)
    assert {path.name for path in output.iterdir()} == {
        "summary.csv", "gains.csv", "tables.md", "accuracy_against_rank.png", "probes.png"
    }
    rows = report.load(jobs, studies)
    assert len(rows) == 2 * (10 * 6 + 1)
    other = rows.assign(noise=0.3)
    report.draw_sweeps(report.over_seeds(pd.concat([rows, other])), 2, output / "sweeps.png")
    assert (output / "sweeps.png").stat().st_size > 10_000
    assert len(report.load([*jobs, script.Job(0.5, 1, "mlp", 2, 2)], studies)) == len(rows)  # one that did not run

    def from_study(seed, target, region, metric):
        table = read_metrics(studies / jobs[seed].folder)
        match = (table.target == target) & (table.region == region) & (table.metric == metric)
        return table[match].value.item()

    removed = np.array([from_study(seed, "1.up_proj", "index 0:", "p_noise") for seed in (0, 1)])
    kept_four = [from_study(seed, "1.o_proj", "index 4:", "p_noise") for seed in (0, 1)]
    whole = np.array([from_study(seed, "baseline", "none", "p_noise") for seed in (0, 1)])
    summary = report.over_seeds(rows).set_index(["matrix", "rank"])
    assert summary.loc[("1.up_proj", 0), "p_noise_mean"] == pytest.approx(removed.mean(), rel=1e-12)
    assert summary.loc[("1.o_proj", 4), "p_noise_mean"] == pytest.approx(np.mean(kept_four), rel=1e-12)
    assert summary.loc[("none", 64), "p_noise_std"] == pytest.approx(whole.std(ddof=1), rel=1e-9)
    gained = report.gains(rows, 2).set_index(["matrix", "rank"]).loc[("1.up_proj", 0)]
    assert gained["p_noise_mean"] == pytest.approx((removed - whole).mean(), rel=1e-9)
    assert gained["p_noise_std"] == pytest.approx((removed - whole).std(ddof=1), rel=1e-9)
    assert gained["n_seeds"] == 2
    text = (output / "tables.md").read_text()
    assert f"{whole.mean():.3f} ± {whole.std(ddof=1):.3f}" in text
