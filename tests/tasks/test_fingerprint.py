"""Plain values of Python objects: equal for what means the same, without addresses, paths and orders of sets."""

from __future__ import annotations

import enum
import functools
import re
import threading
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.tasks.fingerprint import Describer, digest_of


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


def made(value: Any):
    def inside(row):
        return value

    return inside


def with_default(row, threshold=0.5):
    return threshold


@functools.cache
def remembering(row):
    return row


def other_default(threshold: float):
    def with_default(row, threshold=threshold):
        return threshold

    return with_default


# Two objects that mean different things.
DIFFERENT = [
    (1, "1"), (True, "True"), ([1, [2]], [[1], 2]), ({"a": 1}, {"a": 2}), ({1: "a"}, {"1": "a"}), (b"a", b"b"),
    ({1, 2}, {1, 3}), ({1, 2}, [1, 2]), (np.arange(3), np.arange(3.0)), (Colour.RED, Colour.BLUE),
    (date(2020, 1, 1), date(2020, 1, 2)), (Holder(1), Holder(2)), (made(1), made(2)), (made("x"), made({"x": 1})),
    (functools.partial(made, 1), functools.partial(made, 2)), (re.compile("a"), re.compile("a", re.I)),
    (other_default(0.1), other_default(0.2)), (str.lower, str.upper), (len, sum), ("a".join, "b".join),
    (int, float), (Holder, Colour), (with_default, remembering), (lambda row: row["a"], lambda row: row["b"]),
]
# Functions that make two objects that mean the same.
SAME = [
    lambda: {"b": 1, "a": [1.5, None]}, lambda: set("abcdef"), lambda: np.arange(4), lambda: Holder({"a": {1, 2}}),
    lambda: made(Holder(made(3))), lambda: functools.partial(made, key=set("xyz")), lambda: Path(f"/{id([])}/name"),
    lambda: Holder(threading.Lock()), lambda: remembering, lambda: other_default(0.5), lambda: made(threading.Lock()),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=[str(i) for i in range(len(DIFFERENT))])
def test_what_is_different_is(one, other) -> None:
    assert digest_of(one) != digest_of(other)


@pytest.mark.parametrize("make", SAME, ids=[str(i) for i in range(len(SAME))])
def test_what_means_the_same_is_the_same(make) -> None:
    kept = [make(), make()]
    assert digest_of(kept[0]) == digest_of(kept[1])
    text = str(Describer().plain(kept[0]))
    assert " at 0x" not in text and str(Path(__file__).parent) not in text


def test_the_order_of_keys_and_numbers_of_numpy_do_not_matter() -> None:
    assert digest_of({"a": np.float64(1), "b": np.int64(2)}) == digest_of({"b": 2, "a": 1.0})


def test_an_object_may_hold_itself() -> None:
    held = Holder(None)
    held.held = [held]
    assert digest_of(held) == digest_of(held)


def test_a_function_typed_in_is_its_code() -> None:
    def typed(text: str):
        names: dict[str, Any] = {}
        exec(text, names)  # has no file
        return names["f"]

    assert digest_of(typed("def f(x): return x + 1")) == digest_of(typed("def f(x): return x + 1"))
    assert digest_of(typed("def f(x): return x + 1")) != digest_of(typed("def f(x): return x - 1"))
    assert digest_of(typed("def f(x): return x + 1")) != digest_of(typed("def f(x): return x + 2"))
