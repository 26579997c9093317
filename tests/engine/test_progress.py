"""The progress of a run where there is no terminal: plain lines, and not too many."""

from __future__ import annotations

import sys

from harness.engine.progress import Progress


def test_a_plain_line_every_thirty_seconds_without_a_terminal(capsys):
    now = [0.0]
    with Progress(200, clock=lambda: now[0]) as progress:
        for i in range(200):
            progress.describe(f"cell {i}")
            now[0] += 1.0
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and not any("\r" in line for line in lines)
    assert lines[0] == "30 of 200 units after 30 s, about 170 s left: cell 29".replace("170 s", "3 min")
    with Progress(2, shown=False, clock=lambda: now[0]) as progress:
        now[0] += 100
        progress.update()
    assert capsys.readouterr().err == "" and progress.done == 1


def test_a_bar_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(3, "shard") as progress:
        progress.describe("2 shards")
        progress.update(2, failed=1)
    assert "2/3" in capsys.readouterr().err
