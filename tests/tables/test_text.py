"""Numbers and tables as text."""

from __future__ import annotations

import numpy as np
import pytest

from harness.tables.text import (
    aligned,
    count,
    is_missing,
    layer_key,
    markdown_table,
    markdown_text,
    p_text,
    plus_minus,
    shorten,
    signed,
)


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (20.123, 0.456, "20.12 ± 0.46"),
        (0.61234, 0.0123, "0.612 ± 0.012"),
        (0.5, 0.0996, "0.50 ± 0.10"),
        (1234.5, 250.0, "1234 ± 250"),
        (-0.0042, 0.003, "-0.0042 ± 0.0030"),
        (3.25, None, "3.25"),
        (3.25, 0.0, "3.25"),
        (3e9, 1e8, "3e+09"),
        (float("nan"), 1.0, "-"),
        (None, None, "-"),
    ],
)
def test_value_with_its_error(value, stderr, text):
    assert plus_minus(value, stderr) == text


def test_p_values():
    assert [p_text(p) for p in (1e-9, 0.0123, 0.5, None)] == ["<0.0001", "0.0123", "0.50", "-"]


def test_signed():
    assert signed(20.123, 0.456) == "+20.12 ± 0.46" and signed(-0.0042, 0.003) == "-0.0042 ± 0.0030"
    assert signed(None, 0.1) == "-"


def test_missing_values():
    assert all(map(is_missing, (None, float("nan"), np.float64("nan"))))
    assert not any(map(is_missing, (0, 0.0, "", "nan", float("inf"), False)))


def test_layer_types_in_the_order_of_execution():
    types = ["up_proj", "z_proj", "q_proj", "a_proj", "down_proj", "o_proj"]
    assert sorted(types, key=layer_key) == ["q_proj", "o_proj", "up_proj", "down_proj", "a_proj", "z_proj"]


def test_counts_and_short_texts():
    assert [count(n, "figure") for n in (0, 1, 2)] == ["0 figures", "1 figure", "2 figures"]
    long = "random (small 0.05) seed 0"
    for width in range(3, 40):
        short = shorten(long, width)
        assert len(short) == min(width, len(long))
        assert short == long or short[0] == "r" and short[-1] == "0" and "…" in short


def test_tables():
    assert markdown_table([]) == ""
    rows = [{"region": "a|b", "value": 1.23456789, "n": 12345}, {"region": "c", "value": 2e9, "n": 1}]
    assert markdown_table(rows) == (
        "| region | value | n |\n|---|---|---|\n| a\\|b | 1.235 | 12345 |\n| c | 2e+09 | 1 |\n"
    )
    assert markdown_text("a|b") == "a\\|b"
    assert aligned([["name", "n"], ["a", "10"], ["long name", "5"]], n_left=1) == [
        "name        n", "a          10", "long name   5",
    ]  # fmt: skip
