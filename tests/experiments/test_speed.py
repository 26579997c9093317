"""The contest: its clock, its sums, and a page that follows from the committed numbers."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from harness.tasks.text import TextTask
from tests.checkpoints import save_checkpoint, text_file

FOLDER = Path(__file__).parents[2] / "experiments" / "speed"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def contest():
    return script("contest")


def test_a_part_inside_another_is_charged_to_itself_alone(contest, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(contest.time, "process_time", lambda: now[0])
    clock = contest.Clock()
    with clock.part("other", "", "harness"):
        now[0] += 1
        with clock.part("forward", "text"):
            now[0] += 2
            clock.wrap("head", lambda: now.__setitem__(0, now[0] + 4))()
        now[0] += 8
        with clock.part("edit", contestant="naive"):
            now[0] += 16
    now[0] += 32
    assert dict(clock.seconds) == {
        ("harness", "", "other"): 9, ("harness", "text", "forward"): 2, ("harness", "text", "head"): 4,
        ("naive", "", "edit"): 16,
    }


def test_ratios_sum_seconds_over_the_tasks_of_a_repeat(contest) -> None:
    rows = [
        {"repeat": number, "contestant": who, "ablations": 10, "seconds_per_cell": seconds}
        for number, who, seconds in ((0, "naive", 6), (0, "naive", 3), (0, "harness", 2), (0, "harness", 1),
                                     (1, "naive", 5), (1, "harness", 5))
    ]
    assert contest._ratios(rows, "naive", lambda row: True) == [3.0, 1.0]


def test_the_promise_of_resuming_is_the_formula(contest) -> None:
    row = {"repeat": 0, "n_blocks": 4}
    rows = [{**row, "contestant": "ideal", "forward_seconds": 8.0, "head_seconds": 3.0},
            {**row, "contestant": "harness", "forward_seconds": 5.5, "head_seconds": 3.0}]
    measured, promised = contest._reuse(rows)
    assert measured == [11 / 8.5]
    assert promised == [(4 * 2 + 3) / ((4 + 1) / 2 * 2 + 3)]


def test_the_page_follows_from_the_committed_numbers(contest, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("contest.csv", "parts.csv", "scaling.csv", "contest.txt"):
        shutil.copy(FOLDER / name, tmp_path)
    contest.report(tmp_path)
    assert (tmp_path / "README.md").read_text() == (FOLDER / "README.md").read_text()
    assert (tmp_path / "contest.png").stat().st_size > 10_000


def test_the_page_of_short_turns_has_the_medians_of_the_committed_numbers() -> None:
    """contest-again.md: what a cell of today costs over a cell of then, and the numbers of both."""
    turns = script("turns")
    rows, page = turns.read(), (FOLDER / "contest-again.md").read_text()
    for grid, n_rounds in (("stories15M", 36), ("GPT-2 size, random", 48)):
        rounds = turns.Rounds(rows, grid)
        whole, control = (rounds.cell(*pair)(rounds.rounds) for pair in (("now", "then"), ("now again", "now")))
        assert f"| {grid} | {n_rounds} | **{whole:.3f}** (" in page and f") | **{control:.3f}** (" in page
    assert {row["difference"] for row in rows if row["process"] != "now again"} == {"", "0"}


def test_a_repeat_times_every_part_of_every_contestant_and_their_numbers_agree(contest, tmp_path) -> None:
    """On a tiny model; what is timed is patched in by name, so a name that moved would show here."""
    pytest.importorskip("lm_eval")
    model, text = save_checkpoint(tmp_path / "model"), text_file(tmp_path / "text.txt")
    tasks = {"text": TextTask(data_files=str(text), window=16, limit=6)}
    settings = contest._settings(str(model), tasks, (0.5,), str(tmp_path / "study"))
    rows, parts, _ = contest.repeat("tiny", 0, settings, None, 1, {"tiny": {"text": 8}})
    assert [row["contestant"] for row in rows] == list(contest.CONTESTANTS)
    assert rows[0]["ablations"] == 6 and max(row["relative_difference"] for row in rows) < 1e-4
    seconds = {(row["contestant"], row["part"]): row["seconds_per_cell"] for row in parts}
    assert all(seconds["harness", part] > 0 for part in contest.PARTS)
    assert all(seconds[who, "forward"] > 0 for who in contest.CONTESTANTS)
    assert {cell.name.split(".")[0] for cell in (tmp_path / "study" / "metrics").iterdir()} >= {
        cell.id for cell in contest.plan(settings).units
    }
