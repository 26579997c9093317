"""Encoder-decoders (T5): the log-likelihood of a target text given a source text, or metrics of generated texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch

from harness.errors import InputError, SettingError
from harness.evaluation.requests import (
    DirectTask,
    ExampleScores,
    PreparedTask,
    Request,
    ScoredTask,
    Scores,
    TaskContext,
)
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.clusters import by_column, cluster_numbers
from harness.tasks.evaluate_metrics import Metrics, MetricSet
from harness.tasks.generation import generated_in_batches, padding_of, refuse_nan
from harness.tasks.settings import RowsTask

if TYPE_CHECKING:
    from harness.evaluation.division import Division
    from harness.models.loading import LoadedModel


@dataclass
class Seq2SeqTask(RowsTask):
    """Log-likelihood of a target text given a source text or, with `metrics`, the quality of generated texts."""

    source_column: str = "source"
    target_column: str = "target"
    source_prefix: str = ""  # text before every source, for example "summarize: "
    metrics: Metrics = field(default_factory=list)  # metrics of Hugging Face evaluate, computed on generated texts
    # Largest number of tokens of a generated text; null: as many as the longest target has.
    max_new_tokens: Annotated[int, at_least(1)] | None = None
    kind: ClassVar[str] = "seq2seq"
    measured_on: ClassVar[tuple[str, ...]] = ("seq2seq",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None and not self.metrics:
            raise SettingError("max_new_tokens", "nothing is generated without metrics; set metrics, or leave it null")

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each row, or the task that generates texts if there are `metrics`.

        A request asks for the log-probability of every token of the target, its end-of-sequence token included, given
        the source and the tokens of the target before it. This is the loss that transformers computes from `labels`.
        Sources and targets that are longer than the model's context are cut, and the protocol says how many.
        Metrics: token_perplexity and nll (nats), per token, lower is better; token_accuracy; exact_match, whether every
        token of the target is the most probable one. With `metrics` there are only these, computed on the texts that
        the model generates by greedy decoding.
        Raises InputError if the model has no decoder start token, a text has no tokens, or a metric cannot be computed,
        and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        key, tokenizer = f"tasks.{name}", context.tokenizer
        start = context.model_config.decoder_start_token_id
        if start is None:
            raise InputError(f"{key}: the model's config has no decoder_start_token_id for the decoder to begin with")
        found = self.rows(key, [self.source_column, self.target_column])
        picked = self.choose(key, found, lambda row: f"{row[self.source_column]}\n{row[self.target_column]}")
        data.refuse_empty(key, picked, [self.source_column])  # an empty target asks whether the text ends at once
        requests, n_truncated = [], 0
        for number, row in picked:
            source = tokenizer(self.source_prefix + row[self.source_column], verbose=False)["input_ids"]
            target = tokenizer(text_target=row[self.target_column], verbose=False)["input_ids"]
            if not source or not target:
                raise InputError(f"{key} row {number}: no tokens in its {'target' if source else 'source'}")
            n_truncated += max(len(source), len(target)) > context.context_length
            source, target = (np.asarray(_cut(ids, context)) for ids in (source, target))
            fed = np.concatenate([[start], target[:-1]])
            requests.append(Request(fed, np.arange(len(target)), target, source=source))
        weight = np.array([len(request.targets) for request in requests], dtype=np.float64)
        protocol = {
            "data": self.source(),
            "columns": [self.source_column, self.target_column],
            "source_prefix": self.source_prefix,
            "digest": data.digest(row[c] for _, row in picked for c in (self.source_column, self.target_column)),
            "context_length": context.context_length,
            "decoder_start_token_id": start,
            "n_examples": len(picked),
            "n_tokens": int(weight.sum()),
            "n_truncated": n_truncated,
            **self.part_protocol(),
        }
        ids = [str(number) for number, _ in picked]
        if self.metrics:
            rows = [row for _, row in picked]
            metrics = MetricSet(key, self.metrics, clusters=cluster_numbers(key, self.cluster_column, rows))
            references = [row[self.target_column] for _, row in picked]
            metrics.rehearse(references)
            for one in requests:
                tokenization.require_embedded(name, one.source, context.model_config)
            sources = [[int(token) for token in one.source] for one in requests if one.source is not None]
            new_tokens = self.max_new_tokens or max(len(tokenized.targets) for tokenized in requests)
            protocol |= {
                **metrics.protocol(), "decoding": "greedy", "max_new_tokens": new_tokens,
                "batch_tokens": context.generation_tokens, "tokenizer": tokenization.tokenizer_digest(tokenizer),
            }

            def measure_written(
                loaded: LoadedModel, division: Division, batch_share: float
            ) -> dict[str, ExampleScores]:
                batch_tokens = int(context.generation_tokens * batch_share)
                answers = generated_in_batches(
                    sources, new_tokens, lambda batch: _generate(loaded, batch, new_tokens), division, batch_tokens
                )
                texts = [loaded.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
                return metrics.scores(texts, references)

            written = DirectTask(name, protocol, ids, measure_written, inputs=sources)
            return by_column(written, key, self.cluster_column, rows)

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            nll = -scores.request_logprob()
            right = np.add.reduceat(scores.greedy.astype(np.float64), scores.offsets[:-1])
            return {
                "token_perplexity": ExampleScores(nll, weight, "exp", higher_is_better=False),
                "nll": ExampleScores(nll, weight, higher_is_better=False),
                "token_accuracy": ExampleScores(right, weight, bounds=(0.0, 1.0)),
                "exact_match": ExampleScores(
                    scores.request_greedy().astype(np.float64), np.ones(len(weight)), bounds=(0.0, 1.0)
                ),
            }

        task = ScoredTask(name, protocol, requests, ids, measure)
        return by_column(task, key, self.cluster_column, [row for _, row in picked])


def _cut(tokens: list[int], context: TaskContext) -> list[int]:
    """Return the first tokens, at most the model's context. A last end-of-sequence token stays the last one."""
    limit, end = context.context_length, context.tokenizer.eos_token_id
    if len(tokens) <= limit:
        return tokens
    return [*tokens[: limit - 1], end] if tokens[-1] == end else tokens[:limit]


@torch.inference_mode()
def _generate(loaded: LoadedModel, sources: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
    """Return the tokens that the decoder writes for each source, special ones included. The longest source is first."""
    from transformers import GenerationConfig

    model: Any = loaded.model
    pad, width = padding_of(loaded.tokenizer, model), len(sources[0])
    input_ids = torch.full((len(sources), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, source in enumerate(sources):
        input_ids[row, : len(source)] = torch.as_tensor(source)
        mask[row, : len(source)] = 1
    start, end = model.config.decoder_start_token_id, loaded.tokenizer.eos_token_id
    own = model.generation_config
    # transformers takes settings that a call does not give from the checkpoint's generation_config.json. The protocol
    # would not show them, so a config with nothing but our settings stands in its place.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, num_beams=1, decoder_start_token_id=start, eos_token_id=end,
        pad_token_id=pad,
    )
    try:
        written = model.generate(
            input_ids=input_ids.to(loaded.device), attention_mask=mask.to(loaded.device), logits_processor=[refuse_nan]
        )
    finally:
        model.generation_config = own
    return written.tolist()
