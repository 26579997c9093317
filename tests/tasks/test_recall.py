"""The recall task's metrics against a direct computation from the model's full logits."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.requests import Scores, TaskContext
from harness.models.recall import process_of, recall_config
from harness.models.recall_data import EVALUATION_STREAM, TRAINING_STREAM, sample
from harness.models.recall_training import train
from harness.models.settings import RecallModelSettings
from harness.tasks.recall import RecallTask
from tests.tasks.asking import asked

SETTINGS = RecallModelSettings(dim=32, hidden_dim=48, context_length=32, batch_size=32, steps=30, learning_rate=5e-3)


@pytest.fixture(scope="module")
def model():
    return train(SETTINGS, progress=False)


def context(model_config):
    return TaskContext(None, model_config, 32, "causal")


def scores_of(model, requests):
    """Each request alone through the whole model."""
    logprob, greedy, offsets = [], [], [0]
    for request in requests:
        with torch.no_grad():
            logits = model(torch.from_numpy(request.tokens)[None]).logits[0].double().numpy()[request.positions]
        normal = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logprob.append(normal[np.arange(len(normal)), request.targets])
        greedy.append(logits.argmax(axis=1) == request.targets)
        offsets.append(offsets[-1] + len(request.targets))
    return Scores(np.concatenate(logprob), np.concatenate(greedy), None, np.asarray(offsets))


@pytest.mark.parametrize("noise, noise_token", [(None, "own"), (0.2, "!")])
def test_metrics_are_means_over_scored_positions(model, noise, noise_token):
    if noise_token != "own":
        model = train(replace(SETTINGS, noise_token=noise_token, n_triggers=2), progress=False)
    config = RecallTask(n_sequences=60, noise=noise, seed=3)
    task = config.prepare("recall", context(model.config))
    metrics = task.measure(scores_of(model, task.requests))

    process, expected = process_of(model.config), {}
    sets = []
    for which, probability in ((0, 0.0), (1, 0.5 if noise is None else noise)):
        rng = np.random.default_rng([EVALUATION_STREAM, 3, which])
        sets.append(sample(process, 60, 32, rng, noise=probability))
    kept = sets[0].scored.any(axis=1) & sets[1].scored.any(axis=1)
    assert task.example_ids == [str(i) for i in np.flatnonzero(kept)] and 0 < kept.sum() < 60
    for suffix, batch in zip(("clean", "noisy"), sets):
        tokens, scored = torch.from_numpy(batch.tokens[kept]), torch.from_numpy(batch.scored[kept])
        with torch.no_grad():
            logits = model(tokens).logits[scored].double()
        probability = logits.softmax(dim=-1)
        targets, labels = (torch.from_numpy(x[kept])[scored] for x in (batch.targets, batch.labels))
        expected[f"accuracy_{suffix}"] = (logits.argmax(dim=-1) == targets).double().mean().item()
        if suffix == "clean":
            expected["p_target"] = probability.gather(1, targets[:, None]).mean().item()
            expected["p_noise"] = probability[:, process.noise_token_id].mean().item()
            expected["cross_entropy"] = torch.nn.functional.cross_entropy(logits, labels).item()
        else:
            expected["cross_entropy_noisy"] = torch.nn.functional.cross_entropy(logits, labels).item()
        weight = metrics[f"accuracy_{suffix}"].weight
        assert np.array_equal(weight, batch.scored[kept].sum(axis=1)), "one example per sequence"
    assert metrics.keys() == expected.keys()
    for name, scores in metrics.items():
        assert len(scores.score) == len(scores.weight) == len(task.example_ids)
        assert scores.score.sum() / scores.weight.sum() == pytest.approx(expected[name], rel=1e-5), name
        assert scores.higher_is_better == (name.startswith("accuracy") or name == "p_target")


def test_sequences_are_those_of_no_training_step_and_repeat():
    model_config = recall_config(SETTINGS)
    one, two = (RecallTask(n_sequences=20).prepare("recall", context(model_config)) for _ in range(2))
    other = RecallTask(n_sequences=20, seed=1).prepare("recall", context(model_config))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one.requests, two.requests))
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(one.requests, other.requests))
    training = sample(process_of(model_config), 32, 32, np.random.default_rng([TRAINING_STREAM, 0, 0]))
    seen = {tokens.tobytes() for tokens in training.tokens}
    assert not any(request.tokens.tobytes() in seen for request in one.requests)
    json.dumps(one.protocol)
    assert one.protocol["noise"] == 0.5 and not one.needs_rank


@pytest.mark.parametrize(
    "model_config, task, message",
    [
        (SimpleNamespace(model_type="gpt2"), RecallTask(), "tasks.mine: .*model.name: recall.*gpt2"),
        (recall_config(RecallModelSettings(context_length=1)), RecallTask(n_sequences=5), "tasks.mine: none of 5"),
    ],
)
def test_what_cannot_be_asked(model_config, task, message):
    with pytest.raises(InputError, match=message):
        task.prepare("mine", context(model_config))


@pytest.mark.parametrize("kind", ["recall", "recall_probes"])
@pytest.mark.parametrize("key, value, right", [
    ("n_sequences", 0, "at least 2"), ("n_sequences", 1, "at least 2"), ("noise", -0.1, "at least 0 and at most 1"),
    ("noise", 1.5, "at least 0 and at most 1"), ("seed", -1, "at least 0"),
])  # fmt: skip
def test_settings_that_cannot_be(kind, key, value, right):
    with pytest.raises(InputError, match=f"^tasks.mine.{key}: {value} is wrong; it must be {right}$"):
        asked("mine", kind=kind, **{key: value})
