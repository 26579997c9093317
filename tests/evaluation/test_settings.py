"""Settings of a run that reach the scorer."""

from __future__ import annotations

import math

import pytest

from harness.errors import InputError
from harness.evaluation.settings import GIB, AdaptiveSettings, RuntimeSettings, ScoringOptions


def test_what_a_scorer_is_told():
    assert RuntimeSettings().scoring() == ScoringOptions(
        batch_tokens=8192, logit_rows=1024, reuse=True, share_context=True, stream_bytes=8 * GIB, host_bytes=32 * GIB,
        lazy=False, cuda_graphs="auto",
    )  # fmt: skip
    settings = RuntimeSettings(
        batch_tokens=7, logit_rows=3, reuse=False, share_context=False, stream_gib=0.5, stream_host_gib=0.0,
        precision="adaptive",
    )  # fmt: skip
    assert settings.scoring() == ScoringOptions(
        7, 3, False, False, GIB / 2, 0.0, lazy=True, cuda_graphs="auto"
    )
    unbounded = ScoringOptions()
    assert math.isinf(unbounded.stream_bytes) and unbounded.host_bytes == 0 and unbounded.reuse


def test_a_batch_that_has_not_been_found():
    settings = RuntimeSettings(batch_tokens=None)
    with pytest.raises(ValueError, match="runtime.batch_tokens has not been found yet"):
        settings.scoring()
    with pytest.raises(InputError, match="^runtime.batch_tokens: None is wrong; .*; harness submit needs a number$"):
        settings.require_batch_tokens("submit")
    RuntimeSettings(batch_tokens=1).require_batch_tokens("submit")


def test_at_what_an_adaptive_cell_stops():
    none = {"relative": None, "of_baseline": None}
    assert AdaptiveSettings().stops and AdaptiveSettings(sign=True, **none).stops
    assert AdaptiveSettings(absolute=0.1, **none).stops and not AdaptiveSettings(**none).stops
