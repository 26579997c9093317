"""A real Slurm on the loopback: munge, one slurmctld and two slurmd, each posing as a node with two fake GPUs.

Needs root (slurmd starts jobs, mknod makes the GPUs) and Debian's slurmctld, slurmd, slurm-client and munge. Nothing of
the machine's own Slurm is read or touched: every path, port and key lives in a folder of its own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
CPUS_PER_NODE = 4
GPUS_PER_NODE = 2
MAX_ARRAY_SIZE = 8  # so small that a study of a few shards needs two arrays
GRACE_SECONDS = 20  # a job of partition lo that is preempted and does not end by itself is stopped after this long
REQUEUE_SECONDS = 5  # cred_expire: a requeued job waits this long, and a second or two more
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")

# linuxproc and task/none: no cgroups, so that it runs in a container.
# preempt_send_user_signal: a preempted job gets the signal of `sbatch --signal`, not SIGTERM.
# sched_interval: nothing else wakes a requeued job on an idle cluster, and the default is a minute.
# No accounting storage: as on a cluster where sacct answers nothing.
# Partitions: hi preempts both others; a job of lo is warned by its signal, one of brittle is killed at once.
SLURM_CONF = """
ClusterName=loopback
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize={max_array_size}
KillWait=2
InactiveLimit=0
MinJobAge=300
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus}
NodeName={nodes} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={node_ports}
PartitionName=lo Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=brittle Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=hi Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The reason why no Slurm can run here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a local Slurm needs root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _make_device(Path(folder) / "null")
        except OSError as error:
            return f"no device nodes may be made here, as a fake GPU needs: {error}"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `env` is the environment in which Slurm's commands, and submitit, find it."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str, timeout: float = 30) -> str:
        """Standard output of one of Slurm's commands; raises CalledProcessError or TimeoutExpired."""
        done = subprocess.run(command, env=self.env, timeout=timeout, capture_output=True, text=True)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, script: str, *options: str) -> int:
        """The job id of `script`, a bash script without its first line."""
        path = self.folder / f"job-{secrets.token_hex(4)}.sh"
        path.write_text("#!/bin/bash\n" + script)
        return int(self.run("sbatch", "--parsable", *options, str(path)).strip())

    def states(self, job: int) -> dict[str, str]:
        """State by job id or, in an array, by `id_task`; jobs that have ended stay for MinJobAge."""
        rows = self.run("squeue", "--array", "--noheader", "--states=all", "--format=%i %T", f"--jobs={job}")
        return dict(row.split() for row in rows.splitlines())

    def wait(self, job: int, *states: str, timeout: float = 30) -> dict[str, str]:
        """Block until every task of `job` is in one of `states`; raises TimeoutError with what they are in."""
        return wait_for(
            lambda: (now := self.states(job)) and set(now.values()) <= set(states) and now,
            timeout,
            lambda: f"job {job}: {self.states(job)}, not all in {states}",
        )

    def log(self, pattern: str = "*.log") -> str:
        """The daemons' logs, for the message of a failure."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob(pattern)))


def wait_for(condition: Callable[[], object], timeout: float, what: Callable[[], str]) -> object:
    """The first true value of `condition`, asked every tenth of a second; TimeoutError(what()) after `timeout` s."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"after {timeout} s: {what()}")
        time.sleep(0.1)
    return value


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the daemons, yield when both nodes are idle, stop them by their pids."""
    # Slurm's and munge's sockets lie in this folder, and a socket's path holds 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    daemons: list[subprocess.Popen] = []
    cluster = Cluster(folder, {**_without_slurm(os.environ), "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        _write_configuration(folder)
        daemons.append(_start(folder, "munged", *_munge_options(folder)))
        wait_for((folder / "munge.sock").exists, 10, lambda: f"munged did not start\n{cluster.log('*.out')}")
        daemons.append(_start(folder, "slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf")))
        daemons += [_start(folder, "slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf")) for node in NODES]
        wait_for(lambda: _idle(cluster), 30, lambda: f"the nodes did not come up\n{cluster.log('*.out')}")
        yield cluster
    finally:
        _stop(cluster, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _without_slurm(environ) -> dict[str, str]:
    """A developer may run the tests inside a job of another cluster: its variables would redirect sbatch."""
    return {k: v for k, v in environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SQUEUE"))}


def _write_configuration(folder: Path) -> None:
    ports = _free_ports(1 + len(NODES))
    for name in ("state", *NODES):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(
            folder=folder,
            hostname=socket.gethostname().split(".")[0],
            ctld_port=ports[0],
            node_ports="[" + ",".join(map(str, ports[1:])) + "]",
            nodes=",".join(NODES),
            cpus=CPUS_PER_NODE,
            gpus=GPUS_PER_NODE,
            grace=GRACE_SECONDS,
            requeue=REQUEUE_SECONDS,
            max_array_size=MAX_ARRAY_SIZE,
        )
    )
    gres = []
    for node in NODES:
        for gpu in range(GPUS_PER_NODE):
            device = folder / f"{node}-gpu{gpu}"
            _make_device(device)
            gres.append(f"NodeName={node} Name=gpu File={device}\n")
    (folder / "gres.conf").write_text("".join(gres))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _make_device(path: Path) -> None:
    """Slurm asks that the file of a GPU be a device; a twin of /dev/null will do."""
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def _munge_options(folder: Path) -> list[str]:
    paths = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    return ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in paths.items())]


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held at once so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return sorted(one.getsockname()[1] for one in sockets)
    finally:
        for one in sockets:
            one.close()


def _start(folder: Path, program: str, *options: str) -> subprocess.Popen:
    """A daemon that is told to stop when pytest dies, even by SIGKILL."""
    with open(folder / f"{program}.out", "ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", _program(program), *options],
            env={**_without_slurm(os.environ), "SLURM_CONF": str(folder / "slurm.conf")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _idle(cluster: Cluster) -> bool:
    try:
        states = cluster.run("sinfo", "--noheader", "--Node", "--partition=lo", "--format=%T", timeout=10).split()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    return states == ["idle"] * len(NODES)


def _stop(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    """Jobs first: a slurmstepd outlives its slurmd. What is left is found by the configuration that it was given."""
    try:
        cluster.run("scancel", "--signal=KILL", "--full", "--user=root", timeout=10)
        cluster.run("scancel", "--user=root", timeout=10)
        wait_for(lambda: not cluster.run("squeue", "--noheader"), 10, lambda: "jobs are still there")
    except (subprocess.SubprocessError, TimeoutError):
        pass
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for pid in _left_over(cluster.env["SLURM_CONF"]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _left_over(slurm_conf: str) -> list[int]:
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_CONF={slurm_conf}".encode() in environment and int(entry.name) != os.getpid():
            pids.append(int(entry.name))
    return pids
