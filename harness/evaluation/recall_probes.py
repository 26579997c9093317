"""Where the embedded model keeps the noise and where the recall (arXiv 2406.03068): probes of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from harness.errors import InputError
from harness.evaluation.recall import process_and_noise
from harness.evaluation.requests import ExampleScores, PreparedTask, TaskContext
from harness.models.recall_data import EVALUATION_STREAM, RecallBatch, RecallProcess, sample
from harness.task_config import RecallProbesTask

# Third word of the seed; the recall task draws its clean and noisy sequences with 0 and 1.
PROBE_SET = 2
SEQUENCES_PER_PASS = 64


def prepare(name: str, config: RecallProbesTask, context: TaskContext) -> PreparedTask:
    """Probes of the model's present weights. Blocks are 0 and 1; e_k is the embedding of token k, p_t that of position
    t, U the output matrix; W_V, W_O, W_K are v_proj, o_proj, k_proj (W_Q is the identity).

    On `n_sequences` noisy sequences, means over positions; "scored" as in the recall task (trigger seen before):

    - attention_previous: attention of block 0 on the token before (every position but the first);
    - attention_target, attention_noise: attention of block 1, at scored positions, on the tokens that followed the same
      trigger earlier: on those that are its output, and on those that are the noise token;
    - direct_attn0, direct_mlp0, direct_attn1, direct_mlp1: logit of the noise minus logit of the target that this part
      adds to the residual stream, through U, at scored positions. Their sum and the embeddings' is the model's own.

    On the embedding of each trigger, alone, means over triggers; logit of the noise minus the largest other logit:

    - margin_mlp0, margin_mlp1: U F_0(e), U F_1(e); margin_mlp01: U F_1(F_0(e)). Absent without feed-forward layers.

    Memory recall (arXiv 2306.00802, section 4), the share of associations whose argmax is right:

    - memory_k0: query p_t, keys W_K p_s of block 0, later ones too: the argmax is s = t - 1;
    - memory_k1: query a trigger's e, keys W_K1 W_O0 W_V0 e_k of every token k: the argmax is the trigger itself (the
      published probe lets triggers compete with each other only, which says nothing for a single one);
    - memory_o1: U W_O1 W_V1 e_k of each character k: the argmax is k.

    Examples are the sequences, the tokens and the positions; one that is no part of a metric has no weight in it.
    Raises InputError where the model is not the embedded one, or no sequence has anything to score.
    """
    process, noise = process_and_noise(name, config, context)
    length = context.model_config.max_position_embeddings
    rng = np.random.default_rng([EVALUATION_STREAM, config.seed, PROBE_SET])
    batch = sample(process, config.n_sequences, length, rng, noise=noise)
    if not batch.scored.any():
        raise InputError(
            f"tasks.{name}: none of {config.n_sequences} sequences shows a trigger twice; "
            "raise n_sequences or model.recall.context_length"
        )
    groups = {"sequence": config.n_sequences, "token": process.vocabulary_size, "position": length}
    protocol = {
        "n_sequences": config.n_sequences,
        "context_length": length,
        "noise": noise,
        "noise_token_id": process.noise_token_id,
        "trigger_ids": list(process.trigger_ids),
        "seed": config.seed,
    }

    def generate(loaded: Any, division: Any = None, batch_share: float = 1.0) -> dict[str, ExampleScores]:
        return {
            metric: _over_all_examples(groups, group, score, weight, higher)
            for metric, (group, score, weight, higher) in probe(loaded.model, process, batch).items()
        }

    example_ids = [f"{group} {i}" for group, n in groups.items() for i in range(n)]
    return PreparedTask(name, protocol, [], example_ids, None, generate=generate)


def _over_all_examples(groups: dict[str, int], group: str, score, weight, higher_is_better: bool) -> ExampleScores:
    scores, weights = ({name: np.zeros(n) for name, n in groups.items()} for _ in range(2))
    scores[group], weights[group] = np.asarray(score, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    return ExampleScores(
        np.concatenate(list(scores.values())), np.concatenate(list(weights.values())),
        higher_is_better=higher_is_better,
    )


# metric -> (kind of example, sum of scores of each, weight of each, higher is better)
Probes = dict[str, tuple[str, np.ndarray, np.ndarray, bool]]


def probe(model: torch.nn.Module, process: RecallProcess, batch: RecallBatch) -> Probes:
    """All probes of `prepare`, in its order, example by example."""
    with torch.inference_mode():
        return {**_on_sequences(model, process, batch), **_margins(model, process), **_memories(model, process)}


def _on_sequences(model: torch.nn.Module, process: RecallProcess, batch: RecallBatch) -> Probes:
    parts = [
        _sequence_sums(model, process, batch, slice(start, start + SEQUENCES_PER_PASS))
        for start in range(0, len(batch.tokens), SEQUENCES_PER_PASS)
    ]
    n_scored = batch.scored.sum(axis=1)
    n_after_first = np.full(len(batch.tokens), batch.tokens.shape[1] - 1)
    return {
        metric: (
            "sequence",
            np.concatenate([part[metric] for part in parts]),
            n_after_first if metric == "attention_previous" else n_scored,
            metric in ("attention_previous", "attention_target"),
        )
        for metric in parts[0]
    }


def _sequence_sums(model, process: RecallProcess, batch: RecallBatch, which: slice) -> dict[str, np.ndarray]:
    """Sums over the positions of each sequence, float64 [b] per metric."""
    device = model.embed_tokens.weight.device
    tokens, scored, targets = (
        torch.from_numpy(array[which]).to(device) for array in (batch.tokens, batch.scored, batch.targets)
    )
    sums: dict[str, torch.Tensor] = {}
    stream = model.embed(tokens)
    unembed = model.get_output_embeddings().weight
    towards_noise = unembed[process.noise_token_id] - unembed[targets.clamp(min=0)]  # [b, T, dim]

    def direct(part: torch.Tensor) -> torch.Tensor:
        return ((part * towards_noise).sum(dim=-1).double() * scored).sum(dim=1)

    for index, block in enumerate(model.layers):
        attention = block.self_attn.weights(stream)
        if index == 0:
            sums["attention_previous"] = attention.diagonal(offset=-1, dim1=1, dim2=2).double().sum(dim=1)
        else:
            # followed[b, t, s]: the token at s came after the trigger that stands at t
            before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=-1)
            followed = (tokens[:, :, None] == before[:, None, :]) & scored[:, :, None]
            is_target = followed & (tokens[:, None, :] == targets[:, :, None])
            is_noise = followed & (tokens[:, None, :] == process.noise_token_id) & ~is_target
            sums["attention_target"] = (attention.double() * is_target).sum(dim=(1, 2))
            sums["attention_noise"] = (attention.double() * is_noise).sum(dim=(1, 2))
        part = block.self_attn(stream)
        sums[f"direct_attn{index}"] = direct(part)
        stream = stream + part
        if block.mlp is not None:
            part = block.mlp(stream)
            sums[f"direct_mlp{index}"] = direct(part)
            stream = stream + part
    return {metric: value.cpu().numpy() for metric, value in sums.items()}


def _margins(model: torch.nn.Module, process: RecallProcess) -> Probes:
    first, second = (block.mlp for block in model.layers)
    if first is None:
        return {}
    triggers = list(process.trigger_ids)
    embedded = model.embed_tokens.weight[triggers]
    n = process.vocabulary_size
    margins: Probes = {}
    for metric, output in (
        ("margin_mlp0", first(embedded)), ("margin_mlp1", second(embedded)), ("margin_mlp01", second(first(embedded))),
    ):
        logits = model.get_output_embeddings()(output).double()
        noise_logit = logits[:, process.noise_token_id].clone()
        logits[:, process.noise_token_id] = -torch.inf
        score, weight = np.zeros(n), np.zeros(n)
        score[triggers], weight[triggers] = (noise_logit - logits.amax(dim=1)).cpu().numpy(), 1
        margins[metric] = ("token", score, weight, False)
    return margins


def _memories(model: torch.nn.Module, process: RecallProcess) -> Probes:
    first, second = (block.self_attn for block in model.layers)
    positions, embedded = model.embed_positions.weight, model.embed_tokens.weight
    characters, triggers = np.arange(len(process.vocabulary)), np.asarray(process.trigger_ids)

    def share(group: str, n: int, at: np.ndarray, correct: torch.Tensor) -> tuple[str, np.ndarray, np.ndarray, bool]:
        score, weight = np.zeros(n), np.zeros(n)
        score[at], weight[at] = correct.cpu().numpy(), 1
        return group, score, weight, True

    t = torch.arange(1, len(positions), device=positions.device)
    # every position competes, also those that causal attention hides
    previous = (positions[1:] @ first.k_proj(positions[:-1]).T).argmax(dim=1) == t - 1
    keys = second.k_proj(first.o_proj(first.v_proj(embedded)))
    trigger_ids = torch.as_tensor(triggers, device=embedded.device)
    own = (embedded[trigger_ids] @ keys.T).argmax(dim=1) == trigger_ids
    copied = model.get_output_embeddings()(second.o_proj(second.v_proj(embedded[: len(characters)])))
    same = copied.argmax(dim=1) == torch.arange(len(characters), device=embedded.device)
    return {
        "memory_k0": share("position", len(positions), t.cpu().numpy(), previous),
        "memory_k1": share("token", process.vocabulary_size, triggers, own),
        "memory_o1": share("token", process.vocabulary_size, characters, same),
    }
