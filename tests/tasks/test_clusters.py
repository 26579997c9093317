"""Which examples of a task are alike, for texts, for BLiMP and for data with a column that says so."""

import json

import numpy as np
import pytest

from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.requests import ExampleScores, ScoredTask, task_digest
from harness.tasks.clusters import BLOCK_CHARACTERS, block_count, by_column, window_clusters
from harness.tasks.documents import are_pieces, documents, likeness
from tests.evaluation.reference import tiny
from tests.tasks.asking import asked

STORY = "Once {0} went to a {0} house with a {0} hat and a very {0} friend. "


def stories(n):
    """Rows of about 300 characters, of which each has words of its own, in alphabetical order by these words."""
    return [STORY.format(f"w{i:03d}") * 4 for i in range(n)]


def test_windows_of_one_article_are_a_cluster():
    rows = [part for i in range(20) for part in (f" = Title {i} = \n", " == Section == \n", "word " * 100 + "\n")]
    text = "".join(rows)
    starts = np.arange(0, len(text), 100)
    clusters, protocol = window_clusters(documents(rows, ""), starts)
    assert protocol["clusters"] == "20 articles"
    begins = [len("".join(rows[:i])) for i in range(0, 60, 3)]
    assert clusters.tolist() == [sum(begin <= start for begin in begins) for start in starts]
    assert window_clusters(documents([text], ""), starts)[0].tolist() == clusters.tolist()  # the whole text in one row


def test_rows_are_documents_where_they_are_long_and_many():
    rows = ["word " * 60] * 30
    starts = np.arange(0, 30 * 302, 50)
    clusters, protocol = window_clusters(documents(rows, "\n\n"), starts)
    assert protocol["clusters"] == "30 rows" and (clusters == starts // 302 + 1).all()
    for few_or_short in (rows[:3], ["word"] * 2000, ["".join(rows)]):
        length = len("\n\n".join(few_or_short))
        starts = np.arange(0, length, length // 160)[:160]
        clusters, protocol = window_clusters(documents(few_or_short, "\n\n"), starts)
        assert protocol["clusters"] == "2 blocks"
        assert (np.bincount(clusters) == 80).all() and (np.diff(clusters) >= 0).all()
    assert window_clusters(documents(["ab"], ""), np.arange(1))[1]["clusters"] == "1 blocks"


@pytest.mark.parametrize(("n", "window", "size", "count"), [
    (9, 300, 2, 5),  # a window for each document
    (9, 3000, 2, 1),  # all documents in one window
    (64, 300, 4, 16), (64, 1500, 4, 13), (70, 300, 5, 14),
])
def test_short_documents_are_clusters_in_stretches(n, window, size, count):
    """A window belongs to the document in which it begins, and a cluster has whole documents in this sense."""
    rows = stories(n)
    length = len(rows[0]) + 2
    starts = np.arange(0, length * n, window)
    clusters, protocol = window_clusters(documents(rows, "\n\n"), starts)
    if len(starts) == 1:
        assert protocol["clusters"] == "1 blocks"
        return
    assert clusters.tolist() == (starts // length // size).tolist()
    assert protocol["clusters"] == f"{len(set(clusters))} stretches of {size} rows" and len(set(clusters)) == count


def test_rows_without_text_are_no_documents():
    rows = stories(40)
    spread = [part for row in rows for part in (row, "", " ")]
    starts = np.arange(0, len("".join(spread)), 400)
    plain, with_empty = (window_clusters(documents(one, ""), starts)[0].tolist() for one in (rows, spread))
    assert len(set(with_empty)) == len(set(plain)) and documents(spread, "").begins.size == 40


def test_pieces_of_one_text_are_no_documents():
    rng = np.random.default_rng(0)
    topics = [[f"t{i}w{j}" for j in range(30)] for i in range(12)]

    def piece(topic):
        return " ".join([*rng.choice(topics[topic], 20), *(f"common{k}" for k in rng.integers(0, 50, 30))])

    paragraphs = [piece(i // 5) for i in range(60)]  # five paragraphs of each of twelve documents
    assert likeness(paragraphs) > 0.75 and are_pieces(paragraphs)
    apart = [paragraphs[i] for i in rng.permutation(60)]
    assert abs(likeness(apart) - 0.5) < 0.11 and not are_pieces(apart)
    assert are_pieces([row[:150] for row in apart]) and are_pieces(["a long row " * 100])
    assert documents(paragraphs, "\n").begins.size == 0 and documents(apart, "\n").begins.size == 60


def test_likeness_of_rows_in_random_order_is_one_half():
    rng = np.random.default_rng(1)
    rows = [" ".join(f"w{k}" for k in rng.zipf(1.5, rng.integers(40, 90)) % 500) for _ in range(30)]
    found = [likeness([rows[i] for i in rng.permutation(30)]) for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.5, abs=4 * np.std(found) / np.sqrt(200))
    assert np.std(found) == pytest.approx(1 / np.sqrt(12 * 29), rel=0.25)
    assert likeness(["a b", "a b", "a b"]) == likeness(["a", "b"]) == likeness(["a", "b", "c"]) == 0.5


def test_a_column_says_which_rows_are_one_document(tmp_path):
    rows = [{"text": row[:100], "story": i // 3} for i, row in enumerate(stories(24))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"kind": "text", "data_files": str(path), "window": 8}
    settings_of = ({}, {"cluster_column": "story"})
    plain, column = (asked("t", **settings, **more).prepare("t", tiny()[1]) for more in settings_of)
    assert plain.protocol["clusters"] == "2 blocks"  # the rows are too short for documents
    assert column.protocol["clusters"] == "8 story" and task_digest(plain) != task_digest(column)
    assert len(set(blank_measure(column)["nll"].clusters.tolist())) == 8
    with pytest.raises(InputError, match="tasks.t.cluster_column: no column 'book'; its columns are text, story"):
        asked("t", **settings, cluster_column="book").prepare("t", tiny()[1])


def test_a_long_text_without_documents_has_more_blocks():
    """Each block has BLOCK_CHARACTERS characters, and there are at most eight."""
    assert [block_count(n * BLOCK_CHARACTERS + 1) for n in range(11)] == [2, 2, 2, 3, 4, 5, 6, 7, 8, 8, 8]
    starts = np.arange(0, 5 * BLOCK_CHARACTERS, 1000)
    clusters, protocol = window_clusters(documents(["x" * 5 * BLOCK_CHARACTERS], ""), starts)
    assert protocol["clusters"] == "5 blocks"
    assert (np.bincount(clusters) == BLOCK_CHARACTERS / 1000).all()


def test_the_same_text_in_other_rows_has_another_identity():
    starts = np.arange(0, 9000, 50)
    text = "word " * 1800
    halves = [[text[i : i + size] for i in range(0, 9000, size)] for size in (300, 450)]
    digests = {window_clusters(documents(rows, ""), starts)[1]["clusters_digest"] for rows in halves}
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
