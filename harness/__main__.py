"""The door of the process: the command `harness`, and `python -m harness`.

It imports nothing that takes long, so that an interrupt while the command line is imported also ends in one line.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = "harness: interrupted; what is done is kept: run the same command again to go on"


def main() -> int:
    """Run the command line with the arguments of the process, and return its exit status."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the process was started with this stream closed
            setattr(sys, name, open(os.devnull, mode))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of other libraries; those of runs are plain lines there
    try:
        from harness.cli import main as command_line

        return command_line()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    finally:
        # Nothing is left to do but to end, which an impatient second interrupt would turn into a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    raise SystemExit(main())
