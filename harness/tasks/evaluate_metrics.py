"""Metrics of the library Hugging Face evaluate, for tasks whose answers are classes or texts.

Such a metric is computed over all examples together (F1, Matthews correlation, BLEU). Its standard error and its paired
differences follow from the jackknife (`harness.evaluation.jackknife`).
"""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from harness.errors import InputError, SettingError, wrong
from harness.evaluation.jackknife import jackknife_scores
from harness.evaluation.requests import ExampleScores
from harness.optional import require
from harness.settings.constraints import ReadBy
from harness.settings.plain_values import NAME_RULE, is_name
from harness.settings.validation import plain, validated
from harness.tasks.fingerprint import code_beside

EXAMPLE = "for example [f1] or [{name: f1, arguments: {average: macro}}]"


@dataclass(frozen=True)
class EvaluateMetric:
    """The settings of one metric.

    name: the name of a metric on the hub ("f1", "user/metric"), or the path of a local script or of its folder. The
        library downloads and runs the script.
    label: the name of the metric in tables; null: the last part of `name`.
    value: the name of the number to take from the result; null: the number called as the metric, or the only one.
    arguments: further arguments of the metric's `compute`.
    config: the configuration of a metric that has several, such as "mrpc" of glue.
    """

    name: str
    label: str | None = None
    value: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    higher_is_better: bool = True

    @property
    def called(self) -> str:
        """The metric's name in tables."""
        return self.label or Path(self.name).stem


def read_metrics(values: Any) -> list[EvaluateMetric]:
    """Return the metrics of a list whose entries are names or settings.

    Raises SettingError for a wrong entry, and if two metrics have the same name in tables.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise wrong("", values, f"it must be a list, {EXAMPLE}")
    metrics = [
        one if isinstance(one, EvaluateMetric)
        else validated(EvaluateMetric, {"name": one} if isinstance(one, str) else one)
        for one in values
    ]
    labels = [metric.called for metric in metrics]
    for label in labels:
        if not is_name(label):
            raise wrong("", label, f"it is the name of a metric in tables; set label. {NAME_RULE}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SettingError("", f"two metrics are called {twice!r}; set label of one of them, {EXAMPLE}")
    return metrics


Metrics = Annotated[list[EvaluateMetric], ReadBy(read_metrics)]


class MetricSet:
    """The metrics of one task, which are loaded and ready to be computed."""

    def __init__(
        self, key: str, metrics: Sequence[EvaluateMetric], taken: Collection[str] = (),
        clusters: np.ndarray | None = None,
    ) -> None:
        """Load the metrics.

        key: "tasks.<name>". taken: the names of the task's own metrics. clusters: int64 [n], the cluster of each
        example, which the jackknife leaves out as a whole where it leaves out more than one example at a time; None if
        all examples are independent.
        Raises InputError if the library is not installed, a metric cannot be loaded, or its name is taken.
        """
        self._key, self._clusters = f"{key}.metrics", clusters
        if metrics:
            require("evaluate", "tasks", self._key)
        both = sorted({metric.called for metric in metrics} & set(taken))
        if both:
            raise InputError(
                f"{self._key}: the task has a metric {both[0]!r} of its own; set label, for example"
                f" {{name: {both[0]}, label: {both[0]}_evaluate}}"
            )
        self._metrics = [(metric, _loaded(self._key, metric)) for metric in metrics]

    def __bool__(self) -> bool:
        return bool(self._metrics)

    def protocol(self) -> dict[str, Any]:
        """Return what the protocol says of the metrics, which is nothing if there are none."""
        if not self._metrics:
            return {}
        import evaluate

        found = [{**plain(metric), "name": _name(metric), **_source_of(module)} for metric, module in self._metrics]
        left_out = {} if self._clusters is None else {"jackknife": "clusters"}
        return {"metrics": found, "evaluate": evaluate.__version__, **left_out}

    def rehearse(self, references: Sequence[Any]) -> None:
        """Compute each metric once as if every answer were right, to find errors before a model is loaded.

        references: as in `scores`. Raises InputError if a metric cannot be computed.
        """
        for metric, module in self._metrics:
            try:
                _value(self._key, metric, module, references, references)
            except Exception as error:  # a metric is a foreign script, which may raise anything
                reason = str(error) if isinstance(error, InputError) else f"{self._key}: {metric.called}: {error}"
                raise InputError(reason) from None

    def scores(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, ExampleScores]:
        """Return the ExampleScores of each metric by name.

        predictions, references: one for each example, a class number or a text; a reference may be a list of texts.
        Raises whatever the script of a metric raises.
        """
        numbered: dict[str, int] = {}
        pairs = [repr(pair) for pair in zip(predictions, references)]
        alike = np.array([numbered.setdefault(pair, len(numbered)) for pair in pairs])
        found = {}
        for metric, module in self._metrics:

            def value(kept: np.ndarray, metric: EvaluateMetric = metric, module: Any = module) -> float:
                indices = kept.tolist()
                chosen = ([of_all[i] for i in indices] for of_all in (predictions, references))
                return _value(self._key, metric, module, *chosen)

            scores = jackknife_scores(value, alike, self._clusters)
            found[metric.called] = ExampleScores(
                scores, np.ones(len(scores)), higher_is_better=metric.higher_is_better
            )
        return found


def _loaded(key: str, metric: EvaluateMetric) -> Any:
    import evaluate

    path = Path(metric.name).expanduser()
    name = str(path) if path.exists() else metric.name
    try:
        return evaluate.load(name, metric.config, keep_in_memory=True)
    except (OSError, ImportError, ValueError, ConnectionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{key}: {metric.name!r} cannot be loaded: {lines[0]}; give the name of a metric of Hugging Face evaluate,"
            " such as f1, or the path of a local metric script"
        ) from None


def _source_of(module: Any) -> dict[str, Any]:
    """Return the digest of a metric's scripts and the versions of the packages that they import."""
    digest, packages = code_beside(Path(str(inspect.getsourcefile(type(module)))))
    return {"script": digest, "packages": packages}


def _name(metric: EvaluateMetric) -> str:
    """Return the name for the protocol, in which the place of a local script has no part."""
    path = Path(metric.name).expanduser()
    return path.name if path.exists() else metric.name


def _value(
    key: str, metric: EvaluateMetric, module: Any, predictions: Sequence[Any], references: Sequence[Any]
) -> float:
    """Return the value of a metric over some examples. Raises InputError if it returns no single number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about each class that is never predicted
        result = module.compute(predictions=predictions, references=references, **metric.arguments) or {}
    single = {name: number for name, number in result.items() if isinstance(number, numbers.Real)}
    wanted = metric.value or Path(metric.name).stem
    if wanted not in result and metric.value is None and len(result) == 1:
        wanted = next(iter(result))
    if wanted not in single:
        raise InputError(
            f"{key}: {metric.called} returns no single number called {wanted!r}, but {', '.join(result)}; set value to"
            f" one of its numbers ({', '.join(single) or 'none'}), or arguments so that it returns one, for example"
            " {average: macro}"
        )
    return float(single[wanted])
