"""A Python for tests that start a command: it is forked from one that has imported the heavy libraries.

`python()` is the path of an executable that is used as Python's own: `python() -m harness run ...`. A new Python takes
some five seconds of processor time to import torch and transformers. This one sends its arguments, its environment and
its three streams to a server, which has imported them, and which forks a process for them. What happens to the
executable happens to that process: signals are passed on, and it is killed if the executable is. The executable ends as
that process ends.

Tests of imports, of the start and the end of a process, and of terminals start Python itself, and so do some of the
tests of launchers and of Slurm. The server lives as long as the process that started the tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_ROOT = Path(__file__).resolve().parents[1]


def python() -> str:
    """Return the path of the executable."""
    return str(Path(listening()).with_name("python"))


def listening() -> str:
    """Return the path of the server's socket. The first call of all processes of the tests starts the server."""
    import fcntl
    import shlex
    import subprocess

    folder = Path(os.environ["HARNESS_TESTS"].partition(":")[2], "warm")
    folder.mkdir(exist_ok=True)
    executable, place = folder / "python", folder / "socket"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if executable.exists():
            return str(place)
        with open(folder / "log", "wb") as log:
            # A Slurm of the tests kills at its end whatever was started with its configuration.
            own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
            subprocess.Popen([sys.executable, "-m", "tests.warm", str(place)], cwd=_ROOT, start_new_session=True,
                             env={**own, "PYTHONPATH": str(_ROOT)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not place.exists():
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        command = shlex.join([sys.executable, "-S", "-E", str(Path(__file__).resolve()), "--client", str(place)])
        (folder / "new").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "new").chmod(0o755)
        (folder / "new").rename(executable)
    return str(place)


# ---------------------------------------------------------------- the executable


def ask(place: str, arguments: list[str], streams: list[int], environment: Mapping[str, str]
        ) -> tuple[int, socket.socket]:
    """Have the server execute the arguments of Python. Return the id of the process, and what its status comes by.

    streams: the descriptors of its standard input, output and error.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.connect(place)
    asked = json.dumps({
        "arguments": arguments, "folder": os.getcwd(),
        "environment": {os.fsencode(key).hex(): os.fsencode(value).hex() for key, value in environment.items()},
    }).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], streams)
    server.sendall(asked)
    return int.from_bytes(_receive(server, 8), "big"), server


def status_from(server: socket.socket) -> int:
    """Wait for the end of the process, and return its exit status: a negative one is the number of a signal."""
    with server:
        return os.waitstatus_to_exitcode(int.from_bytes(_receive(server, 8), "big"))


def _behave_as(arguments: list[str], place: str) -> int:
    """Be the executable: have the arguments executed, pass signals on, and end as the process does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # the process may run before its id is here
    pid, server = ask(place, arguments, [0, 1, 2], os.environ)
    for number in _PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    status = status_from(server)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise EOFError("the other side has ended")
        found += part
    return found


# ---------------------------------------------------------------- the server


def _serve(place: str, parent: int) -> None:
    """Fork a process for each connection, until the process that started the tests has ended."""
    import gc
    import selectors
    from importlib import import_module

    for name in ("accelerate", "pandas", "pyarrow.parquet", "pyarrow.dataset", "transformers.modeling_utils",
                 "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
                 "transformers.models.llama.modeling_llama", "scipy.stats", "hydra", "tests.studies",
                 "harness.measurements.ablation.measure", "harness.commands.from_settings", "submitit"):
        import_module(name)
    gc.collect()
    gc.freeze()
    waiting = selectors.DefaultSelector()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(place + ".new")
    server.listen(64)
    os.rename(place + ".new", place)
    waiting.register(server, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the id of a process: its descriptor and who asked for it
    while os.path.exists(place) and _is_alive(parent):
        for key, _ in waiting.select(timeout=1):
            if key.fileobj is server:
                connection, _ = server.accept()
                pid = _fork(connection, [server, *(one for _, one in running.values())])
                if pid is None:
                    connection.close()
                    continue
                running[pid] = os.pidfd_open(pid), connection
                waiting.register(running[pid][0], selectors.EVENT_READ, pid)
                waiting.register(connection, selectors.EVENT_READ, pid)
                with suppress(OSError):  # whoever asked has ended already; then the process is killed below
                    connection.sendall(pid.to_bytes(8, "big"))
            elif key.data not in running:  # it ended in this round
                continue
            elif key.fileobj == running[key.data][0]:  # a process has ended
                process, connection = running.pop(key.data)
                status = os.waitpid(key.data, 0)[1]
                waiting.unregister(process)
                os.close(process)
                if connection in waiting.get_map():
                    waiting.unregister(connection)
                with suppress(OSError):
                    connection.sendall(status.to_bytes(8, "big"))
                connection.close()
            else:  # whoever asked for a process has ended before it
                waiting.unregister(key.fileobj)
                os.kill(key.data, signal.SIGKILL)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _fork(connection: socket.socket, others: list[socket.socket]) -> int | None:
    """Return the id of a process that executes what the connection asks for.

    None if whoever connected ended before it had asked.
    """
    streams: list[int] = []
    try:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        asked = json.loads(_receive(connection, int.from_bytes(size, "big")))
    except (EOFError, OSError, ValueError):
        for stream in streams:
            os.close(stream)
        return None
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        return pid
    status = 1
    try:
        for one in (connection, *others):
            one.close()
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environb.update({bytes.fromhex(key): bytes.fromhex(value) for key, value in asked["environment"].items()})
        status = _execute(asked["arguments"])
    finally:
        os._exit(status)


def _execute(arguments: list[str]) -> int:
    """Do what Python does with its arguments, and return the exit status."""
    import atexit
    import runpy
    import threading
    import traceback

    at_once = arguments[0] == "-u"
    arguments = arguments[at_once:]
    # The streams of the server know whether its own output can be sought.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1 if at_once else -1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    first, *rest = arguments
    own = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    sys.path[:] = ["", *own, *(one for one in sys.path if one not in ("", str(_ROOT)))]
    status = 1
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        elif first == "-m":
            sys.argv = ["-m", *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path[0] = os.path.dirname(os.path.abspath(first))
            runpy.run_path(first, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if status and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            status = 130
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = status or 120
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    if sys.argv[1] == "--client":
        sys.exit(_behave_as(sys.argv[3:], sys.argv[2]))
    _serve(sys.argv[1], int(os.environ["HARNESS_TESTS"].partition(":")[0]))
