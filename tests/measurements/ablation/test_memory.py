"""Where memory runs out: what is given up, what is decomposed again, and what the search for a batch counts."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from harness.evaluation.batch_size import _kept_bytes
from harness.evaluation.scoring import Scorer
from harness.evaluation.settings import GIB, RuntimeSettings
from harness.measurements.ablation import cell_run, measure
from harness.measurements.ablation.tables import cell_states, read_metrics
from harness.models import decompositions
from harness.models.decompositions import DecompositionCache, size_of
from harness.models.loading import loaded_from
from harness.models.memory import DECOMPOSITIONS_ON_CPU, decomposition_bytes
from harness.models.targets import TargetSettings, expand_targets
from harness.spectral.decomposition import decompose
from tests.evaluation.test_scoring import requests_for, task
from tests.models.tiny import tiny_model
from tests.studies import ROOT, SMALL, assert_same_tables, run_here

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that are decomposed."""
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(decompositions, "decompose", lambda w: found.append(tuple(w.shape)) or decompose(w))
    return found


def _down_proj(n_blocks: int):
    loaded = loaded_from(tiny_model("llama", num_hidden_layers=n_blocks))
    matrices = [matrix for matrix in loaded.matrices if matrix.layer_type == "down_proj"]
    return loaded, matrices, size_of(decompose(matrices[0].read(loaded.model)))


@pytest.mark.parametrize("missing, again", [(1, 0), (2, 1), (3, 2)])
def test_a_target_that_exceeds_the_budget_keeps_what_fits(counted, missing: int, again: int) -> None:
    """Each region of the target asks for all of its matrices in turn, which a cache of the latest ones never serves.

    The budget of 4,294,967,296 bytes for Llama-3-8B's 32 down_proj of 4,296,015,872 bytes is the first case.
    """
    loaded, matrices, size = _down_proj(8)
    cache, regions = DecompositionCache(loaded, (8 - missing) * size), 5
    for _ in range(regions):
        cache.expect([matrix.name for matrix in matrices])
        for matrix in matrices:
            cache(matrix)
    assert len(counted) == 8 + again * (regions - 1)


def test_what_is_not_expected_any_more_goes_first(counted) -> None:
    loaded, matrices, size = _down_proj(8)
    cache = DecompositionCache(loaded, 4 * size)
    for target in (matrices[:4], matrices[4:]):
        for _ in range(3):
            cache.expect([matrix.name for matrix in target])
            for matrix in target:
                cache(matrix)
    assert len(counted) == 8


def test_experts_that_would_not_be_kept_are_not_decomposed_ahead(monkeypatch) -> None:
    loaded = loaded_from(tiny_model("olmoe", num_experts=8))
    experts = [matrix for matrix in loaded.matrices if matrix.expert is not None and matrix.layer_type == "up_proj"][:8]
    found, real = [], decompositions.decompose_many
    monkeypatch.setattr(decompositions, "decompose_many", lambda w: found.append(len(w)) or real(w))
    monkeypatch.setattr(decompositions, "decompose", lambda w: found.append(1) or decompose(w))
    cache = DecompositionCache(loaded, 4 * size_of(decompose(experts[0].read(loaded.model))))
    for _ in range(3):
        cache.expect([matrix.name for matrix in experts])
        for matrix in experts:
            cache(matrix)
    assert sum(found) <= 8 + 2 * 4


def test_the_default_budget_follows_the_free_memory_of_a_gpu(monkeypatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    assert decomposition_bytes(None, cuda) == 53 * GIB
    assert decomposition_bytes(None, cuda, stream=6 * GIB) == 50 * GIB
    assert decomposition_bytes(None, cuda, stream=200 * GIB) == 0
    assert decomposition_bytes(1.5, cuda) == 1.5 * GIB
    assert decomposition_bytes(None, torch.device("cpu")) == DECOMPOSITIONS_ON_CPU == 4 * GIB


def _fail_edits(monkeypatch, failures: int, where: str) -> list[str]:
    """Let the first edits of 0.up_proj run out of memory, before it or in a decomposition."""
    tried: list[str] = []
    real = cell_run.ablated

    def ablated(loaded, ablation, decompose, edit):
        if ablation.target.label != "0.up_proj":
            return real(loaded, ablation, decompose, edit)
        tried.append(ablation.region.label)
        if len(tried) > failures:
            return real(loaded, ablation, decompose, edit)
        if where == "edit":
            raise OUT

        def fail(matrix):
            raise torch.linalg.LinAlgError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED")

        return real(loaded, ablation, fail, edit)

    monkeypatch.setattr(cell_run, "ablated", ablated)
    return tried


@pytest.mark.parametrize("where", ["edit", "decomposition"])
@pytest.mark.parametrize("failures", [1, 2, 3])
def test_an_edit_without_memory_is_tried_again(clean_small, tmp_path, monkeypatch, where: str, failures: int) -> None:
    """First without outputs inside the block, then without kept decompositions and stream; no number changes."""
    tried = _fail_edits(monkeypatch, failures, where)
    assert_same_tables(run_here(SMALL, tmp_path / "study"), clean_small)
    assert len(set(tried[: failures + 1])) == 1


def test_an_edit_that_never_fits_is_an_error_row(tmp_path, monkeypatch) -> None:
    tried = _fail_edits(monkeypatch, 4, "decomposition")
    folder = run_here(SMALL, tmp_path / "study")
    table = read_metrics(folder)
    failed = table[table["status"] == "error"]
    assert set(failed["target"]) == {"0.up_proj"} and set(failed["region"]) == {tried[0]}
    assert failed["error"].str.contains("CUSOLVER_STATUS_ALLOC_FAILED").all()
    assert list(cell_states(folder).values()).count("error") == 2  # tasks


@pytest.mark.parametrize("edit", ["weight", "branch"])
def test_the_search_for_a_batch_counts_what_an_edit_holds(edit: str) -> None:
    """The originals of the largest target, 14 GB for `all` of an 8B model, or the factors of its branches."""
    loaded = loaded_from(tiny_model("llama"))
    runtime = RuntimeSettings(edit=edit, decomposition_gib=0.0)
    scorer = Scorer(loaded, {"task": task(requests_for("llama"))}, runtime.scoring())
    base = _kept_bytes(loaded, scorer, runtime)
    for kind in ("matrix", "type", "all"):
        targets = expand_targets(TargetSettings(kind), loaded.matrices)
        shapes = {matrix.name: matrix.shape for matrix in loaded.matrices}
        expected = 0
        for target in targets:
            size = 0
            for out, width in (shapes[name] for name in target.matrices):
                rank = min(out, width) // 2
                size += 4 * (out * width if edit == "weight" else rank * out if out <= width else rank * (out + width))
            expected = max(expected, size)
        assert _kept_bytes(loaded, scorer, runtime, targets) - base == expected > 0


def test_the_search_passes_the_targets_on(tmp_path, monkeypatch) -> None:
    found = []
    monkeypatch.setattr(measure, "largest_batch", lambda loaded, tasks, runtime, targets: found.extend(targets) or 512)
    run_here([*SMALL, "runtime.batch_tokens=null", "target=all"], tmp_path / "study")
    assert {target.kind for target in found} >= {"baseline", "all"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_real_errors_of_a_gpu_are_recognised(tmp_path) -> None:
    """What torch and cuSOLVER say when half of the memory is not enough."""
    from harness.models.memory import is_out_of_memory, release_memory

    device = torch.device("cuda")
    hold = torch.empty(int(0.97 * torch.cuda.mem_get_info(device)[0]), dtype=torch.uint8, device=device)
    try:
        with pytest.raises(Exception) as caught:
            held = []
            for size in (1024, 4096, 8192, 16384, 32768):
                held.append(torch.linalg.eigh(torch.eye(size, dtype=torch.float64, device=device)))
        assert is_out_of_memory(caught.value)
    finally:
        del hold, held
        release_memory()


PASSES = """
import resource
import torch
from harness.models.memory import keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = min(faults() for _ in range(3))
with keeping_freed_memory():
    print(sorted(faults() for _ in range(40))[20], outside)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_a_pass_finds_the_memory_that_the_pass_before_it_freed() -> None:
    """Page faults of making and freeing 64 MiB, in a new process, whose heap has no room of that size.

    Outside of the context every page is asked for again. Inside none is, once the heap has found its shape, which takes
    it up to five times.
    """
    done = subprocess.run([sys.executable, "-c", PASSES], capture_output=True, text=True, cwd=ROOT, check=True)
    inside, outside = map(int, done.stdout.split())
    pages = 2**26 // resource.getpagesize()
    assert inside < pages / 20 and outside > pages / 2
