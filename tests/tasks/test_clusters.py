"""Which examples of a task are alike, for texts, for BLiMP and for data with a column that says so."""

import json

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.requests import ExampleScores, ScoredTask, task_digest
from harness.tasks.clusters import BLOCK_CHARACTERS, block_count, by_column, window_clusters
from tests.evaluation.reference import tiny
from tests.tasks.asking import asked


def test_windows_of_one_article_are_a_cluster():
    rows = [part for i in range(20) for part in (f" = Title {i} = \n", " == Section == \n", "word " * 100 + "\n")]
    text = "".join(rows)
    starts = np.arange(0, len(text), 100)
    clusters, protocol = window_clusters(rows, "", starts)
    assert protocol["clusters"] == "20 articles"
    begins = [len("".join(rows[:i])) for i in range(0, 60, 3)]
    assert clusters.tolist() == [sum(begin <= start for begin in begins) for start in starts]
    assert window_clusters([text], "", starts)[0].tolist() == clusters.tolist()  # the whole text in one row


def test_rows_are_documents_where_they_are_long_and_many():
    rows = ["word " * 60] * 30
    starts = np.arange(0, 30 * 302, 50)
    clusters, protocol = window_clusters(rows, "\n\n", starts)
    assert protocol["clusters"] == "30 rows" and (clusters == starts // 302 + 1).all()
    for few_or_short in (rows[:3], ["word"] * 2000, ["".join(rows)]):
        length = len("\n\n".join(few_or_short))
        starts = np.arange(0, length, length // 160)[:160]
        clusters, protocol = window_clusters(few_or_short, "\n\n", starts)
        assert protocol["clusters"] == "2 blocks"
        assert (np.bincount(clusters) == 80).all() and (np.diff(clusters) >= 0).all()
    assert window_clusters(["ab"], "", np.arange(1))[1]["clusters"] == "1 blocks"


def test_a_long_text_without_documents_has_more_blocks():
    """Each block has BLOCK_CHARACTERS characters, and there are at most eight."""
    assert [block_count(n * BLOCK_CHARACTERS + 1) for n in range(11)] == [2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    starts = np.arange(0, 5 * BLOCK_CHARACTERS, 1000)
    clusters, protocol = window_clusters(["x" * 5 * BLOCK_CHARACTERS], "", starts)
    assert protocol["clusters"] == "5 blocks"
    assert (np.bincount(clusters) == BLOCK_CHARACTERS / 1000).all()


def test_the_same_text_in_other_rows_has_another_identity():
    starts = np.arange(0, 9000, 50)
    text = "word " * 1800
    halves = [[text[i : i + size] for i in range(0, 9000, size)] for size in (300, 450)]
    digests = {window_clusters(rows, "", starts)[1]["clusters_digest"] for rows in halves}
    assert len(digests) == 2


def _task():
    return ScoredTask("t", {"a": 1}, [], ["0", "1", "2"], lambda scores: {"m": ExampleScores(np.ones(3), np.ones(3))})


def test_a_column_says_which_rows_are_alike():
    rows = [{"passage": "x"}, {"passage": "y"}, {"passage": "x"}]
    found = by_column(_task(), "tasks.t", "passage", rows)
    assert found.measure(None)["m"].clusters.tolist() == [0, 1, 0]
    assert found.protocol["clusters"] == "2 passage" and task_digest(found) != task_digest(_task())
    assert task_digest(found) != task_digest(by_column(_task(), "tasks.t", "passage", [*rows[:2], rows[1]]))
    untouched = _task()
    assert by_column(untouched, "tasks.t", None, rows) is untouched
    with pytest.raises(InputError, match="tasks.t.cluster_column: no column 'text'; its columns are passage"):
        by_column(_task(), "tasks.t", "text", rows)


@pytest.mark.parametrize(("kind", "rows"), [
    ("ioi", [{"prompt": "Anna and Ben sat. Ben gave it to", "answer": "Anna"}]),
    ("factual", [{"prompt": "The dog was named", "attribute": "Max"}]),
    ("lambada", [{"text": "Anna gave a ball to Ben"}]),
    ("bigbench", [{"inputs": "The dog was named", "targets": ["Max"], "multiple_choice_targets": ["Max", "Ben"]}]),
])
def test_every_kind_reads_the_column(kind, rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "group": i % 2}) + "\n" for row in rows for i in range(5)))
    task = asked("t", kind=kind, data_files=str(path), cluster_column="group").prepare("t", tiny()[1])
    for scores in blank_measure(task).values():
        assert scores.clusters.tolist() == [0, 1, 0, 1, 0]


def test_the_paradigms_of_blimp_are_clusters_of_the_whole_only(tmp_path):
    for name, size in (("a", 3), ("b", 2)):
        pairs = [{"sentence_good": "the cat sat", "sentence_bad": "cat the sat"}] * size
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = asked("t", kind="blimp", data_files=str(tmp_path)).prepare("t", tiny()[1])
    found = blank_measure(task)
    assert found["accuracy"].clusters.tolist() == [0, 0, 0, 1, 1]
    assert found["accuracy_a"].clusters is None and found["accuracy_b"].clusters is None
