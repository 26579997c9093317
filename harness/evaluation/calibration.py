"""The inputs of a model's matrices over a calibration text: measured in one pass, and kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from harness.evaluation.covariance import CovarianceStream
from harness.evaluation.gradients import loss_changes
from harness.evaluation.requests import PreparedTask, Request, ScoredTask, task_digest
from harness.files import replacing
from harness.models.decompositions import SUFFIX, DiskCache, make_room
from harness.models.identity import module_identity
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.treatment import Decompose
from harness.spectral.activations import InputCovariance

LOG = logging.getLogger(__name__)
CALIBRATION_VERSION = 1  # must be raised when a change of the code changes the statistics of the inputs
# Padded tokens of one forward pass. It is no setting, so that no number of a cell depends on it.
BATCH_TOKENS = 4096
RUN = 32  # tokens; so many that agree in order are the same text
FEWEST = 8  # shorter runs may agree by chance
MOST_COMMON = 0.1  # the largest share that a calibration text and the text of a task may have in common


@dataclass(frozen=True, eq=False)
class CalibrationText:
    """A text prepared for one model, over whose tokens the inputs of the matrices are measured.

    requests: the sequences. scored_only: whether only the positions that a request scores count, so that overlapping
    windows count each token once. centred: whether the metric is the covariance of the inputs, and not their second
    moment. protocol: how the text was made, as values for JSON. task: the task itself if its loss chooses parts of a
    change; the inputs of the matrices are then not measured.
    """

    requests: Sequence[Request]
    scored_only: bool
    centred: bool
    protocol: Mapping[str, Any]
    task: ScoredTask | None = None

    @property
    def n_tokens(self) -> int:
        """The number of tokens that count."""
        return sum(len(one.positions) if self.scored_only else len(one.tokens) for one in self.requests)

    def digest(self) -> str:
        """Return a digest of the tokens and of which of them count: it depends on nothing else of the text.

        That of a task is a digest of all that it asks.
        """
        if self.task is not None:
            return task_digest(self.task)
        found = hashlib.blake2b(f"{CALIBRATION_VERSION} {self.scored_only}".encode(), digest_size=16)
        for request in self.requests:
            for array in (request.tokens, request.positions if self.scored_only else np.arange(0)):
                found.update(len(array).to_bytes(8, "little"))
                found.update(np.asarray(array, dtype="<i8").tobytes())
        return found.hexdigest()

    def share_in(self, task: PreparedTask) -> float:
        """Return which share of this text is also in what a task asks, or of what it asks in this text.

        It is the larger of the two shares, in runs of RUN tokens, or of the longest sequence if that is shorter.
        """
        own = [request.tokens for request in self.requests]
        asked = [request.tokens for request in task.requests] if isinstance(task, ScoredTask) else task.inputs
        n = min(RUN, max(map(len, own), default=0), max(map(len, asked), default=0))
        if n < FEWEST:
            return 0.0
        ours, theirs = ([_run_hashes(tokens, n) for tokens in some] for some in (own, asked))
        return max(_share(ours, theirs, n), _share(theirs, ours, n))


def _share(some: Sequence[np.ndarray], there: Sequence[np.ndarray], n: int) -> float:
    """Return the share of the consecutive runs of `some` that are anywhere in `there`; both as `_run_hashes`."""
    consecutive = np.concatenate([hashes[::n] for hashes in some])
    return float(np.isin(consecutive, np.unique(np.concatenate(there))).mean())


def _run_hashes(tokens: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """Return a hash of every run of n tokens, uint64 [len(tokens) - n + 1]: a polynomial modulo 2^64."""
    array = np.asarray(tokens).astype(np.uint64)
    found = np.zeros(max(0, len(array) - n + 1), dtype=np.uint64)
    for start in range(n if len(found) else 0):
        found = found * np.uint64(0x9E3779B97F4A7C15) + array[start : start + len(found)] + np.uint64(1)
    return found


@dataclass(frozen=True)
class _Group:
    """The statistics of one block: the names of the matrices by the index of their input."""

    names: Mapping[str, int]
    inputs: Sequence[InputCovariance]


class Calibration:
    """The inputs of the matrices of a model over one calibration text: a `harness.models.treatment.Calibrated`.

    `prepare` measures the matrices that are new in one pass over the text, or finds on disk what an earlier pass has
    measured for the same weights, text and matrices. The statistics of one block are one file. It stays open, so that
    nobody can remove it while it is needed; without a cache on disk, the files are temporary ones.

    budget_bytes: memory for the factors that are kept.
    """

    def __init__(
        self, loaded: LoadedModel, text: CalibrationText, disk: DiskCache | None = None, budget_bytes: int = 2**30
    ) -> None:
        self.text, self._digest = text, text.digest()
        self._loaded, self._disk, self._budget = loaded, disk, budget_bytes
        self._files: dict[str, IO[bytes]] = {}  # matrix -> the open file of its block
        self._problem: Exception | None = None
        self._current: tuple[IO[bytes], _Group] | None = None
        self._factors: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()
        self._means: dict[str, Tensor] = {}
        self._energies: dict[tuple[str, bool], Tensor] = {}
        self._losses: dict[tuple[str, str], Tensor] = {}

    def prepare(self, matrices: Sequence[Matrix]) -> None:
        """Measure the inputs of these matrices if that is not yet done. The model must hold its unedited weights.

        If the pass fails, its exception is raised, now and at every later call.
        """
        by_block: dict[int, list[Matrix]] = {}
        for matrix in matrices:
            if matrix.name not in self._files:
                by_block.setdefault(matrix.block, []).append(matrix)
        if not by_block:
            return
        if self._problem is not None:
            raise self._problem
        try:
            self._measure(by_block)
        except Exception as problem:
            self._problem = problem
            raise

    def inputs(self, matrix: Matrix) -> InputCovariance:
        """Return the statistics of the inputs of one matrix, which was prepared, on the matrix's device.

        Raises ValueError if no token of the text entered it.
        """
        group = self._group(matrix)
        if matrix.name not in group.names:
            raise ValueError(f"no token of the calibration text enters {matrix.name}; use a longer text")
        found = group.inputs[group.names[matrix.name]]
        device = self._loaded.model.get_parameter(matrix.parameter).device
        return InputCovariance(found.mean.to(device), found.covariance.to(device), found.n_tokens)

    def key(self, matrix: Matrix) -> str:
        """Return a hash of the statistics of one matrix, and of whether they are centred."""
        from xxhash import xxh3_128

        found = self.inputs(matrix)
        digest = xxh3_128(f"{self.text.centred} {found.n_tokens}".encode())
        for tensor in (found.mean, found.covariance):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def mean(self, matrix: Matrix) -> Tensor:
        """Return the mean of the inputs of one matrix, float64 [in]."""
        if matrix.name not in self._means:
            self._means[matrix.name] = self.inputs(matrix).mean
        return self._means[matrix.name]

    def weight(self, matrix: Matrix) -> Tensor:
        """Return the weight [out, in] of one matrix as it is in the model now."""
        return matrix.read(self._loaded.model)

    def factor(self, matrix: Matrix, centred: bool | None = None) -> Tensor:
        """Return F with F F^T = C for the inputs of one matrix, as `InputCovariance.factor` does.

        centred: whether C is the covariance; None: as the text says.
        """
        which = (matrix.name, self.text.centred if centred is None else centred)
        if which not in self._factors:
            self._factors[which] = self.inputs(matrix).factor(which[1])
            while len(self._factors) > 1 and sum(one.nbytes for one in self._factors.values()) > self._budget:
                self._factors.popitem(last=False)
        self._factors.move_to_end(which)
        return self._factors[which]

    def output_energy(self, matrix: Matrix, centred: bool | None = None) -> Tensor:
        """Return |W F|^2 with the factor F of one matrix, a float64 scalar: the mean square of its outputs.

        The model must hold its unedited weight.
        """
        which = (matrix.name, self.text.centred if centred is None else centred)
        if which not in self._energies:
            outputs = self.weight(matrix).to(torch.float64) @ self.factor(matrix, centred)
            self._energies[which] = outputs.square().sum()
        return self._energies[which]

    def losses(self, matrices: Sequence[Matrix], decompose: Decompose, metric: str) -> Mapping[str, Tensor]:
        """Return the first-order change of the loss if each value of a spectrum is removed: matrix -> float64 [r].

        The loss is the mean negative log-probability of the text in nats per token. metric: the metric of the spectra
        that `decompose` returns. One backward pass over the text serves all matrices that are new. The model must hold
        its unedited weights.
        """
        new = [matrix for matrix in matrices if (metric, matrix.name) not in self._losses]
        if new:
            found = loss_changes(self._loaded, self.text.requests, new, decompose)
            self._losses |= {(metric, name): one for name, one in found.items()}
        return {matrix.name: self._losses[metric, matrix.name] for matrix in matrices}

    def shrink(self) -> None:
        """Give up the factors that are kept, and keep half as much from now on; try a pass that failed again."""
        self._factors.clear()
        self._budget //= 2
        self._problem = None

    def _measure(self, by_block: Mapping[int, Sequence[Matrix]]) -> None:
        keys = self._keys(by_block)
        missing = {}
        for block, members in by_block.items():
            file = self._open(keys[block]) if self._disk is not None else None
            if file is None:
                missing[block] = members
            else:
                self._files |= dict.fromkeys((matrix.name for matrix in members), file)
        if not missing:
            return
        stream = CovarianceStream(self._loaded, self.text.requests, self.text.scored_only, BATCH_TOKENS)
        for block in range(max(missing) + 1):
            found = stream.next_block(missing.get(block, []), experts=True)
            if block in missing:
                file = self._store(keys[block], found)
                self._files |= dict.fromkeys((matrix.name for matrix in missing[block]), file)
        if self._disk is not None:
            make_room(self._disk)

    def _keys(self, by_block: Mapping[int, Sequence[Matrix]]) -> dict[int, str]:
        """Return for each block a hash of the weights, the text, the matrices, and the kind of device."""
        model = self._loaded.model
        attention = getattr(model.config, "_attn_implementation", None)
        about = [CALIBRATION_VERSION, module_identity(model), attention, self._loaded.device.type, self._digest]
        return {block: hashlib.blake2b(json.dumps([*about, [m.name for m in members]]).encode(),
                                       digest_size=16).hexdigest() for block, members in by_block.items()}

    def _open(self, key: str) -> IO[bytes] | None:
        """Return the file of a key in the cache on disk if it is there and undamaged."""
        assert self._disk is not None
        path = self._disk.folder / f"{key}{SUFFIX}"
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            LOG.warning("runtime.cache_dir: cannot read %s (%s)", path, error)
            return None
        try:
            self._current = (file, _parse(file.read()))
            return file
        except Exception as error:  # what a damaged file raises is of any type
            LOG.warning("%s is damaged (%s): computed anew", path, error)
            file.close()
            return None

    def _store(self, key: str, found: Mapping[str, InputCovariance]) -> IO[bytes]:
        content = _packed(found)
        if self._disk is not None and len(content) <= self._disk.budget_bytes:
            path = self._disk.folder / f"{key}{SUFFIX}"
            try:
                with replacing(path, durable=False) as temporary:
                    temporary.write_bytes(content)
                    file = temporary.open("rb")
                return file
            except OSError as error:
                LOG.warning("runtime.cache_dir: cannot write to %s (%s)", self._disk.folder, error)
        spare: IO[bytes] = tempfile.TemporaryFile(prefix="harness-")
        spare.write(content)
        return spare

    def _group(self, matrix: Matrix) -> _Group:
        file = self._files[matrix.name]
        if self._current is None or self._current[0] is not file:
            file.seek(0)
            self._current = (file, _parse(file.read()))
        return self._current[1]


def _packed(found: Mapping[str, InputCovariance]) -> bytes:
    """Return the statistics of one block as the bytes of a safetensors file with a checksum."""
    from safetensors.torch import save

    distinct = list({id(one): one for one in found.values()}.values())
    place = {id(one): i for i, one in enumerate(distinct)}
    tensors = {f"{what}.{i}": getattr(one, what).cpu().contiguous() for i, one in enumerate(distinct)
               for what in ("mean", "covariance")}
    about = {"names": {name: place[id(one)] for name, one in found.items()},
             "n_tokens": [one.n_tokens for one in distinct], "checksum": _checksum(tensors)}
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    return save({**tensors, "about": text})


def _parse(content: bytes) -> _Group:
    """Return what `_packed` packed. Raises ValueError and others if the bytes are damaged."""
    from safetensors.torch import load

    tensors = load(content)
    about = json.loads(bytes(tensors.pop("about").numpy()))
    if _checksum(tensors) != about["checksum"]:
        raise ValueError("its checksum does not match")
    inputs = [InputCovariance(tensors[f"mean.{i}"], tensors[f"covariance.{i}"], n)
              for i, n in enumerate(about["n_tokens"])]
    return _Group(about["names"], inputs)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    from xxhash import xxh3_128

    digest = xxh3_128()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
