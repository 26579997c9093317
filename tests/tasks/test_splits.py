"""The split of examples by hash, and that the tasks honour it."""

import hashlib
import json

import pytest

from harness.errors import InputError
from harness.evaluation.requests import TaskContext
from harness.tasks.ioi import IoiTask
from harness.tasks.settings import position
from tests.tasks.asking import asked

ROWS = [{"text": f"row {i}"} for i in range(400)]


def of(part, share=0.2, limit=None, rows=ROWS):
    task = IoiTask(part=part, selection_share=share, limit=limit)
    return task.choose("tasks.x", rows, lambda row: row["text"])


def test_all_rows_in_file_order_without_a_part():
    assert of(None) == list(enumerate(ROWS))
    assert of(None, limit=3) == list(enumerate(ROWS))[:3]


def test_the_parts_are_disjoint_complete_and_of_the_share_asked_for():
    selection, report = (dict(of(part)) for part in ("selection", "report"))
    assert not selection.keys() & report.keys()
    assert selection.keys() | report.keys() == set(range(400))
    assert 0.13 < len(selection) / 400 < 0.27  # 3.5 standard deviations of a binomial
    larger = dict(of("selection", 0.5))
    assert selection.keys() < larger.keys()


def test_membership_follows_the_text_not_the_order_or_the_limit():
    rows = ROWS[::-1]
    assert [row for _, row in of("selection", rows=rows)] == [row for _, row in of("selection")]
    assert of("selection", limit=7) == of("selection")[:7]
    doubled = of("selection", rows=ROWS + ROWS)
    assert len(doubled) == 2 * len(of("selection"))


def test_position_is_the_head_of_blake2b():
    expected = int(hashlib.blake2b("row é".encode(), digest_size=6).hexdigest(), 16) / 16**12
    assert position("row é") == expected


def test_an_empty_part_and_a_bad_setting_are_refused():
    with pytest.raises(InputError, match="tasks.x.part: none of the 1 examples is in the"):
        of("selection" if position("row 0") > 0.5 else "report", 0.5, rows=ROWS[:1])
    for kind in ("ioi", "factual", "lambada", "blimp", "bigbench", "masked", "classification", "seq2seq"):
        for values, key in (
            ({"limit": 0}, "limit"), ({"part": "test"}, "part"), ({"selection_share": 0.0}, "selection_share"),
            ({"part": "report", "selection_share": 1.0}, "selection_share"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=f"^tasks.x.{key}: .* is wrong; "):
                asked("x", kind=kind, **values)


class Tokenizer:
    bos_token, bos_token_id, eos_token, eos_token_id = "<s>", 0, "</s>", 1

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [0] * add_special_tokens + [2 + ord(c) for c in text]


def test_a_task_reports_row_numbers_of_the_file_and_says_its_part(tmp_path):
    names = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal"]
    rows = [{"prompt": f"{a} and {b} sat. {b} gave it to", "answer": a} for a in names for b in names if a != b]
    path = tmp_path / "ioi.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = TaskContext(Tokenizer(), None, 128, "causal")
    tasks = {p: IoiTask(data_files=str(path), part=p).prepare("ioi", context)
             for p in ("selection", "report", None)}
    assert set(tasks["selection"].example_ids) | set(tasks["report"].example_ids) == set(tasks[None].example_ids)
    assert len(tasks["selection"].example_ids) + len(tasks["report"].example_ids) == len(rows)
    assert tasks["selection"].protocol["part"] == "selection" and "part" not in tasks[None].protocol
    for i, number in enumerate(tasks["selection"].example_ids):
        whole = tasks[None].requests[2 * int(number)]
        assert whole.tokens.tolist() == tasks["selection"].requests[2 * i].tokens.tolist()
