"""The local Slurm does what submission relies on: arrays over both nodes, GPUs, preemption by signal, requeue."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import GPUS_PER_NODE, MAX_ARRAY_SIZE, NODES, Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def test_array_runs_on_both_nodes_with_its_own_gpus(slurm: Cluster, tmp_path):
    # Three tasks of one GPU do not fit the two of one node; each waits for the others, so that all hold theirs at once.
    script = f"""
echo "$SLURMD_NODENAME $SLURM_ARRAY_TASK_ID $CUDA_VISIBLE_DEVICES" > {tmp_path}/part-$SLURM_ARRAY_TASK_ID
mv {tmp_path}/part-$SLURM_ARRAY_TASK_ID {tmp_path}/task-$SLURM_ARRAY_TASK_ID
for _ in $(seq 400); do [ $(ls {tmp_path} | grep -c task-) = 3 ] && exit 0; sleep 0.05; done
exit 1
"""
    job = slurm.submit(script, "--array=0-2", "--gres=gpu:1", "--time=1", f"--output={tmp_path}/%a.log")
    states = slurm.wait(job, "COMPLETED", "FAILED")
    assert states == {f"{job}_{task}": "COMPLETED" for task in range(3)}, slurm.log()
    rows = [(tmp_path / f"task-{task}").read_text().split() for task in range(3)]
    assert [task for _, task, _ in rows] == ["0", "1", "2"]
    assert {node for node, _, _ in rows} == set(NODES)
    held = [(node, gpu) for node, _, gpu in rows]
    assert len(set(held)) == 3 and {gpu for _, gpu in held} <= {str(gpu) for gpu in range(GPUS_PER_NODE)}


def test_a_step_spans_both_nodes(slurm: Cluster):
    output = slurm.run("srun", "--time=1", "--nodes=2", "--ntasks=2", "bash", "-c", "echo $SLURMD_NODENAME", timeout=20)
    assert sorted(output.split()) == list(NODES)


@pytest.mark.parametrize(
    ("options", "at_signal", "expected"),
    [
        (["--partition=lo", "--signal=USR2@60"], "scontrol requeue $SLURM_JOB_ID; sleep 30", "start USR2 start"),
        # A job that ends by itself in its grace time is done: Slurm does not requeue it.
        (["--partition=lo", "--signal=USR2@60"], "exit 0", "start USR2"),
        (["--partition=brittle"], "exit 0", "start start"),
    ],
    ids=["requeues itself", "ends at the signal", "killed without a signal"],
)
def test_preempted(slurm: Cluster, tmp_path: Path, options, at_signal, expected):
    """As submitit's jobs: one srun step, USR2 asked for long before the time limit."""
    events = tmp_path / "events"
    task = tmp_path / "task.sh"
    task.write_text(f"""#!/bin/bash
trap 'echo USR2 >> {events}; {at_signal}' USR2
echo start >> {events}
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
while true; do sleep 0.05; done
""")
    task.chmod(0o755)
    low = slurm.submit(f"srun {task}", *options, "--nodelist=n1", "--exclusive", "--time=30", "--output=/dev/null")
    wait_for(events.exists, 20, lambda: f"the job did not start: {slurm.states(low)}\n{slurm.log()}")
    high = slurm.submit("true", "--partition=hi", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null")
    slurm.wait(high, "COMPLETED")
    slurm.wait(low, "COMPLETED")
    assert events.read_text().split() == expected.split()


def test_array_larger_than_the_limit_is_refused(slurm: Cluster):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        slurm.submit("true", f"--array=0-{MAX_ARRAY_SIZE}", "--output=/dev/null")
    assert "Invalid job array specification" in refused.value.stderr


def test_there_is_no_accounting(slurm: Cluster):
    done = subprocess.run(["sacct", "-j", "1"], env=slurm.env, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0 and "accounting storage is disabled" in done.stderr
