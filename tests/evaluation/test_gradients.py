"""Derivatives to singular values against finite differences in float64, and the prediction they make."""

import pytest
import torch

from harness.errors import InputError
from harness.evaluation import gradients
from harness.evaluation.gradients import first_gradients, singular_gradients
from harness.evaluation.requests import DirectTask
from harness.evaluation.statistics import estimate
from harness.models.loading import loaded_from
from harness.spectral.decomposition import decompose
from harness.tasks.factual import FactualTask
from harness.tasks.ioi import IoiTask
from tests.evaluation.reference import score, tiny

FACTS = [("The dog was named", "Max"), ("Anna gave a ball to", "Ben"), ("They went to", "the")]


def _task(tmp_path, context):
    import json

    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "attribute": a}) for p, a in FACTS))
    return FactualTask(data_files=str(path)).prepare("facts", context)


@pytest.fixture
def setting(tmp_path):
    model, context = tiny()
    # float64, so that a difference quotient of step 1e-4 has eight digits; GPT-2 stores fused, transposed matrices
    loaded = loaded_from(model.double().requires_grad_(False), context.tokenizer)
    return loaded, _task(tmp_path, context)


@pytest.mark.parametrize("metric", ["logprob", "p_target"])
def test_every_kind_of_matrix_against_finite_differences(setting, metric, monkeypatch):
    monkeypatch.setattr(gradients, "BATCH_TOKENS", 20)
    loaded, task = setting
    decompositions = {m.name: decompose(m.read(loaded.model)) for m in loaded.matrices}
    (found,) = singular_gradients(loaded, task, [metric], loaded.matrices, lambda m: decompositions[m.name]).values()
    plain = estimate(task.measure(score(loaded.model, task.requests))[metric]).value
    assert found.value == pytest.approx(plain, rel=1e-12)
    for matrix in loaded.matrices:
        if matrix.block != 1:
            continue
        weight = matrix.read(loaded.model)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        for i in (0, 3, len(s) - 1):
            values = []
            for step in (1e-4, -1e-4):
                matrix.write(loaded.model, weight + step * torch.outer(u[:, i], vh[i]))
                values.append(estimate(task.measure(score(loaded.model, task.requests))[metric]).value)
            matrix.write(loaded.model, weight)
            slope = (values[0] - values[1]) / 2e-4
            assert float(found.products[matrix.name][i] / s[i]) == pytest.approx(slope, rel=1e-4, abs=1e-9), matrix.name
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())


def test_a_module_that_is_being_trained_keeps_its_gradients(setting):
    loaded, task = setting
    matrix = loaded.matrices[:1]

    def products():
        found = singular_gradients(loaded, task, ["logprob"], matrix, lambda m: decompose(m.read(loaded.model)))
        return found["logprob"].products[matrix[0].name]

    frozen, names = products(), [name for name, _ in loaded.model.named_parameters()]
    for number, parameter in enumerate(loaded.model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, number) if number % 3 == 1 else None
    assert torch.equal(products(), frozen)
    for number, (name, parameter) in enumerate(loaded.model.named_parameters()):
        assert parameter.requires_grad == (number % 3 > 0), name
        assert (parameter.grad is None) == (number % 3 != 1), name
        assert parameter.grad is None or bool((parameter.grad == number).all()), name
    assert len(names) > 9


def test_the_prediction_is_the_limit_of_a_small_removal(setting):
    """Shrinking singular values by a share t changes the metric by t times what removing them is predicted to do."""
    loaded, task = setting
    matrix = next(m for m in loaded.matrices if m.name == "1.down_proj")
    decomposition = decompose(matrix.read(loaded.model))
    found = singular_gradients(loaded, task, ["logprob"], [matrix], lambda m: decomposition)["logprob"]
    weight = matrix.read(loaded.model)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    indices = torch.arange(4, 20)
    part = (u[:, indices] * s[indices]) @ vh[indices]
    value, share = {}, 1e-5
    for sign in (1, -1):
        matrix.write(loaded.model, weight - sign * share * part)
        value[sign] = estimate(task.measure(score(loaded.model, task.requests))["logprob"]).value
    matrix.write(loaded.model, weight)
    slope = (value[1] - value[-1]) / (2 * share)
    assert found.predicted_delta("1.down_proj", indices) == pytest.approx(slope, rel=1e-5)


def test_what_has_no_derivative_is_refused(setting):
    loaded, task = setting
    matrix = loaded.matrices[:1]

    def of(metric):
        return singular_gradients(loaded, task, [metric], matrix, lambda m: decompose(m.read(loaded.model)))

    with pytest.raises(InputError, match="accuracy.*has no derivative"):
        of("accuracy")
    with pytest.raises(InputError, match="no metric 'loss'; it has accuracy, logprob"):
        of("loss")
    direct = DirectTask("generated", {}, [], lambda loaded, division, share: {})
    with pytest.raises(InputError, match="generated: a task that measures the model directly has no derivative"):
        singular_gradients(loaded, direct, ["accuracy"], matrix, lambda m: decompose(m.read(loaded.model)))


def test_metrics_share_one_scoring_pass(setting, monkeypatch):
    loaded, task = setting
    passes, real = [], gradients._scores
    monkeypatch.setattr(gradients, "_scores", lambda *arguments: passes.append(1) or real(*arguments))
    wanted = ["loss", "accuracy", "logprob"]
    found = first_gradients(loaded, task, wanted, loaded.matrices[:1], lambda m: decompose(m.read(loaded.model)))
    assert found.metric == "logprob" and len(passes) == 1


def test_candidates_that_share_a_prompt(tmp_path):
    """Two requests per example whose difference is the metric: slopes of both signs."""
    import json

    model, context = tiny()
    path = tmp_path / "ioi.jsonl"
    path.write_text(json.dumps({"prompt": "Anna and Ben sat. Ben gave it to", "answer": "Anna"}))
    task = IoiTask(data_files=str(path)).prepare("ioi", context)
    loaded = loaded_from(model.double(), context.tokenizer)
    matrix = next(m for m in loaded.matrices if m.name == "0.up_proj")
    decomposition = decompose(matrix.read(model))
    found = singular_gradients(loaded, task, ["logit_difference"], [matrix], lambda m: decomposition)
    weight, values = matrix.read(model), []
    for share in (1e-5, -1e-5):
        matrix.write(model, weight * (1 + share))
        values.append(estimate(task.measure(score(model, task.requests))["logit_difference"]).value)
    slope = (values[0] - values[1]) / 2e-5
    assert float(found["logit_difference"].products["0.up_proj"].sum()) == pytest.approx(slope, rel=1e-5)
