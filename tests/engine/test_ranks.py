"""The ranks of torchrun and of accelerate launch: two of them indeed, the same table as one process, nothing lost.

What does not need a launcher is forked (tests/processes.py), and so are the ranks of accelerate (tests/warm.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.engine.ranks import Ranks, join
from harness.engine.run import run_plan
from harness.errors import InputError
from harness.measurements import ABLATION
from harness.measurements.ablation.tables import read_metrics
from tests import warm
from tests.processes import run_ranks
from tests.studies import (
    MODEL,
    N_SMALL,
    SMALL,
    assert_same_tables,
    config_of,
    environment,
    n_rows,
    quiet,
    run_here,
    settings,
)

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "--local_addr=127.0.0.1"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def launched(launcher: str, overrides: list[str], folder: Path) -> str:
    """Standard error of a launched run."""
    ranks = TORCHRUN if launcher == "torchrun" else [*ACCELERATE, "--no_python", warm.python()]
    command = [*ranks, "-m", "harness", "run", "--quiet", *settings(overrides, folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_ranks_give_the_table_of_one_process(clean_small, tmp_path, launcher):
    folder = tmp_path / "study"
    launched(launcher, SMALL, folder)
    assert n_rows(folder) == N_SMALL
    assert_same_tables(folder, clean_small)
    by_rank = read_metrics(folder).groupby("rank")["cell_id"].nunique()
    # two processes indeed, and neither had next to nothing to do
    assert list(by_rank.index) == [0, 1] and by_rank.min() > N_SMALL / 4
    assert len(list((tmp_path / "trained" / "recall").iterdir())) == 1


def test_a_rank_that_fails_costs_only_its_own_cells(clean_small, tmp_path):
    """Rank 1 raises at its first cell; rank 0 does its share all the same, the launch fails, a rerun completes."""
    folder = tmp_path / "study"
    program = f"""
import os
from pathlib import Path
from harness.engine import run
from tests.studies import run_here
if os.environ["RANK"] == "1":
    def measure_units(*arguments): raise ValueError("rank 1 is broken")
    run.measure_units = measure_units
run_here({SMALL!r}, Path({str(folder)!r}))
"""
    done = run_ranks(program, 2, tmp_path / "log")
    assert done.returncode != 0 and "rank 1 is broken" in done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert 0 < n_rows(folder) < len(manifest["units"])
    assert set(read_metrics(folder)["rank"]) == {0}
    run_here(SMALL, folder)
    assert_same_tables(folder, clean_small)


# One ablation and its baselines on three ranks: fewer cells than ranks, many batches.
FEW = [*MODEL, "tasks.recall.n_sequences=24", "target.layer_types=[up_proj]", "target.blocks=[1]", "region=decile",
       "region.deciles=[1]", "region.controls=[]", "runtime.threads=1", "runtime.batch_tokens=128"]


def launched_program(program: str, overrides: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Three ranks that run `program` and then the study."""
    whole = f"""
import os
from pathlib import Path
import torch
from harness.engine import run
from harness.evaluation.scoring import Scorer
from harness.measurements import ABLATION
from harness.measurements.ablation import cell_run, measure
from tests.studies import config_of
RANK, FOLDER = os.environ["RANK"], Path({str(folder)!r})
real, calls = Scorer._score_batch, []
{program}
try:
    run.run(ABLATION, config_of({overrides!r}, FOLDER), run.RunOptions(progress=False))
finally:
    (FOLDER.parent / f"batches{{RANK}}").write_text(str(len(calls)))
"""
    return run_ranks(whole, 3, folder.parent / "log")


COUNT = """
def count(self, *arguments):
    calls.append(1)
    return real(self, *arguments)
Scorer._score_batch = count
"""


def test_fewer_cells_than_ranks_are_scored_by_all_together(tmp_path):
    folder = tmp_path / "study"
    done = launched_program(COUNT, FEW, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "on 3 processes, which measure each unit together" in done.stderr
    assert_same_tables(folder, run_here(FEW, tmp_path / "clean"))
    batches = [int((tmp_path / f"batches{rank}").read_text()) for rank in range(3)]
    assert min(batches) >= 8 and max(batches) - min(batches) <= 2 * 2


def test_adaptive_cells_are_divided_and_stop_where_one_process_stops(tmp_path):
    """The processes score some groups of examples at once, and those after the last that is needed count for nothing.
    """
    folder = tmp_path / "study"
    adaptive = [*FEW, "tasks.recall.n_sequences=600", "runtime.batch_tokens=1024", "runtime.precision=adaptive",
                "runtime.adaptive.absolute=0.3", "runtime.adaptive.min_examples=8"]
    done = launched_program(COUNT, adaptive, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "on 3 processes, which measure each unit together" in done.stderr
    assert_same_tables(folder, run_here(adaptive, tmp_path / "clean"))
    rows = read_metrics(folder)
    primary = rows[(rows["metric"] == "accuracy_clean") & (rows["precision"] == "adaptive")]
    assert len(primary) and (primary["n"] < primary["n_available"]).all()
    batches = [int((tmp_path / f"batches{rank}").read_text()) for rank in range(3)]
    assert min(batches) >= 8 and max(batches) - min(batches) <= 2 * 2


TROUBLE = """
def trouble(self, *arguments):
    calls.append(1)
    if RANK == "1" and {when}:
        {act}
    return real(self, *arguments)
Scorer._score_batch = trouble
"""


@pytest.mark.fault("one rank of three that score a cell together runs out of memory")
def test_one_of_several_ranks_without_memory(tmp_path):
    """All try the smaller batch together; the row says so."""
    clean, folder = run_here(FEW, tmp_path / "clean"), tmp_path / "study"
    program = TROUBLE.format(when="len(calls) == 6", act='raise torch.OutOfMemoryError("CUDA out of memory")')
    done = launched_program(program, FEW, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = read_metrics(folder), read_metrics(clean)
    assert set(ours["status"]) == {"ok"}
    used = ours["settings"].map(lambda text: json.loads(text).get("batch_tokens")).dropna()
    assert 0 < len(used) < len(ours) and set(used) == {32}
    np.testing.assert_allclose(ours["value"], theirs["value"], rtol=0, atol=2e-5)


@pytest.mark.fault("one rank of three that score a cell together cannot edit")
def test_one_of_several_ranks_that_cannot_edit(tmp_path):
    clean, folder = run_here(FEW, tmp_path / "clean"), tmp_path / "study"
    program = """
if RANK == "2":
    def ablated(*arguments): raise ValueError("a torn cache file")
    cell_run.ablated = ablated
"""
    done = launched_program(program, FEW, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    table = read_metrics(folder)
    failed = table[table["status"] == "error"]
    assert set(failed["target"]) == {"1.up_proj"} and set(table["target"]) == {"baseline", "1.up_proj"}
    assert all("a torn cache file" in error and "in process 2" in error for error in failed["error"])
    run_here(FEW, folder)
    assert_same_tables(folder, clean)


@pytest.mark.fault("SIGKILL of one of three ranks that score a cell together")
def test_killed_rank_of_a_divided_cell(tmp_path):
    clean, folder = run_here(FEW, tmp_path / "clean"), tmp_path / "study"
    done = launched_program(TROUBLE.format(when="len(calls) == 6", act="os.kill(os.getpid(), 9)"), FEW, folder)
    assert done.returncode != 0
    # the launcher then kills the process that writes, which may still hold the row of the baseline
    assert n_rows(folder) in (0, 1)
    run_here(FEW, folder)
    assert_same_tables(folder, clean)


def test_a_rank_that_skips_a_step_is_noticed_by_all(tmp_path):
    """Also where it waits at the end already, while the others wait for its part of a cell."""
    program = """
if RANK == "1":
    cell_run.CellRun.ablation = lambda *arguments: ()
"""
    done = launched_program(program, FEW, tmp_path / "study")
    assert done.returncode != 0 and "LostStep" in done.stderr
    assert n_rows(tmp_path / "study") == 1  # the baseline


@pytest.mark.fault("no room for the row of a cell that three ranks scored together")
def test_a_row_that_cannot_be_written_ends_all_ranks(tmp_path):
    folder = tmp_path / "study"
    program = """
write_unit, written = run.write_unit, []
def full(*arguments):
    written.append(1)
    if len(written) == 2: raise OSError(28, "No space left on device")
    write_unit(*arguments)
run.write_unit = full
"""
    done = launched_program(program, FEW, folder)
    assert done.returncode != 0 and "cannot write rows: " in done.stderr and "No space left on device" in done.stderr
    assert "LostStep" not in done.stderr and n_rows(folder) == 1
    run_here(FEW, folder)
    assert_same_tables(folder, run_here(FEW, tmp_path / "clean"))


def test_a_model_that_cannot_be_loaded_ends_every_rank(tmp_path):
    folder = tmp_path / "study"
    program = """
def load(*arguments): raise ValueError("a damaged checkpoint")
measure.load = load
"""
    done = launched_program(program, FEW, folder)
    assert done.returncode != 0 and "ValueError: a damaged checkpoint" in done.stderr
    assert [(tmp_path / f"batches{rank}").read_text() for rank in range(3)] == ["0"] * 3  # none was killed waiting


class TwoRanks(Ranks):
    """The first of two processes, which hears nothing of the second."""

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value] * self.n


def test_a_model_over_all_devices_is_for_one_process(tmp_path):
    config = config_of(SMALL, tmp_path / "study")
    config.model.device_map = "auto"  # the command line refuses it for the embedded model
    with pytest.raises(InputError, match="model.device_map: one process"):
        run_plan(ABLATION, ABLATION.units.plan(config), quiet(), TwoRanks(0, 2))
    assert not (tmp_path / "study").exists()


def test_without_a_launcher_there_is_one_rank():
    assert "WORLD_SIZE" not in os.environ
    ranks = join()
    assert (ranks.rank, ranks.n, ranks.is_main) == (0, 1, True)
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    ranks.wait()
