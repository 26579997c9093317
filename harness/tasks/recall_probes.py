"""Probes of the parts of the embedded model, which show where it keeps noise and recall (arXiv 2406.03068)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask, TaskContext
from harness.models.recall_data import EVALUATION_STREAM, RecallBatch, RecallProcess, sample
from harness.settings.constraints import at_least
from harness.tasks.recall import EmbeddedTask

if TYPE_CHECKING:
    import torch

    from harness.evaluation.division import Division
    from harness.models.loading import LoadedModel
    from harness.models.recall import RecallForCausalLM

# The third word of the seed. The recall task draws its clean and noisy sequences with 0 and 1.
PROBE_SET = 2
SEQUENCES_PER_PASS = 64


@dataclass
class RecallProbesTask(EmbeddedTask):
    """Probes of the parts of the embedded model: attention, direct effects on logits, margins, associative memories."""

    n_sequences: Annotated[int, at_least(2)] = 128
    kind: ClassVar[str] = "recall_probes"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task that probes the model's present weights.

        The blocks are 0 and 1, and a number after a symbol is that of its block. e_k is the embedding of token k, p_t
        the embedding of position t, U the output matrix, F a feed-forward layer. W_V, W_O, W_K are v_proj, o_proj,
        k_proj; W_Q is the identity.

        Means over positions of `n_sequences` noisy sequences, where the scored positions are those of the recall task:

        - attention_previous: the attention of block 0 to the token before, at every position but the first;
        - attention_target, attention_noise: the attention of block 1, at scored positions, to the tokens that followed
          the same trigger earlier and are its output token, or are the noise token;
        - direct_attn0, direct_mlp0, direct_attn1, direct_mlp1: what this part adds, at scored positions and through U,
          to the logit of the noise token minus the logit of the target. These four and the contribution of the
          embeddings sum to the model's own difference of the two logits.

        Means over triggers, for the embedding e of a trigger alone, of the logit of the noise token minus the largest
        other logit:

        - margin_mlp0, margin_mlp1: for the logits U F0(e) and U F1(e);
        - margin_mlp01: for the logits U F1(F0(e)). The margins are left out if a block has no feed-forward layer.

        Memory recall (arXiv 2306.00802), which is the share of associations that the argmax gets right:

        - memory_k0: for the query p_t and the keys W_K0 p_s, also those of later positions s, the argmax is s = t - 1;
        - memory_k1: for the query e of a trigger and the keys W_K1 W_O0 W_V0 e_k of every token k, the argmax is the
          trigger itself. (In the published probe only triggers compete, so that it says nothing about a single one.)
        - memory_o1: for the logits U W_O1 W_V1 e_k of each character k, the argmax is k.

        The examples are the sequences, the tokens and the positions. An example has weight 0 in the metrics of which it
        is not a part.
        Raises InputError if the model is not the embedded one, or no sequence has a scored position.
        """
        process, noise = self.process_and_noise(name, context)
        length = context.model_config.max_position_embeddings
        rng = np.random.default_rng([EVALUATION_STREAM, self.seed, PROBE_SET])
        batch = sample(process, self.n_sequences, length, rng, noise=noise)
        if not batch.scored.any():
            raise InputError(
                f"tasks.{name}: none of {self.n_sequences} sequences shows a trigger twice; "
                "raise n_sequences or model.recall.context_length"
            )
        groups = {"sequence": self.n_sequences, "token": process.vocabulary_size, "position": length}
        protocol = {
            "n_sequences": self.n_sequences,
            "context_length": length,
            "noise": noise,
            "noise_token_id": process.noise_token_id,
            "trigger_ids": list(process.trigger_ids),
            "seed": self.seed,
        }

        def measure(loaded: LoadedModel, division: Division, batch_share: float) -> dict[str, ExampleScores]:
            model = cast("RecallForCausalLM", loaded.model)
            return {
                metric: _over_all_examples(groups, group, score, weight, higher)
                for metric, (group, score, weight, higher) in probe(model, process, batch).items()
            }

        example_ids = [f"{group} {i}" for group, n in groups.items() for i in range(n)]
        return DirectTask(name, protocol, example_ids, measure, inputs=[*batch.tokens, *batch.targets])


def _over_all_examples(
    groups: dict[str, int], group: str, score: np.ndarray, weight: np.ndarray, higher_is_better: bool
) -> ExampleScores:
    scores, weights = ({name: np.zeros(n) for name, n in groups.items()} for _ in range(2))
    scores[group], weights[group] = np.asarray(score, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    return ExampleScores(
        np.concatenate(list(scores.values())), np.concatenate(list(weights.values())),
        higher_is_better=higher_is_better,
    )


# Metric -> (kind of its examples, sum of the scores of each example, weight of each example, whether higher is better).
Probes = dict[str, tuple[str, np.ndarray, np.ndarray, bool]]


def probe(model: RecallForCausalLM, process: RecallProcess, batch: RecallBatch) -> Probes:
    """Return all probes that `RecallProbesTask.prepare` lists, in its order."""
    import torch

    with torch.inference_mode():
        return {**_on_sequences(model, process, batch), **_margins(model, process), **_memories(model, process)}


def _on_sequences(model: RecallForCausalLM, process: RecallProcess, batch: RecallBatch) -> Probes:
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


def _sequence_sums(
    model: RecallForCausalLM, process: RecallProcess, batch: RecallBatch, which: slice
) -> dict[str, np.ndarray]:
    """Return for each metric the sums over the positions of each of the b sequences, float64 [b]."""
    import torch

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

    for index, block in enumerate(model.blocks):
        attention = block.self_attn.weights(stream)
        if index == 0:
            sums["attention_previous"] = attention.diagonal(offset=-1, dim1=1, dim2=2).double().sum(dim=1)
        else:
            # followed[b, t, s] says whether the token at s follows an earlier occurrence of the trigger at t.
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


def _margins(model: RecallForCausalLM, process: RecallProcess) -> Probes:
    import torch

    first, second = (block.mlp for block in model.blocks)
    if first is None or second is None:
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


def _memories(model: RecallForCausalLM, process: RecallProcess) -> Probes:
    import torch

    first, second = (block.self_attn for block in model.blocks)
    positions, embedded = model.embed_positions.weight, model.embed_tokens.weight
    characters, triggers = np.arange(len(process.vocabulary)), np.asarray(process.trigger_ids)

    def share(group: str, n: int, at: np.ndarray, correct: torch.Tensor) -> tuple[str, np.ndarray, np.ndarray, bool]:
        score, weight = np.zeros(n), np.zeros(n)
        score[at], weight[at] = correct.cpu().numpy(), 1
        return group, score, weight, True

    t = torch.arange(1, len(positions), device=positions.device)
    # Every position competes, also those that causal attention would hide.
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
