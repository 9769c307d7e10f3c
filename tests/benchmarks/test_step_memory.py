"""Rows of the benchmark of a step's memory."""

from __future__ import annotations

from benchmarks.step_memory import rows

from ddpm_engine.presets import PRESETS
from ddpm_engine.training.step_memory import RESERVED


def test_what_does_not_fit_a_card_is_followed_by_what_does() -> None:
    card = RESERVED / 1e9 + 0.04  # between the digits in bf16 and in float32
    half, plain, pieces, norms, blocks = rows("digits", PRESETS["digits"](), card)
    assert (half["precision"], half["fits"]) == ("bf16", True)
    assert (plain["precision"], plain["fits"]) == ("no", False)
    assert pieces["accumulation"] > 1
    assert pieces["fits"]
    assert (norms["recompute"], blocks["recompute"]) == ("norms", "blocks")
    assert norms["kept_gb"] < plain["kept_gb"]
    assert blocks["kept_gb"] < plain["kept_gb"]
    assert {row["kind"] for row in (half, plain, pieces, norms, blocks)} == {"model"}
