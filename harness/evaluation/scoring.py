"""The scoring pass: log-probabilities of chosen tokens at chosen positions, resumed at the first edited block.

An edit of block b cannot change the residual stream that enters block b. The scorer therefore keeps that stream for
every batch at one block boundary, the frontier, and a cell that first edits block b runs blocks b.. only. It is done
by the model's own forward with the earlier blocks replaced by stubs that return the stored stream, so masks, position
embeddings and the final norm stay the model's business, and the numbers are bit-identical.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from harness.config import RuntimeConfig
from harness.evaluation.division import Division
from harness.evaluation.packing import Batch, PackedRequests, pack, sharing_of
from harness.evaluation.reading import Head, Reading, head_of, read, reading_of
from harness.evaluation.requests import PreparedTask, Request, Scores
from harness.evaluation.stream import Kept, StreamStore
from harness.evaluation.whole_packing import WholeBatch, pack_whole
from harness.models.loading import LoadedModel, require_head


class _StopForward(Exception):
    """Ends a forward pass once the wanted block has run; never leaves this module."""


@contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's forward, and put back whatever was there (device_map puts a hook of its own there)."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original


def pack_for(
    requests: Sequence[Request], batch_tokens: int, kind: str, model: torch.nn.Module, share_context: bool = True
) -> PackedRequests:
    """The batches of a task for a model (or its skeleton) of `kind` (models.families.Family.kind)."""
    if kind == "causal":
        return pack(requests, batch_tokens, sharing=sharing_of(model) if share_context else None)
    pad_id = 0
    if kind == "classification":
        # decoders with a classification head look for the last token that is not padding
        pad_id = model.config.get_text_config().pad_token_id
        if pad_id is None:
            batch_tokens, pad_id = 1, 0
    return pack_whole(requests, batch_tokens, pad_id)


def scorer_of(
    loaded: LoadedModel, tasks: Mapping[str, PreparedTask], runtime: RuntimeConfig, division: Division | None = None
) -> Scorer:
    """The scorer of those tasks that have requests, as the runtime settings ask."""
    return Scorer(
        loaded, {name: task for name, task in tasks.items() if task.generate is None}, runtime.batch_tokens,
        runtime.logit_rows, runtime.reuse, runtime.share_context, runtime.stream_gib * 2**30,
        runtime.stream_host_gib * 2**30, lazy=runtime.precision == "adaptive", division=division,
    )


def _moved(batch: Batch | WholeBatch, device: torch.device) -> Batch | WholeBatch:
    """The batch with its tensors on `device`."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch, **{name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    )


class Scorer:
    """Scores prepared tasks on a model whose weights change between calls.

    tasks: the tasks with requests. logit_rows: output distributions held at once, which bounds memory at
    logit_rows x vocabulary floats. reuse=False runs every block every time. share_context=False feeds the context of
    several choices once for each. stream_bytes, host_bytes: memory for the stream at the frontier, on the model's
    device and beyond that in pinned host memory; batches that fit into neither start from the first block. lazy: a
    task's stream moves to the frontier when the task is next scored, so that tasks never scored there cost nothing.
    division: the processes that score every task together, each some of its batches; None: this one alone.
    Raises InputError where the checkpoint lacked weights of the head.
    """

    def __init__(
        self, loaded: LoadedModel, tasks: Mapping[str, PreparedTask], batch_tokens: int = 8192, logit_rows: int = 1024,
        reuse: bool = True, share_context: bool = True, stream_bytes: float = math.inf, host_bytes: float = 0,
        lazy: bool = False, division: Division | None = None,
    ) -> None:
        require_head(loaded)
        self.loaded = loaded
        self.kind = loaded.description.family.kind
        self.reuse, self.lazy = reuse, lazy
        self.division = division or Division()
        self.needs_rank = {name: task.needs_rank for name, task in tasks.items()}
        self.packed: dict[str, PackedRequests] = {
            name: pack_for(task.requests, batch_tokens, self.kind, loaded.model, share_context)
            for name, task in tasks.items()
        }
        self.block = 0
        self._store = StreamStore(loaded.device, stream_bytes, host_bytes)
        self._head = None if self.kind == "classification" else loaded.model.get_output_embeddings()
        softcap = getattr(loaded.model.config.get_text_config(), "final_logit_softcapping", None)
        self._read_head = Head(torch.Tensor.float) if self._head is None else head_of(self._head, softcap)
        self._n_encoder = len({matrix.block for matrix in loaded.matrices if matrix.stack == "encoder"})
        self._readings: dict[tuple[str, int], Reading] = {}
        # on the device once and for all: a copy from pageable memory would wait for the pass before it
        self._batches: dict[tuple[str, int], Batch | WholeBatch] = {}
        for name, packed in self.packed.items():
            for i in self.division.own(len(packed.batches)):
                batch = packed.batches[i]
                self._readings[name, i] = self._reading(batch, logit_rows)
                self._batches[name, i] = _moved(batch, loaded.device)

    def _reading(self, batch: Batch | WholeBatch, logit_rows: int) -> Reading:
        # a classifier has one output per sequence
        rows = batch.rows // batch.input_ids.shape[1] if self._head is None else batch.rows
        return reading_of(rows, batch.entry_row, batch.targets, batch.entries, logit_rows, self.loaded.device)

    def score(self, task: str, first_block: int = 0) -> Scores:
        """Scores of one task under the model's present weights, which may differ from the unedited ones in blocks
        >= first_block only. The frontier must have been advanced to at most `first_block`."""
        packed, needs_rank = self.packed[task], self.needs_rank[task]
        if self.block > first_block:
            raise ValueError(f"the frontier at block {self.block} is beyond the edited block {first_block}")
        logprob = np.empty(packed.n_entries, dtype=np.float64)
        greedy = np.empty(packed.n_entries, dtype=bool)
        rank = np.empty(packed.n_entries, dtype=np.int64) if needs_rank else None
        for answers in self.division.together(f"scoring {task}", lambda: self._answers(task, needs_rank)):
            for entries, batch_logprob, batch_greedy, batch_rank in answers:
                logprob[entries] = batch_logprob
                greedy[entries] = batch_greedy
                if rank is not None:
                    rank[entries] = batch_rank
        return Scores(logprob, greedy, rank, packed.offsets)

    def _answers(self, task: str, needs_rank: bool) -> list[tuple[np.ndarray | None, ...]]:
        """(entries, logprob, greedy, rank or None) of each batch of this process."""
        if self.lazy:
            self._move(task)
        # nothing comes back from the device before every batch is under way
        pending = [
            (self._readings[task, i].entries, self._score_batch((task, i), needs_rank)) for i in self._own(task)
        ]
        return [
            (entries, *(None if answer is None else answer.cpu().numpy() for answer in answers))
            for entries, answers in pending
        ]

    def _own(self, task: str) -> range:
        return self.division.own(len(self.packed[task].batches))

    def rehearse(self, task: str) -> None:
        """Score those batches of a task that need the most memory, by their tokens and by their pairs of tokens."""
        shapes = {i: self._batches[task, i].input_ids.shape for i in self._own(task)}
        for size in (lambda i: shapes[i].numel(), lambda i: shapes[i].numel() * shapes[i][1]):
            self._score_batch((task, max(shapes, key=size)), self.needs_rank[task])

    def advance(self, block: int) -> None:
        """Move the frontier to the boundary before `block`; the model must hold its unedited weights up to there."""
        if not self.reuse or block == self.block:
            return
        if block < self.block:
            self._store.clear()
        self.block = block
        for task in () if self.lazy else self.packed:
            self._move(task)

    def _move(self, task: str) -> None:
        for i in self._own(task):
            kept = self._store.get((task, i))
            if kept.block < self.block and self._store.takes((task, i)):
                self._store.put((task, i), self._run_to(self.block, self._batches[task, i], kept))

    @torch.inference_mode()
    def _run_to(self, block: int, batch: Batch | WholeBatch, kept: Kept) -> Kept:
        if kept.block < self._n_encoder <= block:
            kept = Kept(self._n_encoder, (), self._encode(batch, kept))
        if block == self._n_encoder:
            return kept
        captured: list[Any] = []

        def capture(module, args, output):
            captured.append(output)
            raise _StopForward

        handle = self.loaded.blocks[block - 1].register_forward_hook(capture)
        try:
            with self._resumed(kept):
                self._forward(batch, kept)
        except _StopForward:
            pass
        finally:
            handle.remove()
        output = captured[0]
        return Kept(block, output if isinstance(output, tuple) else (output,), kept.encoded)

    def _encode(self, batch: WholeBatch, kept: Kept) -> torch.Tensor:
        """What the encoder of an encoder-decoder hands to the decoder, [B, S, d]."""
        inputs = batch.model_inputs(self.loaded.device)
        with self._resumed(kept):
            encoder = self.loaded.model.get_encoder()
            return encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]

    @contextmanager
    def _resumed(self, kept: Kept) -> Iterator[None]:
        """Skip the blocks before the kept stream: the stub of the last of them returns it."""
        first = self._n_encoder if kept.encoded is not None else 0

        def stub(hidden_states, *args, **kwargs):
            return kept.output if len(kept.output) > 1 else kept.output[0]

        with ExitStack() as stack:
            for block in self.loaded.blocks[first : kept.block]:
                stack.enter_context(_forward_replaced(block, stub))
            yield

    def _forward(self, batch: Batch | WholeBatch, kept: Kept) -> Any:
        if isinstance(batch, Batch):
            inputs: dict[str, Any] = batch.model_inputs(self.loaded.device, self.loaded.model.dtype)
        else:
            inputs = batch.model_inputs(self.loaded.device)
        if kept.encoded is not None:
            del inputs["input_ids"]
            inputs["encoder_outputs"] = (kept.encoded,)
        if self.kind != "masked":
            inputs["use_cache"] = False
        return self.loaded.model(**inputs)

    @torch.inference_mode()
    def _score_batch(self, key: tuple[str, int], needs_rank: bool):
        hidden, reading = self._final_hidden(self._batches[key], self._store.get(key)), self._readings[key]
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, reading.rows)
        return read(self._read_head, rows, reading, needs_rank)

    def _final_hidden(self, batch: Batch | WholeBatch, kept: Kept) -> torch.Tensor:
        """What enters the output head, [B, T, d]; the head itself is skipped. Of a classifier its logits, [B, C]."""
        if self._head is None:
            with self._resumed(kept):
                return self._forward(batch, kept).logits
        captured: list[torch.Tensor] = []

        def keep(hidden_states, *args, **kwargs):
            captured.append(hidden_states)
            return hidden_states[..., :1]

        with self._resumed(kept), _forward_replaced(self._head, keep):
            self._forward(batch, kept)
        return captured[0]
