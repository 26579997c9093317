"""The loss of a task to first order, where it chooses parts of the change between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.gradients import first_gradients
from harness.evaluation.requests import ScoredTask
from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix
from harness.models.treatment import Decompose


class DerivedTask:
    """The derivatives of one task's metric to singular values: a `harness.models.treatment.Derived`.

    The metric is the first of the task that has a derivative, such as the cross-entropy of labels. The loss is this
    metric, or its negative where a larger one is better.
    """

    def __init__(self, loaded: LoadedModel, task: ScoredTask) -> None:
        self._loaded, self._task = loaded, task
        self._found: dict[tuple[str, str], Tensor] = {}

    def losses(
        self, matrices: Sequence[Matrix], decompose: Decompose, of: str, operand: Callable[[Matrix], Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the first-order change of the loss if each value of a spectrum is removed: matrix -> float64 [r].

        Arguments as in `Derived`. One backward pass over the examples serves all matrices that are new. Raises
        InputError if no metric of the task has a derivative.
        """
        new = [matrix for matrix in matrices if (of, matrix.name) not in self._found]
        if new:
            metrics = blank_measure(self._task)
            try:
                found = first_gradients(self._loaded, self._task, list(metrics), new, decompose, operand)
            except InputError as error:
                raise InputError(f"region.calibration: {str(error).partition(': ')[2]}") from error
            sign = 1.0 if metrics[found.metric].higher_is_better else -1.0
            self._found |= {(of, name): sign * products for name, products in found.products.items()}
        return {matrix.name: self._found[of, matrix.name] for matrix in matrices}
