"""The join of two studies: their cells by task, metric, target and region, and their examples by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import MANIFEST, Manifest, in_order, read_manifest, reading
from harness.errors import InputError
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import Delta, difference_of_deltas, holm, paired
from harness.measurements.ablation.summary import is_baseline
from harness.measurements.ablation.tables import TABLES as STUDY
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.tables.frames import dicts_of
from harness.tables.labels import model_name
from harness.tables.text import is_missing

if TYPE_CHECKING:
    import pandas

# What a chat template changes in the protocol of a task, beside the key `chat` itself: the prompts and their tokens.
_FOLLOWS_FROM_CHAT = {"chat", "bos", "prefix_token", "leading_space", "n_tokens", "documents", "n_shared_first_token",
                      "n_prefix_names", "generic_tokens", "tokenizer"}  # fmt: skip
# What a checkpoint brings along when it writes text: its end tokens, say. The prompts are the same.
_OF_CHECKPOINT = {"generation"}
Key = tuple[str, str, str]  # metric, target, region


@dataclass(frozen=True)
class StudyOf:
    """A study that was read for a comparison.

    model: its label, which no other study of the comparison has. metrics: the table of that name. asked: task -> a
    digest of all tokens that it asks.
    """

    folder: Path
    model: str
    manifest: Manifest
    metrics: pandas.DataFrame
    asked: Mapping[str, str]

    def tasks(self) -> list[str]:
        """Return the names of its tasks, in the order of the study."""
        return list(self.asked)

    def protocol(self, task: str) -> dict[str, Any]:
        """Return the protocol of one task."""
        return dict(self.manifest.content["tasks"][task]["protocol"])


@dataclass
class Joined:
    """The rows of a comparison.

    rows: those of the table `compare`, with `n_clusters`, `freedom` (degrees of freedom) and `higher_is_better`
    besides. left_out: those of the table of that name. notes: sentences on pairs that were compared although something
    differs.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_studies(folders: Sequence[str | Path]) -> list[StudyOf]:
    """Return the studies in some folders, with distinct labels for their models.

    Raises InputError if there are fewer than two, one is given twice, is no study, or has no rows.
    """
    if len(folders) < 2:
        raise InputError("compare: it needs the folders of at least two studies, or of one run and --expected FILE")
    found: list[tuple[Path, Manifest, pandas.DataFrame]] = []
    for folder in map(Path, folders):
        manifest = read_manifest(folder)
        if manifest.kind != "ablation":
            inside = " (a search has studies in studies/selection and studies/report)" * (manifest.kind == "search")
            raise InputError(f"compare: {folder} holds a run of {manifest.kind}, not a study{inside}")
        for other, known, _ in found:
            if known.id == manifest.id:
                raise InputError(f"compare: {other} and {folder} hold the same study ({manifest.id}); give two studies")
        metrics = in_order(folder, read_metrics(folder), STUDY.key)
        if metrics.empty:
            raise InputError(f"compare: {folder} has no rows yet; run it first (harness work {folder})")
        found.append((folder, manifest, metrics))
    labels = _labels(found)
    return [StudyOf(folder, label, manifest, metrics, _asked(folder, manifest))
            for (folder, manifest, metrics), label in zip(found, labels)]


def _labels(found: Sequence[tuple[Path, Manifest, pandas.DataFrame]]) -> list[str]:
    """Return a label for the model of each study: its name, with as much more as it takes to be distinct."""
    names, revised, whole = [], [], []
    for folder, _, metrics in found:
        first = metrics.iloc[0]
        name = str(first["model"])
        short = Path(name).name if name.startswith((".", "/", "~")) or name.count("/") > 1 else name
        if not is_missing(first["gguf_file"]):
            short = model_name(name, first["gguf_file"])
        names.append(short)
        revised.append(short if is_missing(first["revision"]) else f"{short}@{first['revision']}")
        whole.append(f"{revised[-1]} ({folder})")
    return next((labels for labels in (names, revised) if len(set(labels)) == len(labels)), whole)


def _asked(folder: Path, manifest: Manifest) -> dict[str, str]:
    with reading(folder / MANIFEST, "the list of its tasks"):
        for one in manifest.content["tasks"].values():
            dict(one["protocol"])
        return {name: str(one["digest"]) for name, one in manifest.content["tasks"].items()}


def join(studies: Sequence[StudyOf]) -> Joined:
    """Return the comparison of the first study with each of the others, with p-values corrected over all of them."""
    joined = Joined()
    first, *others = studies
    for other in others:
        _Pair(first, other, joined).join()
    _correct(joined.rows)
    return joined


def _correct(rows: list[dict[str, Any]]) -> None:
    families: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["task"], row["metric"], row["target"] == "baseline"), []).append(row)
    for members in families.values():
        p = [math.nan if row["p_value"] is None else row["p_value"] for row in members]
        for row, corrected in zip(members, holm(p)):
            row["p_holm"] = None if math.isnan(corrected) else float(corrected)


@dataclass
class _Pair:
    """Two studies, and where their rows go."""

    a: StudyOf
    b: StudyOf
    joined: Joined

    def join(self) -> None:
        """Add the rows of all tasks that both studies have, and name the others."""
        self._note_settings()
        for task in dict.fromkeys([*self.a.tasks(), *self.b.tasks()]):
            for one, other in ((self.a, self.b), (self.b, self.a)):
                if task not in other.asked:
                    self._leave_out(task, None, f"only {one.model} was asked this task")
            if task in self.a.asked and task in self.b.asked:
                self._join_task(task)

    def _note_settings(self) -> None:
        settings = [json.loads(study.metrics["settings"].dropna().iloc[0]) for study in (self.a, self.b)]
        differing = sorted(key for key in {*settings[0], *settings[1]} - {"model"}
                           if settings[0].get(key) != settings[1].get(key))
        if differing:
            says = ", ".join(f"{key} ({settings[0].get(key)}, {settings[1].get(key)})" for key in differing)
            self.joined.notes.append(f"{self.a.model} and {self.b.model} were measured with other settings: {says}.")

    def _leave_out(self, task: str, key: Key | None, reason: str) -> None:
        metric, target, region = key or (None, None, None)
        self.joined.left_out.append({"task": task, "metric": metric, "target": target, "region": region,
                                     "model_a": self.a.model, "model_b": self.b.model, "reason": reason})

    def _join_task(self, task: str) -> None:
        same = self.a.asked[task] == self.b.asked[task]
        if not same:
            allowed, reason = self._why_other_tokens(task)
            if not allowed:
                return self._leave_out(task, None, reason)
            self.joined.notes.append(f"{task}: {self.a.model} and {self.b.model} {reason}; see protocol_a and"
                                     " protocol_b.")
        cells = [_Cells(study, task) for study in (self.a, self.b)]
        for key in dict.fromkeys([*cells[0].rows, *cells[1].rows]):
            lacking = [study.model for study, there in zip((self.a, self.b), cells) if key not in there.rows]
            if lacking:
                self._leave_out(task, key, f"{lacking[0]} has no such cell")
                continue
            refused = self._add(task, key, cells[0], cells[1], same)
            if refused is not None:
                self._leave_out(task, key, refused)

    def _why_other_tokens(self, task: str) -> tuple[bool, str]:
        """Return whether the models may be compared although they were asked differently, and how they were asked."""
        protocols = [study.protocol(task) for study in (self.a, self.b)]
        differing = [key for key in sorted({*protocols[0], *protocols[1]})
                     if protocols[0].get(key) != protocols[1].get(key)]
        if "chat" in differing and set(differing) <= _FOLLOWS_FROM_CHAT | _OF_CHECKPOINT:
            return True, "were asked with different chat templates, or one of them without"
        if differing and set(differing) <= _OF_CHECKPOINT:
            return True, "wrote text with the different settings of generation of their checkpoints"
        if not differing:
            return False, "the tokens differ although the text is the same: the models have different tokenizers"
        says = ", ".join(f"{key} ({_short(protocols[0].get(key))}, {_short(protocols[1].get(key))})"
                         for key in differing)
        return False, f"the tasks asked different tokens: their protocols differ in {says}"

    def _add(self, task: str, key: Key, a: _Cells, b: _Cells, same: bool) -> str | None:
        """Add the row of one pair of cells, or return why there is none."""
        metric, target, region = key
        rows, cells = (a.rows[key], b.rows[key]), (a, b)
        for study, row in zip((self.a, self.b), rows):
            if row["status"] != "ok":
                return f"the cell of {study.model} failed"
            if row["precision"] == "adaptive":
                return f"{study.model} was measured with adaptive precision, which uses other examples in each cell"
        is_baseline = target == "baseline"
        scores = []
        for study, row, there in zip((self.a, self.b), rows, cells):
            found, reason = there.scores(row), f"{study.model} has no scores of single examples (runtime.examples)"
            base = None if is_baseline else there.baseline(metric)
            if found is None or not is_baseline and base is None:
                return reason if found is None else f"the baseline of {study.model} is missing or has no examples"
            scores.append((found, base))
        (one, base_a), (other, base_b) = scores
        if not one.same_examples(other):
            return "the examples are not the same: their names, weights or clusters differ"
        if one.scores.transform != other.scores.transform:
            return "the metrics are not computed in the same way"
        if not same and one.scores.transform != "identity":
            return "a perplexity of other tokens cannot be compared"
        if base_a is None or base_b is None:
            found_delta = paired(other.scores, one.scores)
        else:
            found_delta = difference_of_deltas(one.scores, base_a.scores, other.scores, base_b.scores)
        self.joined.rows.append(self._row(task, key, rows, found_delta))
        return None

    def _row(self, task: str, key: Key, rows: tuple[Mapping[str, Any], Mapping[str, Any]], found: Delta) -> dict:
        metric, target, region = key
        of_model = {
            f"{column}_{side}": None if is_missing(row[source]) else row[source]
            for side, row in zip("ab", rows)
            for column, source in (("value", "value"), ("baseline", "baseline"), ("delta", "delta"),
                                   ("energy_removed", "energy_removed"), ("protocol", "protocol"))
        }  # fmt: skip
        if target == "baseline":
            of_model |= {f"baseline_{side}": row["value"] for side, row in zip("ab", rows)}
            of_model |= dict.fromkeys(("delta_a", "delta_b"))
        return {
            "task": task, "metric": metric, "target": target, "region": region, "model_a": self.a.model,
            "model_b": self.b.model, "n": int(rows[0]["n"]), **of_model, "difference": found.delta,
            "difference_stderr": found.stderr, "p_value": found.p_value, "p_holm": None,
            "n_clusters": int(rows[0]["n_clusters"]), "freedom": found.freedom,
            "higher_is_better": bool(rows[0]["higher_is_better"]),
            "delta_stderr_a": rows[0]["delta_stderr"], "delta_stderr_b": rows[1]["delta_stderr"],
        }  # fmt: skip


@dataclass(frozen=True)
class _Scores:
    """The scores of one cell and metric, and the names of the examples in the same order."""

    ids: list[str]
    scores: ExampleScores

    def same_examples(self, other: _Scores) -> bool:
        """Return whether names, weights and clusters are the same."""
        import numpy as np

        mine, others = self.scores, other.scores
        clusters, of_others = (np.zeros(0) if one.clusters is None else one.clusters for one in (mine, others))
        same = np.array_equal(mine.weight, others.weight) and np.array_equal(clusters, of_others)
        return same and self.ids == other.ids



class _Cells:
    """The rows of one task of a study by metric, target and region, and the scores of their examples."""

    def __init__(self, study: StudyOf, task: str) -> None:
        self._study, self._task = study, task
        of_task = study.metrics[study.metrics["task"] == task]
        self.rows: dict[Key, dict[str, Any]] = {
            (row["metric"], row["target"], row["region"]): row for row in dicts_of(of_task)
        }
        self._baselines = {row["metric"]: row for row in dicts_of(of_task[is_baseline(of_task)])}
        self._examples: dict[tuple[str, str], pandas.DataFrame] | None = None

    def baseline(self, metric: str) -> _Scores | None:
        """Return the scores of the unablated model, or None."""
        row = self._baselines.get(metric)
        return None if row is None or row["status"] != "ok" else self.scores(row)

    def scores(self, row: Mapping[str, Any]) -> _Scores | None:
        """Return the scores behind a row of the table `metrics`; None if the study did not keep them.

        Raises InputError if they do not give the value of the row.
        """
        import numpy as np

        if self._examples is None:
            examples = read_examples(self._study.folder, task=self._task)
            self._examples = {(str(cell), str(metric)): rows
                              for (cell, metric), rows in examples.groupby(["cell_id", "metric"], sort=False)}
        rows = self._examples.get((row["cell_id"], row["metric"]))
        if rows is None:
            return None
        score, weight = rows["score"].to_numpy(float), rows["weight"].to_numpy(float)
        clusters = None if rows["cluster"].isna().any() else rows["cluster"].to_numpy(dtype=np.int64)
        transform = _transform(score.sum() / weight.sum(), row["value"])
        if transform is None:
            raise InputError(f"compare: {self._study.folder}: the examples of cell {row['cell_id']} do not give its"
                             f" {row['metric']}; run the study again")
        return _Scores(rows["example_id"].tolist(), ExampleScores(score, weight, transform, clusters=clusters))


def _transform(ratio: float, value: float) -> str | None:
    """Return which transform makes the value of a metric of the ratio of its sums; x = exp(x) has no solution."""
    if math.isclose(ratio, value, rel_tol=1e-9, abs_tol=1e-12):
        return "identity"
    if ratio < 700 and math.isclose(math.exp(ratio), value, rel_tol=1e-9):
        return "exp"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."

