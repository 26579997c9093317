"""The process in which `sandbox.run_program` runs a foreign program; it is a script and imports nothing of ours.

Arguments: seconds of processor time, MiB of memory, and a token. The program comes from the standard input. The token
is written to the standard output when the program has reached its end. Without a token, the names of what the kernel
confines are written instead.
"""

import sys

sys.path.pop(0)  # the folder of this file, whose modules are not meant

import ctypes  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
from typing import Any  # noqa: E402

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every architecture
LANDLOCK_VERSION = 1  # flag of LANDLOCK_CREATE_RULESET
LANDLOCK_READING = 1 << 2 | 1 << 3  # the rights to read a file and to list a folder
# Number of rights to files by version of Landlock: executing, writing, making and removing among them.
LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
LANDLOCK_TCP, LANDLOCK_SCOPES = 3, 3  # bind and connect; abstract sockets and signals to processes outside

# Audit events of Python (PEP 578) that a program needs to import modules and to read files; of those in the families
# below all others are refused.
FAMILIES = (
    "os.", "shutil.", "socket.", "subprocess.", "ctypes.", "resource.", "fcntl.", "pty.", "signal.", "tempfile.",
    "ftplib.", "imaplib.", "http.", "urllib.", "poplib.", "smtplib.", "nntplib.", "telnetlib.", "webbrowser.",
    "sqlite3.", "syslog.", "mmap.", "cpython.run_",
)
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr", "os.putenv",
            "os.unsetenv"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit_resources(seconds: int, memory: int) -> None:
    """Limit processor time, memory, files and processes. Raises ValueError or OSError where that cannot be had."""
    resource.setrlimit(resource.RLIMIT_AS, (memory << 20, memory << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for name, value in {"CORE": 0, "FSIZE": 0, "NOFILE": 32, "NPROC": 0}.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def confine() -> list[str]:
    """Take all rights from this process that Linux can take, and return the names of what is confined."""
    done = ["limits"]
    if not sys.platform.startswith("linux"):
        return done
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC) == 0:
        done.append("network")
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    if version >= 1:
        rights = (1 << LANDLOCK_RIGHTS.get(version, 16)) - 1 & ~LANDLOCK_READING
        words = [rights, *([LANDLOCK_TCP] if version >= 4 else []), *([LANDLOCK_SCOPES] if version >= 6 else [])]
        rules = (ctypes.c_uint64 * len(words))(*words)
        number = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
        if number >= 0 and libc.syscall(LANDLOCK_RESTRICT_SELF, number, 0) == 0:
            done += ["files", *(["signals"] if version >= 6 else [])]
    return done


def refuse(event: str, arguments: Any) -> None:
    """Raise PermissionError for an audit event that is not harmless."""
    if event == "open":
        _, mode, flags = arguments
        writes = isinstance(flags, int) and flags & WRITING or isinstance(mode, str) and set(mode) & set("wax+")
        if writes:
            raise PermissionError("a confined program writes no files")
    elif event.startswith(FAMILIES) and event not in HARMLESS:
        raise PermissionError(f"a confined program may not do this: {event}")


def main() -> None:
    """Confine this process, then run the program."""
    seconds, memory, *tokens = sys.argv[1:]
    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    nothing = os.open(os.devnull, os.O_RDWR)
    limit_resources(int(seconds), int(memory))
    done = confine()
    if not tokens:
        os.write(1, " ".join(done).encode())
        return
    answers = os.dup(1)
    for number in range(3):
        os.dup2(nothing, number)
    sys.argv[1:] = []
    sys.addaudithook(refuse)
    exec(compile(program, "<program>", "exec"), {})
    os.write(answers, tokens[0].encode())
    os._exit(0)


if __name__ == "__main__":
    main()
