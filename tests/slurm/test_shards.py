"""Studies on a real Slurm: the table of one process, chunks of arrays, and faults after which a shard or a rerun goes
on to that same table."""

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from harness.cli import main
from harness.engine.slurm import live_shards, submit
from harness.engine.submission import Record, read_record, submissions
from harness.errors import InputError
from harness.measurements import ABLATION, find
from harness.measurements.ablation.tables import TABLES, read_metrics
from harness.tables.store import write_unit
from tests import warm
from tests.checkpoints import ioi_file, save_checkpoint
from tests.slurm.cluster import MAX_ARRAY_SIZE, NODES, Cluster
from tests.studies import (
    LONG,
    N_LONG,
    N_SMALL,
    ROOT,
    SMALL,
    assert_same_spectra,
    assert_same_tables,
    config_of,
    harness,
    n_rows,
    run_here,
    settings,
    start,
    status_of,
    stop_half_done,
    wait_until,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
# Shards whose warning, of 60 s, comes long after they are done.
CLUSTER = ["cluster.time_minutes=10", "cluster.signal_seconds=60", "cluster.cpus_per_task=1",
           "cluster.poll_seconds=0.3"]


@pytest.fixture(autouse=True, scope="module")
def commands_find_the_cluster(slurm: Cluster) -> Iterator[None]:
    """Slurm's commands of this process, and of those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


def warm_shards() -> str:
    """The setting by which shards start without importing anything. The process of such a shard cannot be stopped."""
    return f"cluster.python={warm.python()}"


def submit_here(overrides: list[str], folder: Path, *more: str) -> str:
    """`harness submit` in this process; what it said."""
    said: list[str] = []
    plan = ABLATION.units.plan(config_of(overrides, folder, *CLUSTER, *more))
    submit(ABLATION, plan, find, said.append)
    return "\n".join(said)


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("shards/*/logs/*_log.err")))


def wait_for(folder: Path, condition, timeout: float = 400) -> None:
    wait_until(condition, lambda: f"{live_shards(folder)}\n{status_of(folder)}\n{logs(folder)}", timeout)


def wait_for_end(folder: Path) -> None:
    wait_for(folder, lambda: not live_shards(folder))


def worker_pid(job: str) -> int | None:
    """The process that runs a shard; None before it is there."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            environment = dict(one.partition(b"=")[::2] for one in (entry / "environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if b"submitit.core._submit" in command and b"srun" not in command[0]:
            if job in (f"{environment.get(b'SLURM_ARRAY_JOB_ID', b'').decode()}_"
                       f"{environment.get(b'SLURM_ARRAY_TASK_ID', b'').decode()}",
                       environment.get(b"SLURM_JOB_ID", b"").decode()):
                return int(entry.name)
    return None


def test_two_nodes_give_the_table_of_one_process(slurm, clean_small, tmp_path):
    """The table of one process, which is also that of two ranks (tests/engine/test_ranks.py), although the YAML that
    the study was composed from changes before the shards start."""
    folder, configs, gate = tmp_path / "study", tmp_path / "configs", tmp_path / "gate"
    (configs / "region").mkdir(parents=True)
    yaml = configs / "region" / "mine.yaml"
    yaml.write_text("by: decile\ndeciles: [1, 5, 10]\n")
    overrides = ["region=mine" if one == "region=decile" else one for one in SMALL if "deciles" not in one]
    command = [
        warm.python(), "-m", "harness", "submit", f"--config-dir={configs}", *settings(overrides, folder, *CLUSTER),
        "cluster.shards=2", "cluster=slurm_gpu", "cluster.gres=gpu:2", warm_shards(),
        f"cluster.setup=['while [ ! -e {gate} ]; do sleep 0.1; done']",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 shards, Slurm job" in done.stderr
    yaml.write_text("by: decile\ndeciles: [2]\n")
    wait_for(folder, lambda: {shard.state for shard in live_shards(folder)} == {"RUNNING"})
    text = status_of(folder)
    assert f"units {N_SMALL}  done 0  running {N_SMALL}  pending 0  failed 0  missing 0" in text
    assert "shards 2  running 2" in text
    # what is queued is not submitted twice
    assert f"0 to submit, {N_SMALL} queued or running" in submit_here(SMALL, folder)
    gate.touch()
    wait_for_end(folder)
    assert_same_tables(folder, clean_small)
    (submission,) = submissions(folder)
    records = [read_record(folder, submission.name, index) for index in range(2)]
    assert [(record.starts, record.ended) for record in records] == [(1, "done")] * 2
    # gres=gpu:2 is all that a node has, so the shards ran on two nodes
    assert {record.host for record in records} == set(NODES)
    assert f"done {N_SMALL}  running 0" in status_of(folder)


def test_more_shards_than_an_array_may_have(slurm, tmp_path):
    """Two arrays. Their jobs end without a word (`true` instead of Python), which status tells."""
    folder = tmp_path / "study"
    said = submit_here(SMALL, folder, f"cluster.shards={MAX_ARRAY_SIZE + 1}", "cluster.python='true'")
    assert f"{MAX_ARRAY_SIZE + 1} shards, Slurm jobs " in said
    arrays = said.split("Slurm jobs ")[1].split(";")[0].split(", ")
    wait_for_end(folder)
    assert [len(slurm.states(int(job))) for job in arrays] == [MAX_ARRAY_SIZE, 1]
    (submission,) = submissions(folder)
    cells = [cell for shard in submission.shards for cell in shard]
    assert len(submission.shards) == MAX_ARRAY_SIZE + 1 and sorted(cells) == list(range(N_SMALL))
    text = status_of(folder)
    assert f"shards {MAX_ARRAY_SIZE + 1}  lost {MAX_ARRAY_SIZE + 1}" in text and f"missing {N_SMALL}" in text


def test_what_slurm_refuses_is_one_line(tmp_path):
    with pytest.raises(InputError, match="sbatch refused the shards: .*invalid partition.*check the cluster settings"):
        submit_here(SMALL, tmp_path / "study", "cluster.partition=nowhere")


def half_done(folder: Path, *more: str) -> tuple[str, int]:
    """Submit LONG as one shard, and stop it (SIGSTOP) with some of its cells done; its job and its process."""
    submit_here(LONG, folder, "cluster.shards=1", *more)
    return stop_shard(folder)


def stop_shard(folder: Path) -> tuple[str, int]:
    (shard,) = live_shards(folder)
    return shard.job, stop_half_done(lambda: worker_pid(shard.job), folder, 3, lambda: logs(folder))


def check_went_on(folder: Path, clean: Path, starts: int = 2) -> Record:
    """The shard was started anew, did no cell twice, and gave the clean table; its record."""
    (submission,) = submissions(folder)
    record = read_record(folder, submission.name, 0)
    assert (record.starts, record.ended) == (starts, "done"), logs(folder)
    assert 3 <= record.done < N_LONG
    assert_same_tables(folder, clean)
    assert read_metrics(folder)["started_at"].nunique() == 2
    return record


@pytest.mark.fault("a shard is preempted, with a warning")
def test_preempted(slurm, clean_long, tmp_path):
    folder = tmp_path / "study"
    half_done(folder, "cluster.partition=lo", "cluster.options=['nodelist=n1']")
    # with its warning Slurm sends SIGCONT
    slurm.submit("true", "--partition=hi", "--nodelist=n1", "--exclusive", "--time=1", "--output=/dev/null")
    wait_for_end(folder)
    check_went_on(folder, clean_long)
    assert "signal USR2: requeueing job" in logs(folder)


@pytest.mark.fault("a shard is killed and requeued without a warning")
def test_requeued_without_warning(slurm, clean_long, tmp_path):
    folder = tmp_path / "study"
    job, pid = half_done(folder)
    slurm.run("scontrol", "requeue", job)
    # Slurm does so too, after SIGTERM and KillWait, in which a quick machine would come to the end
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_for_end(folder)
    check_went_on(folder, clean_long)
    assert "signal USR2" not in logs(folder)


@pytest.fixture(scope="module")
def at_its_time_limit(slurm: Cluster, tmp_path_factory) -> Iterator[Future]:
    """The folder of a study whose shard met its time limit, in a while. Slurm looks at the limits every 30 s: while
    other tests run, the shard is stopped until Slurm sends its signal, and SIGCONT with it."""
    folder = tmp_path_factory.mktemp("limit") / "study"

    def meet_the_limit(job: str, pid: int) -> Path:
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        wait_for(folder, lambda: not Path(f"/proc/{pid}").exists())
        wait_for(folder, lambda: [shard.state for shard in live_shards(folder)] == ["PENDING"])
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
        wait_for_end(folder)
        return folder

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(meet_the_limit, *half_done(folder, "cluster.partition=hi", "cluster.options=['nodelist=n2']"))


@pytest.mark.fault("SIGKILL of a shard")
def test_killed_shard(slurm, at_its_time_limit, clean_long, tmp_path):
    folder = tmp_path / "study"
    os.kill(half_done(folder)[1], signal.SIGKILL)
    wait_for_end(folder)
    left = N_LONG - n_rows(folder)
    assert left > 0
    text = status_of(folder)
    assert f"missing {left}" in text and "shards 1  lost 1" in text and "harness submit command again" in text
    assert f"{left} to submit" in submit_here(LONG, folder, "cluster.shards=1", warm_shards())
    wait_for_end(folder)
    assert_same_tables(folder, clean_long)


@pytest.mark.fault("SIGKILL of the submitting side while it waits")
def test_killed_while_waiting(clean_long, tmp_path):
    folder, log = tmp_path / "study", tmp_path / "log"
    command = harness("submit", *settings(LONG, folder, *CLUSTER, "cluster.shards=1", "cluster.wait=true"))
    process = start(*command, env=dict(os.environ), log=log)
    frozen = folder / "manifest.json"
    wait_until(lambda: process.poll() is not None or (frozen.exists() and live_shards(folder)), log.read_text)
    pid = stop_shard(folder)[1]
    assert process.poll() is None, log.read_text()
    process.kill()
    process.wait(30)
    os.kill(pid, signal.SIGCONT)
    wait_for_end(folder)
    assert_same_tables(folder, clean_long)
    assert "0 to submit" in submit_here(LONG, folder)


@pytest.mark.fault("SIGKILL of the submitting side before Slurm has the jobs")
def test_killed_while_submitting(clean_small, tmp_path, monkeypatch):
    folder, log, asked = tmp_path / "study", tmp_path / "log", tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/bash\ntouch {asked}; exec sleep 100\n")
    sbatch.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    process = start(*harness("submit", *settings(SMALL, folder, *CLUSTER)), env=environment, log=log)
    wait_until(lambda: process.poll() is not None or asked.exists(), log.read_text)
    assert process.poll() is None, log.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert f"missing {N_SMALL}" in status_of(folder)
    said = submit_here(SMALL, folder, "cluster.shards=1", warm_shards())
    assert f"{N_SMALL} to submit, 0 queued or running" in said
    wait_for_end(folder)
    assert_same_tables(folder, clean_small)


def test_failed_cells_when_asked(slurm, clean_small, tmp_path):
    """Cells with error rows are left alone, and tried once more with cluster.retry_failed=true."""
    folder = tmp_path / "study"
    run_here(SMALL, folder)
    metrics = read_metrics(folder)
    row = metrics[metrics["target"] == "1.up_proj"].iloc[0]
    for table in ("metrics", "examples"):
        (folder / table / f"{row.cell_id}.parquet").unlink()
    failed = {name: None if value != value else value for name, value in row.items()}
    failed |= {"status": "error", "error": "Traceback\nValueError: once", "value": None}
    write_unit(folder, TABLES, row.cell_id, {"metrics": [failed]}, row.study_id)
    assert "failed 1  missing 0" in status_of(folder) and "ValueError: once" in status_of(folder)
    assert "0 to submit" in submit_here(SMALL, folder)
    assert "1 to submit" in submit_here(SMALL, folder, "cluster.retry_failed=true", warm_shards())
    wait_for_end(folder)
    assert_same_tables(folder, clean_small)


def test_spectra_of_two_nodes_are_those_of_one_process(slurm, tmp_path, capsys):
    """The same machinery for another measurement: matrices of two sets of weights in two shards."""
    model = save_checkpoint(tmp_path / "model")
    words = ["model=pretrained", f"model.name={model}", "model.device=cpu", "init=both", "layer_types=[o_proj,mlp]",
             "threads=1"]
    folder = tmp_path / "spectra"
    capsys.readouterr()
    assert main(["submit", "spectra", *words, f"output={folder}", *CLUSTER, "cluster.shards=2", warm_shards()]) == 0
    said = capsys.readouterr().err
    assert ": 24 units, 24 to submit, 0 queued or running" in said and "2 shards, Slurm job" in said
    wait_for_end(folder)
    (submission,) = submissions(folder)
    assert [len(shard) for shard in submission.shards] == [12, 12]
    assert [read_record(folder, submission.name, index).ended for index in range(2)] == ["done"] * 2, logs(folder)
    text = status_of(folder)
    assert "units 24  done 24  running 0" in text and "  trained: done 12" in text and "  random: done 12" in text
    assert main(["spectra", "--quiet", *words, f"output={tmp_path / 'one'}"]) == 0
    assert_same_spectra(folder, tmp_path / "one")
    assert main(["submit", "spectra", *words, f"output={folder}", *CLUSTER, "cluster.wait=true"]) == 0
    assert "24 units, 0 to submit" in capsys.readouterr().err and len(submissions(folder)) == 1


def test_a_search_is_one_shard(slurm, tmp_path, capsys):
    """A stage needs those before it, so one job has them all, however many are asked for."""
    words = ["model=pretrained", f"model.name={save_checkpoint(tmp_path / 'model')}", "model.device=cpu",
             "target.layer_types=[up_proj]", "region=fraction", "region.kinds=[small]", "task=ioi",
             f"tasks.ioi.data_files={ioi_file(tmp_path / 'ioi.jsonl')}", "tasks.ioi.selection_share=0.5",
             "search.control_seeds=[0,1]", "runtime.threads=1"]
    folder = tmp_path / "search"
    capsys.readouterr()
    assert main(["submit", "search", *words, f"output={folder}", *CLUSTER, "cluster.shards=3", "cluster.wait=true",
                 warm_shards(), "--quiet"]) == 0
    assert "1 shards, Slurm job" in capsys.readouterr().err
    text = status_of(folder)
    assert "units 3  done 3  running 0  pending 0  failed 0  missing 0" in text, f"{text}\n{logs(folder)}"
    assert main(["search", "--quiet", *words, f"output={tmp_path / 'one'}"]) == 0
    for part in ("selection", "report"):
        assert_same_tables(folder / "studies" / part, tmp_path / "one" / "studies" / part)


@pytest.mark.fault("a shard meets its time limit")
def test_time_limit(at_its_time_limit, clean_long):
    folder = at_its_time_limit.result(timeout=800)
    check_went_on(folder, clean_long)
    assert "signal USR2: requeueing job" in logs(folder)
