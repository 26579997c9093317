"""Small studies of the embedded model to run, kill and rerun; and when two tables are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from harness.engine.manifest import read_manifest
from harness.engine.run import RunOptions, run
from harness.engine.status import describe_status
from harness.measurements import ABLATION, compose_settings, find
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.tables import cell_states, read_examples, read_metrics
from harness.measurements.spectra.tables import read_spectra

ROOT = Path(__file__).parents[1]
# Where and when a cell ran; everything else must be the same to the last bit.
CIRCUMSTANCES = ["seconds", "started_at", "rank", "hostname", "git_commit"]
MODEL = ["model.recall.dim=16", "model.recall.hidden_dim=32", "model.recall.context_length=32", "model.recall.steps=20"]
SMALL = [*MODEL, "tasks.recall.n_sequences=8", "+tasks.noisy={kind: recall, n_sequences: 8, noise: 0.9}",
         "target.layer_types=[v_proj,up_proj,down_proj]", "region=decile", "region.deciles=[1,5,10]",
         "runtime.threads=1"]
N_SMALL = 2 * (1 + 1 + 6 * 3)  # tasks x (baseline, control, matrices x deciles)


# Of which a cell takes some hundredths of a second, so that it can be stopped between its first and last row.
LONG = [*MODEL, "tasks.recall.n_sequences=800", "target.layer_types=[up_proj,down_proj]", "region=decile",
        "region.controls=[]", "runtime.threads=1"]
N_LONG = 1 + 4 * 10


def settings(overrides: list[str], folder: Path, *more: str) -> list[str]:
    """With its output folder, and the trained model kept beside it."""
    return [*overrides, f"model.recall.cache_dir={folder.parent / 'trained'}", f"output={folder}", *more]


def config_of(overrides: list[str], folder: Path, *more: str) -> StudySettings:
    return compose_settings("ablation", settings(overrides, folder, *more))


def quiet(said: list[str] | None = None) -> RunOptions:
    """Options of a run without progress bars; what it says goes to `said`."""
    return RunOptions(progress=False, say=(lambda line: None) if said is None else said.append, tidy=True)


def run_settings(config: StudySettings) -> Path:
    return run(ABLATION, config, quiet()).folder


def run_here(overrides: list[str], folder: Path) -> Path:
    return run_settings(config_of(overrides, folder))


def status_of(folder: Path, failed: bool = False) -> str:
    """What `harness status` says of a run of any kind."""
    manifest = read_manifest(folder)
    return describe_status(find(manifest.kind), folder, manifest, failed)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def start(*command: str, env: dict[str, str] | None = None, log: Path) -> subprocess.Popen:
    """A process of its own session, its output in `log`; `harness` in `command` is this checkout's."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env=env or environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )


def harness(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harness", *arguments]


def wait_until(condition: Callable[[], object], what: Callable[[], str], timeout: float = 400) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"after {timeout} s: {what()}"
        time.sleep(0.02)


def stop_half_done(find: Callable[[], int | None], folder: Path, rows: int, what: Callable[[], str]) -> int:
    """Let the process that `find` finds (its id) run in short slices until there are so many rows; it is stopped
    (SIGSTOP) then. Returns its id. Does not depend on how fast the machine is."""
    wait_until(find, what)
    pid = find()
    end = time.monotonic() + 400
    while True:
        os.kill(pid, signal.SIGSTOP)
        if n_rows(folder) >= rows:
            return pid
        assert time.monotonic() < end, what()
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)


def n_rows(folder: Path) -> int:
    return len(cell_states(folder))


def assert_same_tables(one: Path, other: Path) -> None:
    """Both tables, every cell done, every column but the circumstances, values compared exactly."""
    tables = [read_metrics(folder) for folder in (one, other)]
    for table in tables:
        assert set(table["status"]) == {"ok"}, list(table["error"].dropna())[:1]
    pd.testing.assert_frame_equal(*(table.drop(columns=CIRCUMSTANCES) for table in tables), check_exact=True)
    pd.testing.assert_frame_equal(read_examples(one), read_examples(other), check_exact=True)


def assert_same_spectra(one: Path, other: Path) -> None:
    """All three tables, every matrix done, every column but the circumstances, values compared exactly."""
    for name in ("matrices", "singular_values", "vectors"):
        tables = [read_spectra(folder, name) for folder in (one, other)]
        assert name != "matrices" or all(set(table["status"]) == {"ok"} for table in tables)
        circumstances = [*CIRCUMSTANCES, "seconds_decomposition", "seconds_statistics"]
        tables = [table.drop(columns=circumstances, errors="ignore") for table in tables]
        assert len(tables[0])
        pd.testing.assert_frame_equal(*tables, check_exact=True)
