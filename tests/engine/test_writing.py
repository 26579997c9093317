"""The thread that writes rows: order, a bound, errors, and what is written when the measuring itself fails."""

from __future__ import annotations

import threading
import time

import pytest

from harness.engine.writing import WAITING, Writer


def test_everything_is_written_in_order_and_in_another_thread() -> None:
    written: list[tuple[int, bool]] = []
    with Writer(lambda value: written.append((value, threading.current_thread() is threading.main_thread()))) as writer:
        for value in range(50):
            writer.put(value)
    assert written == [(value, False) for value in range(50)]
    assert not any(thread.name == "rows" for thread in threading.enumerate())


def test_no_more_wait_than_the_bound() -> None:
    may_write, written, put = threading.Event(), [], []

    def write(value: int) -> None:
        may_write.wait(60)
        written.append(value)

    writer = Writer(write)
    filler = threading.Thread(target=lambda: [(writer.put(value), put.append(value)) for value in range(20)])
    filler.start()
    while len(put) < WAITING + 1:  # one is being written, and so many wait
        time.sleep(0.01)
    filler.join(0.3)
    assert filler.is_alive() and len(put) == WAITING + 1 and not written
    may_write.set()
    filler.join(60)
    writer.close()
    assert written == list(range(20))


def test_an_error_is_raised_at_the_next_value_and_nothing_is_written_after_it() -> None:
    written: list[int] = []

    def write(value: int) -> None:
        if value == 3:
            raise OSError("no room")
        written.append(value)

    with pytest.raises(OSError, match="no room"), Writer(write) as writer:
        for value in range(1000):
            writer.put(value)
    assert written == [0, 1, 2]
    writer = Writer(write)
    writer.put(3)
    with pytest.raises(OSError, match="no room"):
        writer.close()


def test_what_was_put_is_written_when_the_measuring_fails() -> None:
    written: list[int] = []
    with pytest.raises(KeyError, match="a bug"), Writer(written.append) as writer:
        for value in range(3):
            writer.put(value)
        raise KeyError("a bug")
    assert written == [0, 1, 2]
