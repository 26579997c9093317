"""Work on a frozen run, the commands around it, and the settings of a cluster."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.cli import main
from harness.engine import run, slurm
from harness.engine.manifest import freeze
from harness.engine.preemption import requeue_on
from harness.engine.slurm import watch
from harness.engine.submission import Record, Submission, write_record, write_submission
from harness.engine.worker import run_shard, work
from harness.errors import InputError
from harness.measurements import ABLATION, compose_settings, find
from harness.measurements.ablation.cell_run import CellRun
from harness.tables.store import list_table
from tests.studies import (
    N_SMALL,
    SMALL,
    assert_same_tables,
    config_of,
    environment,
    n_rows,
    quiet,
    run_here,
    settings,
    status_of,
)


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = ABLATION.units.plan(config_of(SMALL, tmp_path / "study"))
    freeze(ABLATION, plan)
    return plan.folder


def test_shards_one_after_the_other(frozen, clean_small):
    counts = []
    for shard in range(3):
        outcome = work(frozen, find, shard, 3, quiet())
        counts.append(n_rows(frozen))
        assert (outcome.folder, outcome.failed) == (frozen, 0) and outcome.done == counts[-1] - sum(counts[-2:-1])
    assert counts == sorted(set(counts)) and counts[0] > 0 and counts[2] == N_SMALL
    said = []
    assert work(frozen, find, options=quiet(said)).done == N_SMALL  # nothing is left
    assert len(said) == 1 and f": {N_SMALL} units, {N_SMALL} done, in " in said[0]
    assert_same_tables(frozen, clean_small)


def test_work_command(frozen, capsys):
    assert main(["work", str(frozen), "--shard", "3", "--of", "3"]) == 2
    assert capsys.readouterr().err == "harness: --shard: 3 of 3 shards is not there; shards are 0 to 2\n"
    assert main(["work", str(frozen), "--shard", "0", "--of", "30", "--quiet"]) == 0
    assert 0 < n_rows(frozen) < N_SMALL


def test_compact_command_and_the_end_of_a_large_run(clean_small, tmp_path, monkeypatch, capsys):
    folder = run_here(SMALL, tmp_path / "study")
    assert len(list_table(folder, "metrics").done) == N_SMALL
    assert main(["compact", str(folder)]) == 0
    assert capsys.readouterr().out == f"metrics: {N_SMALL} files merged, examples: {N_SMALL} files merged\n"
    assert_same_tables(folder, clean_small)
    assert main(["compact", str(tmp_path)]) == 2
    assert "holds nothing that harness can read (no manifest.json)" in capsys.readouterr().err
    monkeypatch.setattr(run, "LOOSE_FILES", N_SMALL - 1)
    large = run_here(SMALL, tmp_path / "large")
    assert not list_table(large, "metrics").done and len(list_table(large, "metrics").merged) == 1
    assert_same_tables(large, clean_small)


def test_a_shard_that_never_gets_on_gives_up(frozen, monkeypatch):
    """Two starts that met the time limit with nothing to show for it, and no third."""
    monkeypatch.setattr("harness.engine.status.live_by_shard", lambda folder: None)
    write_submission(frozen, Submission("s", "id", {"time_minutes": 7, "signal": "USR2", "signal_seconds": 60},
                                        [list(range(N_SMALL))]))
    write_record(frozen, "s", 0, Record("1", "n1", "log", "then", 2, 0, 1, "time limit"))
    with pytest.raises(InputError, match="cluster.time_minutes: 2 starts of 7 minutes ended no unit; give more"):
        run_shard(frozen, "s", 0, find)
    assert n_rows(frozen) == 0
    text = status_of(frozen)
    assert "stopped, 0 of 40 units done" in text and "give more" in text and "squeue does not answer" in text
    # a preemption is no fault of the shard's
    write_record(frozen, "s", 0, Record("1", "n1", "log", "then", 2, 0, 1, "preempted"))
    assert run_shard(frozen, "s", 0, find) == "done"
    assert n_rows(frozen) == N_SMALL


def test_a_shard_says_in_its_log_that_units_failed(frozen, monkeypatch, capsys):
    """And tries them again only when it was submitted to do so."""
    real = CellRun._measure

    def failing(cell_run, cell, *arguments):
        if cell.ablation.target.label == "0.up_proj":
            raise ValueError("a bug in this cell")
        return real(cell_run, cell, *arguments)

    monkeypatch.setattr(CellRun, "_measure", failing)
    cluster = {"time_minutes": 7, "signal": "USR2", "signal_seconds": 60}
    write_submission(frozen, Submission("s", "id", cluster, [list(range(N_SMALL))]))
    said = f"6 of {N_SMALL} units failed; harness status {frozen} --failed shows why"
    assert run_shard(frozen, "s", 0, find) == "done" and said in capsys.readouterr().err.splitlines()
    monkeypatch.undo()
    assert run_shard(frozen, "s", 0, find) == "done" and said in capsys.readouterr().err.splitlines()
    monkeypatch.setattr("harness.engine.status.live_by_shard", lambda folder: None)
    assert "give the same harness submit command again (cluster.retry_failed=true: failed" in status_of(frozen)
    write_submission(frozen, Submission("t", "id", cluster, [list(range(N_SMALL))], retry_failed=True))
    assert run_shard(frozen, "t", 0, find) == "done" and "failed" not in capsys.readouterr().err
    assert f"done {N_SMALL}  running 0  pending 0  failed 0" in status_of(frozen)


SIGNALLED = """
import os, time
from harness.engine.preemption import requeue_on
requeue_on("USR2", lambda: os.write(1, b"before\\n"))
print("ready", flush=True)
try:
    time.sleep(60)
except Exception:
    print("an exception that a unit would catch")
"""


@pytest.mark.parametrize("answer", [0, 1], ids=["requeued", "refused"])
def test_signal(tmp_path, answer):
    """The job requeues itself and leaves by SystemExit; where Slurm refuses it says so."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/bash\necho $@ > {tmp_path}/asked; echo no such job >&2; kill $PPID; exit {answer}\n"
                        if not answer else f"#!/bin/bash\necho $@ > {tmp_path}/asked; echo no such job >&2; exit 1\n")
    scontrol.chmod(0o755)
    env = {**environment(), "SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    out, err = process.communicate(timeout=60)
    assert out == "before\n" and (tmp_path / "asked").read_text() == "requeue 77\n"
    assert "signal USR2: requeueing job 77" in err
    assert ("job 77 could not be requeued (no such job): submit again" in err) == bool(answer)


PRINTING = """
import io, os, signal, sys
from harness.engine.preemption import requeue_on
requeue_on("USR2")
class Raw(io.RawIOBase):
    def writable(self): return True
    def write(self, content):
        os.kill(os.getpid(), signal.SIGUSR2)  # the handler runs here, while the stream above is locked
        return os.write(2, content)
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw()))
print("a progress bar", file=sys.stderr, flush=True)
"""


def test_a_signal_in_the_middle_of_a_print(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/bash\necho $@ > {tmp_path}/asked; kill $PPID\n")
    scontrol.chmod(0o755)
    env = {**environment(), "SLURM_JOB_ID": "77", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", PRINTING], env=env, capture_output=True, text=True, timeout=60)
    assert "signal USR2: requeueing job 77" in done.stderr and "reentrant" not in done.stderr
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_outside_of_slurm_a_signal_is_left_alone(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR2)
    requeue_on("USR2")
    assert signal.getsignal(signal.SIGUSR2) is before


def test_waiting_survives_a_silent_controller(frozen, monkeypatch):
    answers = [InputError("squeue: no answer"), [object()], InputError("squeue: no answer"), []]

    def live_shards(folder):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "live_shards", live_shards)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert [left for _, left in watch(ABLATION, frozen, N_SMALL, 1)] == [-1, 1, -1, 0]
    answers[:] = [InputError("squeue: no answer")] * 30
    with pytest.raises(InputError, match=r"waiting: squeue: no answer \(20 times\); the jobs may still run"):
        list(watch(ABLATION, frozen, N_SMALL, 1))


@pytest.mark.parametrize(("override", "said"), [
    ("cluster.shards=0", "cluster.shards: 0 is wrong; it must be at least 1"),
    ("cluster.time_minutes=4", "4 is wrong; with cluster.signal_seconds=120 it must be at least 5"),
    ("cluster.signal=SIGUSR2", "cluster.signal: 'SIGUSR2' is wrong; it must be the name of a signal without SIG"),
    ("cluster.memory_gib=0", "cluster.memory_gib: 0 is wrong; it must be at least 0.1"),
    ("cluster.partitions=lo", "cluster.partitions: unknown key; did you mean 'partition'"),
])
def test_bad_settings_are_one_line(override, said):
    with pytest.raises(InputError) as refused:
        compose_settings("ablation", [override])
    assert said in str(refused.value)


def test_every_setting_reaches_sbatch(frozen, tmp_path, monkeypatch):
    """The script that submitit writes; sbatch only takes it."""
    for name, text in {"sbatch": "echo Submitted batch job 5", "srun": "true", "squeue": "true",
                       "scontrol": "echo 'MaxArraySize = 1001'"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    chosen = ["shards=3", "partition=p", "account=a", "qos=q", "gres=gpu:2", "constraint=c", "cpus_per_task=5",
              "memory_gib=1.5", "time_minutes=33", "signal=USR1", "signal_seconds=77", "array_parallelism=2",
              "setup=['module load x']", "python='apptainer exec y python'", "srun_args=['--container-image=z']",
              "options=['nodelist=n7','--exclusive']"]
    plan = ABLATION.units.plan(config_of(SMALL, frozen, *(f"cluster.{one}" for one in chosen)))
    slurm.submit(ABLATION, plan, find, lambda line: None)
    (script,) = frozen.glob("shards/*/logs/*_submission.sh")
    lines = script.read_text().splitlines()
    for option in ("partition=p", "account=a", "qos=q", "gres=gpu:2", "constraint=c", "cpus-per-task=5", "mem=1536M",
                   "time=33", "signal=USR1@77", "array=0-2%2", "nodelist=n7", "exclusive", "requeue"):
        assert f"#SBATCH --{option}" in lines, script.read_text()
    assert lines.index("module load x") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert any("--container-image=z apptainer exec y python -u -m submitit.core._submit" in line for line in lines)


def test_submit_without_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *settings(SMALL, tmp_path / "study")]) == 2
    assert capsys.readouterr().err == (
        "harness: sbatch: not found, is this a Slurm cluster? on one machine use harness run\n"
    )


def test_the_difference_that_is_named_is_one_that_matters(frozen):
    """Not the number of shards, though it stands before the seed."""
    with pytest.raises(InputError, match=r"holds another ablation .*; seed is 0 there, 1 here"):
        freeze(ABLATION, ABLATION.units.plan(config_of(SMALL, frozen, "seed=1", "cluster.shards=7")))
