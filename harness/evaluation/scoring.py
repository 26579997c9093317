"""The scoring pass: log-probabilities of chosen tokens at chosen positions, resumed at the first edited block.

An edit of block b cannot change the residual stream that enters block b. The scorer therefore keeps the stream of every
batch at one block boundary, the frontier. A cell whose first edited block is b only runs the blocks from b on. For that
the model's own forward is called, in which stubs replace the earlier blocks and return the stored stream. Masks,
position embeddings and the final norm are thus computed by the model itself, and the scores are bit-identical to those
of a full pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from harness.evaluation.division import Division
from harness.evaluation.graphs import Results, graphs_of
from harness.evaluation.inner import BUDGET, InnerOutputs, forward_replaced
from harness.evaluation.last_block import LastBlock
from harness.evaluation.packing import Batch, PackedRequests, pack, sharing_of
from harness.evaluation.reading import Head, Reading, head_of, read, reading_of
from harness.evaluation.requests import Request, ScoredTask, Scores
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.stream import Kept, StreamStore
from harness.evaluation.synchronisation import without_waiting
from harness.evaluation.tree_attention import flex_masked
from harness.evaluation.whole_packing import WholeBatch, pack_whole
from harness.models.attention import flex_attention
from harness.models.families import Family
from harness.models.loading import LoadedModel, require_head
from harness.models.matrices import Matrix
from harness.models.memory import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyBatch = TypeVar("AnyBatch", Batch, WholeBatch)
# The answers of some batches: entries, logprob, greedy, and rank or None.
Answers = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


class _StopForward(Exception):
    """Ends a forward pass after the wanted block. It is always caught in this module."""


def pack_for(
    requests: Sequence[Request], batch_tokens: int, family: Family, model: PreTrainedModel, share_context: bool = True
) -> PackedRequests:
    """Pack requests into batches for a model, or its skeleton, of a family.

    batch_tokens: padded tokens per batch. share_context: pack trees where they are cheaper.
    """
    if family.kind == "causal":
        return pack(requests, batch_tokens, sharing=sharing_of(model, family) if share_context else None)
    pad_id = 0
    if family.kind == "classification":
        # decoders with a classification head read the last token that is not padding; without one, sequences go alone
        pad_id = model.config.get_text_config().pad_token_id
        if pad_id is None:
            batch_tokens, pad_id = 1, 0
    return pack_whole(requests, batch_tokens, pad_id)


def _to_host(
    results: Sequence[Results], needs_rank: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return log-probabilities, greedy and ranks of all batches on the CPU, by one copy.

    All of them are exact in float64: float32 numbers, truth values, and ranks below the size of a vocabulary.
    """
    if not results:
        return np.empty(0), np.empty(0, dtype=bool), np.empty(0, dtype=np.int64) if needs_rank else None
    columns = [torch.cat([part for part in parts if part is not None]).double() for parts in zip(*results)
               if parts[0] is not None]
    logprob, greedy, *rank = torch.stack(columns).cpu().numpy()
    return logprob, greedy.astype(bool), rank[0].astype(np.int64) if needs_rank else None


def _moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return the batch with its tensors on `device`."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


class Scorer:
    """Scores tasks on a model whose weights change between calls.

    tasks: by name. division: the processes that score every task together; None if this process is alone. Raises
    InputError if weights of the head are random.
    """

    def __init__(
        self, loaded: LoadedModel, tasks: Mapping[str, ScoredTask], options: ScoringOptions | None = None,
        division: Division | None = None,
    ) -> None:
        options = options or ScoringOptions()
        require_head(loaded)
        self.loaded = loaded
        family = loaded.description.family
        self.kind = family.kind
        self.reuse, self.lazy = options.reuse, options.lazy
        self.division = division or Division()
        self.needs_rank = {name: task.needs_rank for name, task in tasks.items()}
        self.packed: dict[str, PackedRequests] = {
            name: pack_for(task.requests, options.batch_tokens, family, loaded.model, options.share_context)
            for name, task in tasks.items()
        }
        self.block = 0
        self._store = StreamStore(loaded.device, options.stream_bytes, options.host_bytes)
        stubs = options.reuse and not options.compile  # compiled blocks hold none
        self._inner = InnerOutputs(loaded, BUDGET if stubs else 0)
        self._last_block = LastBlock(loaded, stubs and loaded.device.type == "cpu")
        self._head = None if self.kind == "classification" else loaded.model.get_output_embeddings()
        softcap = getattr(loaded.model.config.get_text_config(), "final_logit_softcapping", None)
        self._read_head = Head(torch.Tensor.float)
        if self._head is not None:
            self._read_head = head_of(self._head, softcap, options.compile)
        self._n_encoder = len({matrix.block for matrix in loaded.matrices if matrix.stack == "encoder"})
        # with device_map the head may be on another device than the first block; it is where scores are read
        self._reading_device = loaded.device if self._head is None else self._head.weight.device
        self._graphs = graphs_of(loaded, options.cuda_graphs)
        self._readings: dict[tuple[str, int], Reading] = {}
        # all batches go to the device now: later, a copy from pageable memory would wait for the pass before it
        self._batches: dict[tuple[str, int], Batch | WholeBatch] = {}
        self._before: dict[str, int] = {}
        dealt = 0
        for name, packed in self.packed.items():
            self._before[name] = dealt
            dealt += len(packed.batches)
            for i in self._own(name):
                batch = packed.batches[i]
                self._readings[name, i] = self._reading(batch, options.logit_rows)
                moved = _moved(batch, loaded.device)
                if isinstance(moved, Batch) and moved.last is not None and options.tree_attention == "flex":
                    moved = flex_masked(moved)
                self._batches[name, i] = moved

    def _reading(self, batch: Batch | WholeBatch, logit_rows: int) -> Reading:
        # a classifier has one output for each sequence and not for each token
        rows = batch.rows // batch.input_ids.shape[1] if self._head is None else batch.rows
        reading = reading_of(rows, batch.entry_row, batch.targets, batch.entries, logit_rows)
        return reading.to(self._reading_device)

    def score(self, task: str, first_block: int = 0, edited: Sequence[Matrix] = ()) -> Scores:
        """Return the scores of one task under the present weights of the model.

        first_block: the first block whose weights may differ from the unedited ones. edited: all matrices of this block
        that may differ, so that what the block computes before them is not computed again; empty if that is not known.
        Raises ValueError if the frontier has been advanced beyond the block, and LostStep.
        """
        return self.score_several([task], first_block, edited)[task]

    def score_several(
        self, tasks: Sequence[str], first_block: int = 0, edited: Sequence[Matrix] = ()
    ) -> dict[str, Scores]:
        """Return the scores of some tasks by name, after one exchange between the processes. Otherwise as `score`."""
        if self.block > first_block:
            raise ValueError(f"the frontier at block {self.block} is beyond the edited block {first_block}")
        answers = self.division.together(
            f"scoring {', '.join(tasks)}",
            lambda: [self._answers(task, self.needs_rank[task], edited) for task in tasks],
        )
        return {task: self._scores(task, of_task) for task, of_task in zip(tasks, zip(*answers))}

    def _scores(self, task: str, answers: Sequence[Answers]) -> Scores:
        """Return the scores of one task from the answers of all processes."""
        packed = self.packed[task]
        logprob = np.empty(packed.n_entries, dtype=np.float64)
        greedy = np.empty(packed.n_entries, dtype=bool)
        rank = np.empty(packed.n_entries, dtype=np.int64) if self.needs_rank[task] else None
        for entries, own_logprob, own_greedy, own_rank in answers:
            logprob[entries], greedy[entries] = own_logprob, own_greedy
            if rank is not None and own_rank is not None:
                rank[entries] = own_rank
        return Scores(logprob, greedy, rank, packed.offsets)

    def until_all_have_work(self, tasks: Sequence[str]) -> list[str]:
        """Return the fewest of these tasks, from the first on, of which every process of the division has a batch.

        If there are too few batches, these are all of the tasks.
        """
        batches = np.cumsum([len(self.packed[task].batches) for task in tasks])
        return list(tasks[: int(np.searchsorted(batches, self.division.n)) + 1])

    def _answers(self, task: str, needs_rank: bool, edited: Sequence[Matrix]) -> Answers:
        """Return the answers of the batches that this process scores."""
        if self.lazy:
            self._move(task)
        keys = [(task, i) for i in self._own(task)]
        entries = [self._readings[key].entries for key in keys]
        # the host waits once, for the copy of all results: while it waits for a batch, a GPU has no next one to do
        return (np.concatenate([np.empty(0, dtype=np.int64), *entries]),
                *_to_host(self._score_batches(keys, needs_rank, edited), needs_rank))

    def _score_batches(
        self, keys: Sequence[tuple[str, int]], needs_rank: bool, edited: Sequence[Matrix]
    ) -> list[Results]:
        graphs, results = self._graphs, []
        state = None if graphs is None else graphs.state()
        for key in keys:
            stream, n_tokens = self._store.on_device(key), self._batches[key].input_ids.numel()
            if graphs is not None and stream is not None and state is not None and graphs.takes(n_tokens):
                # A graph runs the whole block at the frontier: it serves the edits of all of its matrices.
                results.append(graphs.run(key, stream, state, partial(self._score_batch, key, needs_rank)))
            else:
                results.append(self._score_batch(key, needs_rank, edited))
        return results

    def _own(self, task: str) -> range:
        return self.division.own(len(self.packed[task].batches), self._before[task])

    def rehearse(self, task: str) -> None:
        """Score the batches of a task that need the most memory: with the most tokens, and the most pairs of tokens."""
        shapes = {i: self._batches[task, i].input_ids.shape for i in self._own(task)}
        for size in (lambda i: shapes[i].numel(), lambda i: shapes[i].numel() * shapes[i][1]):
            self._score_batch((task, max(shapes, key=size)), self.needs_rank[task])

    def stream_bytes(self) -> int:
        """Return the bytes of the stream of all tasks at one boundary, of this process."""
        tokens = sum(batch.input_ids.numel() for batch in self._batches.values())
        width: int = self.loaded.model.config.get_text_config().hidden_size
        return tokens * width * self.loaded.model.dtype.itemsize if self.reuse else 0

    def forget(self, task: str) -> None:
        """Give up the batches and the stream of a task, which is not scored any more."""
        for i in self._own(task) if task in self.packed else ():
            self._store.drop((task, i))
            self._inner.drop((task, i))
            self._last_block.drop((task, i))
            if self._graphs is not None:
                self._graphs.drop((task, i))
            self._readings.pop((task, i), None)
            self._batches.pop((task, i), None)
        self.packed.pop(task, None)

    def stop_keeping(self) -> None:
        """Keep no stream from now on, so that every pass runs every block, which gives the same numbers."""
        self._store.clear()
        self.keep_nothing_inside()
        self._give_up_graphs()
        self.reuse, self.block = False, 0

    def leave_device(self) -> None:
        """Keep no stream on the device any more, because memory ran out; what fits goes to host memory."""
        self._give_up_graphs()
        self._store.leave_device()
        self.keep_nothing_inside()

    def keep_nothing_inside(self) -> None:
        """Keep no outputs inside the block at the frontier any more, because memory ran out."""
        self._inner.stop()

    def _give_up_graphs(self) -> None:
        if self._graphs is not None:
            self._graphs.clear()

    def advance(self, block: int) -> None:
        """Move the frontier to the boundary before `block`. The weights of earlier blocks must be the unedited ones."""
        if not self.reuse or block == self.block:
            return
        self._inner.clear()
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
            assert isinstance(batch, WholeBatch)
            kept = Kept(self._n_encoder, (), self._encode(batch, kept))
        if block == self._n_encoder:
            return kept
        captured: list[Any] = []

        def capture(module: torch.nn.Module, args: tuple, output: Any) -> None:
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
        """Return the output of the encoder of an encoder-decoder, [B, S, d]."""
        inputs = batch.model_inputs(self.loaded.device)
        with self._resumed(kept):
            encoder = self.loaded.model.get_encoder()
            return encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]

    @contextmanager
    def _resumed(self, kept: Kept) -> Iterator[None]:
        """Replace the blocks before the kept stream by stubs that return it."""
        first = self._n_encoder if kept.encoded is not None else 0

        def stub(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return kept.output if len(kept.output) > 1 else kept.output[0]

        with ExitStack() as stack:
            for block in self.loaded.blocks[first : kept.block]:
                stack.enter_context(forward_replaced(block, stub))
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
        plain = isinstance(batch, Batch) and batch.last is None
        flex = isinstance(batch, Batch) and batch.block_mask is not None
        with without_waiting() if plain else flex_attention(self.loaded.model) if flex else nullcontext():
            return self.loaded.model(**inputs)

    @torch.inference_mode()
    def _score_batch(self, key: tuple[str, int], needs_rank: bool, edited: Sequence[Matrix] = ()) -> Results:
        with self._last_block.at(key, self._readings[key].rows, self._batches[key].input_ids.shape):
            return self._resumed_pass(key, needs_rank, edited)

    def _resumed_pass(self, key: tuple[str, int], needs_rank: bool, edited: Sequence[Matrix]) -> Results:
        """Score a batch. If memory runs out beside the outputs kept inside the block, do it once more without them."""
        block = self._store.get(key).block
        inside = any(one.block == block for one in edited) and all(one.block >= block for one in edited)
        if not inside or not self._inner.keeps or self._last_block.compares(key):
            return self._pass(key, needs_rank)
        try:
            with self._inner.resumed(key, block, edited):
                return self._pass(key, needs_rank)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # This is outside of the except clause, in which the traceback would keep the tensors of the failed pass.
        self._inner.stop()
        release_memory()
        return self._pass(key, needs_rank)

    def _pass(self, key: tuple[str, int], needs_rank: bool) -> Results:
        reading = self._readings[key]
        hidden = self._final_hidden(self._batches[key], self._store.get(key))
        hidden = hidden.to(self._reading_device, non_blocking=True)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, reading.rows)
        return read(self._read_head, rows, reading, needs_rank)

    def _final_hidden(self, batch: Batch | WholeBatch, kept: Kept) -> torch.Tensor:
        """Return what enters the output head, [B, T, d], without running the head; of a classifier its logits."""
        if self._head is None:
            with self._resumed(kept):
                return self._forward(batch, kept).logits
        captured: list[torch.Tensor] = []

        def keep(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            captured.append(hidden_states)
            return hidden_states[..., :1]

        with self._resumed(kept), forward_replaced(self._head, keep):
            self._forward(batch, kept)
        return captured[0]
