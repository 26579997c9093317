"""The evaluate.Metric subclasses, offline, against numpy, scipy and torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from harness.evaluation import metrics
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import estimate

RNG = np.random.default_rng(0)
COUNT = RNG.integers(10, 90, 12)
NLL = COUNT * (1.5 + RNG.random(12))
A, B = RNG.random(12), RNG.random(12)

CASES = [
    (metrics.TokenPerplexity, {"nll": NLL, "tokens": COUNT}, "token_perplexity", np.exp(NLL.sum() / COUNT.sum())),
    (metrics.WordPerplexity, {"nll": NLL, "words": COUNT}, "word_perplexity", np.exp(NLL.sum() / COUNT.sum())),
    (metrics.BytePerplexity, {"nll": NLL, "bytes": COUNT}, "byte_perplexity", np.exp(NLL.sum() / COUNT.sum())),
    (metrics.BitsPerByte, {"nll": NLL, "bytes": COUNT}, "bits_per_byte", np.log2(np.e) * NLL.sum() / COUNT.sum()),
    (metrics.MeanAccuracy, {"correct": A > B}, "accuracy", np.mean(A > B)),
    (metrics.LogitDifference, {"answer": A, "other": B}, "logit_difference", np.mean(A - B)),
    (metrics.PairedDelta, {"ablated": A, "baseline": B, "weight": np.ones(12)}, "delta", np.mean(A - B)),
]


@pytest.mark.parametrize(("metric", "inputs", "name", "expected"), CASES, ids=[case[2] for case in CASES])
def test_at_once_in_batches_and_one_by_one(metric, inputs, name, expected):
    whole = metric().compute(**{key: value.tolist() for key, value in inputs.items()})
    assert whole[name] == pytest.approx(expected, rel=1e-12)
    assert whole["stderr"] > 0
    batched = metric()
    batched.add_batch(**{key: value[:5] for key, value in inputs.items()})
    batched.add_batch(**{key: torch.from_numpy(value[5:]) for key, value in inputs.items()})
    assert batched.compute() == whole
    single = metric()
    for i in range(12):
        single.add(**{key: value[i] for key, value in inputs.items()})
    assert single.compute() == whole


def test_errors_are_scipys():
    accuracy = metrics.MeanAccuracy().compute(correct=(A > B).astype(float))
    assert accuracy["stderr"] == pytest.approx(scipy.stats.sem(A > B), rel=1e-12)
    assert accuracy["n"] == 12
    paired = metrics.PairedDelta().compute(ablated=A, baseline=B, weight=np.ones(12))
    assert paired["p_value"] == pytest.approx(scipy.stats.ttest_rel(A, B).pvalue, rel=1e-10)


def test_paired_perplexities():
    """Influences are derivatives by the weight of each example, which autograd knows too."""
    found = metrics.PairedDelta().compute(ablated=NLL * 1.1, baseline=NLL, weight=COUNT, transform="exp")
    ratio = NLL.sum() / COUNT.sum()
    assert found["delta"] == pytest.approx(np.exp(1.1 * ratio) - np.exp(ratio), rel=1e-12)
    share = torch.ones(12, dtype=torch.float64, requires_grad=True)
    loss = (share * torch.from_numpy(NLL)).sum() / (share * torch.from_numpy(COUNT)).sum()
    (torch.exp(1.1 * loss) - torch.exp(loss)).backward(retain_graph=True)
    stderr = 12 * share.grad.std().item() / np.sqrt(12)
    assert found["stderr"] == pytest.approx(stderr, rel=1e-10)
    share.grad = None
    (1.1 * loss - loss).backward()  # the p-value is that of the difference of the logarithms
    stderr = 12 * share.grad.std().item() / np.sqrt(12)
    freedom = estimate(ExampleScores(NLL, COUNT)).freedom  # fewer than 11, because COUNT varies
    assert 2 < freedom < 11
    assert found["p_value"] == pytest.approx(2 * scipy.stats.t(freedom).sf(0.1 * ratio / stderr), rel=1e-8)


def test_the_core_does_not_load_evaluate():
    """Tasks, requests and statistics are imported with torch and numpy alone."""
    tasks = "data text ioi factual lambada blimp tokenization registry".split()
    names = ["harness.evaluation.statistics", "harness.evaluation.requests", *(f"harness.tasks.{one}" for one in tasks)]
    code = (
        f"import sys, {', '.join(names)}\n"
        "heavy = {'evaluate', 'datasets', 'pandas', 'pyarrow', 'lm_eval', 'scipy', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_lines_of_the_docs_run(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (code,) = re.findall(r"(?s)```python\n(.*?)```", page)
    exec(code, {})
    alone, paired = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert alone["token_perplexity"] == pytest.approx(np.exp(648.8 / 189)) and alone["n"] == 3
    assert paired["delta"] == pytest.approx(np.exp(659.6 / 189) - np.exp(648.8 / 189)) and paired["stderr"] > 0
    for name in dir(metrics):
        one = getattr(metrics, name)
        if isinstance(one, type) and issubclass(one, metrics._InMemory) and one is not metrics._InMemory:
            assert f"`{name}`" in page
