"""In-context recall of the embedded model (arXiv 2406.03068) on new sequences of its data, with and without noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.models.recall_data import EVALUATION_STREAM, RecallBatch, RecallProcess, sample
from harness.settings.constraints import Bounds, at_least
from harness.tasks.settings import Task


@dataclass
class EmbeddedTask(Task):
    """A task on new sequences from the distribution that the embedded model was trained on."""

    # Probability of the noise token after a trigger in the noisy sequences; null: as in training.
    noise: Annotated[float, Bounds(at_least=0, at_most=1)] | None = None
    seed: Annotated[int, at_least(0)] = 0

    def process_and_noise(self, name: str, context: TaskContext) -> tuple[RecallProcess, float]:
        """Return the distribution that the model was trained on, and the noise of the noisy sequences.

        Raises InputError if the model is not the embedded one.
        """
        model_config = context.model_config
        if getattr(model_config, "model_type", None) != "recall":
            raise InputError(
                f"tasks.{name}: kind {self.kind} needs the embedded model (model.name: recall), "
                f"not a model of type {getattr(model_config, 'model_type', 'unknown')}"
            )
        from harness.models.recall import process_of  # imports transformers, which takes seconds

        process = process_of(model_config)
        return process, process.noise if self.noise is None else float(self.noise)


@dataclass
class RecallTask(EmbeddedTask):
    """In-context recall on new sequences of the embedded model's data, with and without noise."""

    n_sequences: Annotated[int, at_least(2)] = 512
    kind: ClassVar[str] = "recall"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task on two sets of `n_sequences` sequences, one without and one with noise after the triggers.

        The scored positions are those whose input is a trigger that occurred before in the sequence. Example i is the
        clean sequence i together with the noisy sequence i. It is left out if one of them has no scored position. The
        score of an example is the sum over its scored positions and its weight is their number, so that every metric is
        a mean over positions:

        - accuracy_clean, accuracy_noisy: whether the argmax is the output token of that trigger in this sequence;
        - p_target, p_noise: the probability of the output token and of the noise token (clean set);
        - cross_entropy: that of the output token in nats (clean set);
        - cross_entropy_noisy: that of the token that really follows, which may be noise, in nats (noisy set). This is
          the loss of the training.

        Raises InputError if the model is not the embedded one, or no sequence has a scored position.
        """
        process, noise = self.process_and_noise(name, context)
        model_config = context.model_config
        clean, noisy = (
            sample(
                process,
                self.n_sequences,
                model_config.max_position_embeddings,
                np.random.default_rng([EVALUATION_STREAM, self.seed, which]),
                noise=probability,
            )
            for which, probability in enumerate((0.0, noise))
        )
        kept = np.flatnonzero(clean.scored.any(axis=1) & noisy.scored.any(axis=1)).tolist()
        if not kept:
            raise InputError(
                f"tasks.{name}: none of {self.n_sequences} sequences shows a trigger twice; "
                "raise n_sequences or model.recall.context_length"
            )
        requests = [_request(clean, i, np.full_like(clean.targets[i], process.noise_token_id)) for i in kept]
        requests += [_request(noisy, i, noisy.labels[i]) for i in kept]
        n = len(kept)

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            # A request asks twice at each position: for the target, then for the other token.
            starts, weight = scores.offsets[:-1] // 2, np.diff(scores.offsets) / 2
            halves = {"clean": slice(0, n), "noisy": slice(n, 2 * n)}

            def example_scores(
                per_position: np.ndarray, which: str, higher_is_better: bool = True, bounded: bool = True
            ) -> ExampleScores:
                summed = np.add.reduceat(per_position.astype(np.float64), starts)
                return ExampleScores(
                    summed[halves[which]], weight[halves[which]], higher_is_better=higher_is_better,
                    bounds=(0.0, 1.0) if bounded else None,
                )

            target, other, correct = scores.logprob[0::2], scores.logprob[1::2], scores.greedy[0::2]
            return {
                "accuracy_clean": example_scores(correct, "clean"),
                "accuracy_noisy": example_scores(correct, "noisy"),
                "p_target": example_scores(np.exp(target), "clean"),
                "p_noise": example_scores(np.exp(other), "clean", higher_is_better=False),
                "cross_entropy": example_scores(-target, "clean", higher_is_better=False, bounded=False),
                "cross_entropy_noisy": example_scores(-other, "noisy", higher_is_better=False, bounded=False),
            }

        protocol = {
            "n_sequences": self.n_sequences,
            "context_length": model_config.max_position_embeddings,
            "noise": noise,
            "noise_token_id": process.noise_token_id,
            "trigger_ids": list(process.trigger_ids),
            "seed": self.seed,
        }
        return ScoredTask(
            name, protocol, requests, [str(i) for i in kept], measure, example_of=np.tile(np.arange(n), 2)
        )


def _request(batch: RecallBatch, i: int, other: np.ndarray) -> Request:
    """Return the request for the target and then the token of `other` (int64 [T]) at each scored position of row i."""
    positions = np.flatnonzero(batch.scored[i])
    asked = np.stack([batch.targets[i, positions], other[positions]], axis=1)
    return Request(batch.tokens[i], positions.repeat(2), asked.ravel())
