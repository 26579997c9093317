"""The probes of the recall model against float64 numpy, position by position, from their definitions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness.errors import InputError
from harness.evaluation.division import Division
from harness.evaluation.requests import DirectTask, TaskContext
from harness.evaluation.statistics import estimate
from harness.models.loading import loaded_from
from harness.models.recall import process_of, recall_config
from harness.models.recall_data import EVALUATION_STREAM, sample
from harness.models.recall_training import initial_model, train
from harness.models.settings import RecallModelSettings
from harness.tasks.recall_probes import PROBE_SET, RecallProbesTask

SETTINGS = RecallModelSettings(dim=32, hidden_dim=48, context_length=24, batch_size=32, steps=30, learning_rate=5e-3)


def measured(model, **settings):
    task = RecallProbesTask(**settings).prepare("probes", TaskContext(None, model.config, 24, "causal"))
    assert isinstance(task, DirectTask)
    metrics = task.measure(SimpleNamespace(model=model), Division(), 1.0)
    assert all(len(scores.score) == len(scores.weight) == len(task.example_ids) for scores in metrics.values())
    assert len(set(task.example_ids)) == len(task.example_ids)
    return metrics


def softmax(scores):
    p = np.exp(scores - scores.max())
    return p / p.sum()


def by_hand(model, n_sequences, noise, seed):
    """Every probe from its definition, one position at a time."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    process, length = process_of(model.config), model.config.max_position_embeddings
    rng = np.random.default_rng([EVALUATION_STREAM, seed, PROBE_SET])
    batch = sample(process, n_sequences, length, rng, noise=noise)
    embeddings, places, unembed = (w[f"{x}.weight"] for x in ("embed_tokens", "embed_positions", "lm_head"))
    q, v, o = ([w[f"layers.{b}.self_attn.{x}_proj.weight"] for b in (0, 1)] for x in "kvo")

    def mlp(b, x):
        hidden = w[f"layers.{b}.mlp.up_proj.weight"] @ x
        if f"layers.{b}.mlp.down_proj.weight" not in w:
            return hidden
        return w[f"layers.{b}.mlp.down_proj.weight"] @ np.maximum(hidden, 0)

    collected: dict[str, list[float]] = {}

    def add(name, value):
        collected.setdefault(name, []).append(value)

    has_mlp = "layers.0.mlp.up_proj.weight" in w
    for tokens, scored, targets in zip(batch.tokens, batch.scored, batch.targets):
        x = embeddings[tokens] + places
        for b in (0, 1):
            new = x.copy()
            for t in range(length):
                p = softmax(np.array([x[t] @ q[b] @ x[s] for s in range(t + 1)]) / np.sqrt(x.shape[1]))
                if b == 0 and t > 0:
                    add("attention_previous", p[t - 1])
                after = [s for s in range(1, t + 1) if tokens[s - 1] == tokens[t]]
                if b == 1 and scored[t]:
                    add("attention_target", sum(p[s] for s in after if tokens[s] == targets[t]))
                    add("attention_noise", sum(
                        p[s] for s in after if tokens[s] == process.noise_token_id != targets[t]
                    ))
                attended = o[b] @ v[b] @ (p @ x[: t + 1])
                pieces = {"attn": attended}
                if has_mlp:
                    pieces["mlp"] = mlp(b, x[t] + attended)
                new[t] = x[t] + sum(pieces.values())
                if scored[t]:
                    for name, piece in pieces.items():
                        logits = unembed @ piece
                        add(f"direct_{name}{b}", logits[process.noise_token_id] - logits[targets[t]])
            x = new
    for trigger in process.trigger_ids if has_mlp else ():
        e = embeddings[trigger]
        for name, output in (("0", mlp(0, e)), ("1", mlp(1, e)), ("01", mlp(1, mlp(0, e)))):
            logits = unembed @ output
            add(f"margin_mlp{name}", logits[process.noise_token_id] - np.delete(logits, process.noise_token_id).max())
    for t in range(1, length):
        add("memory_k0", max(range(length - 1), key=lambda s: places[t] @ q[0] @ places[s]) == t - 1)  # noqa: B023
    for trigger in process.trigger_ids:
        keys = [embeddings[trigger] @ q[1] @ o[0] @ v[0] @ e for e in embeddings]
        add("memory_k1", np.argmax(keys) == trigger)
    for k in range(65):
        add("memory_o1", np.argmax(unembed @ o[1] @ v[1] @ embeddings[k]) == k)
    return {name: (np.mean(values), len(values)) for name, values in collected.items()}


@pytest.mark.parametrize("change, noise", [
    ({}, None), ({"n_triggers": 3, "noise_token": "!"}, 0.3), ({"feed_forward": "linear"}, None),
    ({"feed_forward": "none"}, 0.8),
])
def test_probes_follow_their_definitions(change, noise):
    model = train(replace(SETTINGS, **change), progress=False)
    metrics = measured(model, n_sequences=70, noise=noise, seed=3)  # more than one pass
    expected = by_hand(model, 70, 0.5 if noise is None else noise, 3)
    assert metrics.keys() == expected.keys()
    for name, scores in metrics.items():
        assert scores.weight.sum() == expected[name][1], name
        assert estimate(scores).value == pytest.approx(expected[name][0], rel=2e-4, abs=2e-5), name


def test_ideal_memories_are_recalled_and_no_others():
    """The weights that arXiv 2306.00802 writes down; in 512 dimensions random embeddings are almost orthogonal."""
    model = initial_model(replace(SETTINGS, dim=512, n_triggers=5))
    e, p, u = model.embed_tokens.weight, model.embed_positions.weight, model.lm_head.weight
    first, second = (block.self_attn for block in model.layers)
    before = {name: estimate(scores).value for name, scores in measured(model, n_sequences=4).items()}
    with torch.no_grad():
        first.k_proj.weight.copy_(p[1:].T @ p[:-1])
        remapped = e @ first.v_proj.weight.T @ first.o_proj.weight.T
        second.k_proj.weight.copy_(e.T @ remapped)
        second.o_proj.weight.copy_(u.T @ (e @ second.v_proj.weight.T))
    after = {name: estimate(scores).value for name, scores in measured(model, n_sequences=4).items()}
    for name in ("memory_k0", "memory_k1", "memory_o1"):
        assert before[name] < 0.3 and after[name] == 1.0, name


def test_parts_add_up_to_the_model_s_logits():
    model = train(SETTINGS, progress=False)
    metrics = measured(model, n_sequences=50)
    process = process_of(model.config)
    batch = sample(process, 50, 24, np.random.default_rng([EVALUATION_STREAM, 0, PROBE_SET]))
    tokens, scored, targets = (torch.from_numpy(x) for x in (batch.tokens, batch.scored, batch.targets))

    def difference(logits):
        logits = logits[scored]
        return (logits[:, process.noise_token_id] - logits.gather(1, targets[scored][:, None])[:, 0]).mean().item()

    with torch.no_grad():
        whole, start = difference(model(tokens).logits), difference(model.lm_head(model.embed(tokens)))
    parts = sum(estimate(metrics[f"direct_{part}"]).value for part in ("attn0", "mlp0", "attn1", "mlp1"))
    assert start + parts == pytest.approx(whole, abs=1e-4)


def test_refusals():
    with pytest.raises(InputError, match="tasks.p: kind recall_probes needs the embedded model"):
        RecallProbesTask().prepare("p", TaskContext(None, SimpleNamespace(model_type="gpt2"), 24, "causal"))
    short = recall_config(replace(SETTINGS, context_length=8))
    with pytest.raises(InputError, match="tasks.p: none of 1 sequences"):
        RecallProbesTask(n_sequences=1, seed=1).prepare("p", TaskContext(None, short, 8, "causal"))


def test_ablating_the_first_feed_forward_layer_takes_its_margin_away():
    model = train(SETTINGS, progress=False)
    loaded = loaded_from(model)
    (matrix,) = [m for m in loaded.matrices if m.name == "0.up_proj"]
    matrix.write(model, torch.zeros(matrix.shape))
    metrics = {name: estimate(scores).value for name, scores in measured(model, n_sequences=20).items()}
    assert metrics["margin_mlp0"] == metrics["margin_mlp01"] == metrics["direct_mlp0"] == 0
    assert metrics["margin_mlp1"] != 0
