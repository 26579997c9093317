"""The processes that accelerate launch or torchrun started: the number of this one, and how they exchange values."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from harness.evaluation.division import Division

# One rank may have to wait while another trains or loads a model, and at the end for the slowest one.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Ranks:
    """`n` processes of which this is number `rank`; `n` is 1 without a launcher."""

    rank: int = 0
    n: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value` (anything that pickles) in every process."""
        if self.n == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values (anything that pickles) of all processes in every process, in the order of their ranks."""
        if self.n == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def division(self) -> Division:
        """Return these processes as a division, which measures every unit together."""
        return Division(self.rank, self.n, self.gather)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.n > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def is_main_process() -> bool:
    """Return whether this process is rank 0, even if the ranks have not joined yet."""
    return int(os.environ.get("RANK", 0)) == 0


def join() -> Ranks:
    """Join the processes that a launcher started, as its environment variables say. Without them this process is alone.

    The processes talk through gloo, because they exchange little and gloo works on any device. Raises RuntimeError if
    accelerate finds another number of processes than the launcher says it started.
    """
    n = int(os.environ.get("WORLD_SIZE", 1))
    if n == 1:
        return Ranks()
    from accelerate import PartialState

    if not PartialState._shared_state:
        # threads of gloo that outlive the interpreter abort the process
        atexit.register(_leave)
    state = PartialState(cpu=True, backend="gloo", timeout=LONGEST_WAIT)
    if state.num_processes != n:
        raise RuntimeError(f"the launcher says {n} processes (WORLD_SIZE), accelerate finds {state.num_processes}")
    return Ranks(state.process_index, n)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
