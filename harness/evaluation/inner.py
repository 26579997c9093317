"""Resume inside the first edited block: keep the outputs of its modules that ran before the edited ones.

What a block has computed before an edited matrix is used cannot depend on that matrix. So all cells that edit the same
matrix share these outputs as well as the stream at the frontier: for `down_proj` these are the attention, `gate_proj`
and `up_proj`. The order in which the modules run is observed in a pass, and not assumed. The model's own forward is
called, in which stubs replace these modules and return copies of their outputs, so that the numbers are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from harness.models.branches import owner_of
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix

BUDGET = 2**30  # bytes on the device


@contextmanager
def forward_replaced(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Replace a module's forward for the time of the context.

    With device_map, accelerate has set a forward on the module before; it is restored.
    """
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original


class InnerOutputs:
    """The kept outputs of modules of one block, the one at the frontier, for every batch.

    budget: bytes; what does not fit is computed anew, which gives the same numbers.
    """

    def __init__(self, loaded: LoadedModel, budget: float = BUDGET) -> None:
        self._loaded, self._left = loaded, budget
        self._budget = budget
        self._block = -1
        self._modules: dict[str, torch.nn.Module] = {}  # of the block: the owners of its matrices and those around them
        self._order: list[str] = []  # in which they ended in a pass; empty until one has been seen
        self._kept: dict[Any, dict[str, Any]] = {}

    def clear(self) -> None:
        """Give up everything that is kept."""
        self._kept.clear()
        self._left, self._block, self._order = self._budget, -1, []

    def drop(self, key: Any) -> None:
        """Give up what is kept of a batch, if anything."""
        self._left += _size(self._kept.pop(key, {}))

    @property
    def keeps(self) -> bool:
        """Whether anything may be kept."""
        return self._budget > 0

    def stop(self) -> None:
        """Keep nothing from now on, because memory ran out."""
        self._budget = 0
        self.clear()

    @contextmanager
    def resumed(self, key: Any, block: int, edited: Sequence[Matrix]) -> Iterator[None]:
        """Reuse what is kept of a batch in a pass that resumes at `block`, and keep what is not kept yet.

        Something may be kept (`keeps`). edited: the matrices that may be edited. They must be all of those in this
        block, and none is in an earlier one.
        """
        if block != self._block:
            self.clear()
            self._block, self._modules = block, _modules_of(self._loaded, block)
        if not self._order:
            with self._observed() as outputs:
                yield
            self._keep(key, {path: outputs[path] for path in self._before(edited)})
            return
        wanted = self._before(edited)
        kept = self._kept.get(key, {})
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            for path in wanted:
                if path in kept:
                    stack.enter_context(forward_replaced(self._modules[path], _stub(kept[path])))
                else:
                    stack.callback(self._modules[path].register_forward_hook(_capture(found, path)).remove)
            yield
        if found:
            self._keep(key, {path: output for path, output in (kept | found).items() if path in wanted})

    def _keep(self, key: Any, outputs: dict[str, Any]) -> None:
        self.drop(key)
        size = _size(outputs)
        if size <= self._left:
            self._left -= size
            self._kept[key] = outputs

    @contextmanager
    def _observed(self) -> Iterator[dict[str, Any]]:
        """Observe the order in which the modules of the block end in a pass; yields their outputs by path."""
        ended: list[str] = []
        found: dict[str, Any] = {}

        def note(path: str) -> Callable[..., None]:
            capture = _capture(found, path)

            def end(module: Any, args: tuple, output: Any) -> None:
                ended.append(path)
                capture(module, args, output)

            return end

        with ExitStack() as stack:
            for path, module in self._modules.items():
                stack.callback(module.register_forward_hook(note(path)).remove)
            yield found
        self._order = ended

    def _before(self, edited: Sequence[Matrix]) -> list[str]:
        """Return the outermost modules that run once, and end before the first of the edited ones begins."""
        owners = {id(owner_of(self._loaded.model, one)) for one in edited if one.block == self._block}
        first = next((i for i, path in enumerate(self._order) if id(self._modules[path]) in owners), 0)
        before = [path for path in self._order[:first] if self._order.count(path) == 1]
        return [path for path in before if not any(path.startswith(f"{other}.") for other in before)]


def _modules_of(loaded: LoadedModel, block: int) -> dict[str, torch.nn.Module]:
    """Return the modules of a block that own matrices, and those around them inside the block, by their paths."""
    inside = {id(module) for module in loaded.blocks[block].modules()} - {id(loaded.blocks[block])}
    found: dict[str, torch.nn.Module] = {}
    for matrix in loaded.matrices:
        path = matrix.parameter.rpartition(".")[0] if matrix.block == block else ""
        while path and id(module := loaded.model.get_submodule(path)) in inside:
            if not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)):  # these have no forward
                found[path] = module
            path = path.rpartition(".")[0]
    return found


def _capture(found: dict[str, Any], path: str) -> Callable[..., None]:
    def keep(module: Any, args: tuple, output: Any) -> None:
        found[path] = _copied(output)

    return keep


def _stub(output: Any) -> Callable[..., Any]:
    # A copy, because a model may change the output of a module in place.
    return lambda *args, **kwargs: _copied(output)


def _copied(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if type(output) is tuple else output


def _size(outputs: Any) -> int:
    if isinstance(outputs, torch.Tensor):
        return outputs.nbytes
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else ()
    return sum(map(_size, parts))
