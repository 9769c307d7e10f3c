"""What is decided about a batch before its noise: integers, the same to the bit everywhere."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.comparing import assert_equal
from tests.kernels.conftest import Backend, Guarded
from torch import Tensor

from ddpm_kernels import Stream, bernoulli, random_integers
from ddpm_kernels.draws import WORDS, Draws, training_draws
from ddpm_kernels.philox import MAX_SAMPLE_ID, random_words

EVERYTHING: dict[str, Any] = {
    "integers": 1000, "flip": True, "label_dropout": 0.3, "null_class": 10,
    "augmentation_levels": 251, "dropout_key": True, "dropped": True,
}  # fmt: skip


def expected(seed: int, ids: Tensor, labels: Tensor | None, **asked: Any) -> Draws:
    """The same by `random_integers` and `bernoulli`, one after the other."""
    step = asked.get("step", 0)
    integers, levels = asked.get("integers"), asked.get("augmentation_levels")
    dropped = bernoulli(seed, ids, asked.get("label_dropout", 0), step, Stream.LABEL_DROPOUT)
    return Draws(
        None if integers is None
        else random_integers(seed, ids, integers, step, Stream.TRAINING_TIMESTEP),
        bernoulli(seed, ids, 0.5, step, Stream.HORIZONTAL_FLIP) if asked.get("flip") else None,
        None if labels is None else labels.masked_fill(dropped, asked.get("null_class", 0)),
        None if levels is None
        else random_integers(seed, ids, levels, step, Stream.AUGMENTATION_LEVEL),
        keys(seed, ids, step) if asked.get("dropout_key") else None,
        dropped if asked.get("dropped") else None,
    )  # fmt: skip


def keys(seed: int, ids: Tensor, step: int) -> Tensor:
    """The first two words of the stream of dropout, the low one first, as 64 signed bits."""
    low, high = random_words(seed, ids, 2, step, Stream.DROPOUT).unbind(1)
    return torch.where(high < 2**31, high, high - 2**32) * 2**32 + low


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    ids=st.lists(st.integers(0, MAX_SAMPLE_ID), min_size=1, max_size=300),
    count=st.integers(1, 2**31),
    dropout=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    step=st.sampled_from((0, 1, 2**31, 2**32 - 1)),
)
def test_draws_are_those_of_one_stream_after_the_other(
    backend: Backend, seed: int, ids: list[int], count: int, dropout: float, step: int
) -> None:
    positions = torch.tensor(ids)
    labels = positions % 10
    asked: dict[str, Any] = {
        "integers": count, "flip": True, "label_dropout": dropout, "null_class": 10,
        "augmentation_levels": 1 + count % 1000, "dropout_key": True, "dropped": True,
        "step": step,
    }  # fmt: skip
    right = expected(seed, positions, labels, **asked)
    got = training_draws(
        seed, positions.to(backend.device), labels=labels.to(backend.device), **asked
    )
    for name, one, other in zip(Draws._fields, got, right, strict=True):
        assert_equal(one, other, name)


@pytest.mark.parametrize("wanted", [*product((False, True), repeat=6)])
def test_what_was_not_asked_for_is_not_drawn(backend: Backend, wanted: tuple[bool, ...]) -> None:
    ids = torch.tensor([7, 2**40, 0])
    names = ("integers", "flip", "labels", "augmentation_levels", "dropout_key", "dropped")
    asked = {
        name: {**EVERYTHING, "labels": ids % 10}[name]
        for name, is_wanted in zip(names, wanted, strict=True)
        if is_wanted
    }
    asked |= {name: EVERYTHING[name] for name in ("label_dropout", "null_class")}
    labels = asked.pop("labels", None)
    right = expected(-3, ids, labels, **asked)
    got = training_draws(
        -3, ids.to(backend.device), labels=None if labels is None else labels.to(backend.device),
        **asked,
    )  # fmt: skip
    assert tuple(one is not None for one in got) == wanted
    for one, other in zip(got, right, strict=True):
        assert_equal(one, other)


def test_words_themselves(backend: Backend) -> None:
    ids = torch.arange(1000) + 2**32 - 500
    words = training_draws(5, ids.to(backend.device), integers=WORDS).integers
    assert_equal(words, random_words(5, ids, 1, 0, Stream.TRAINING_TIMESTEP)[:, 0])
    assert words is not None
    assert int(words.max()) > 2**31


@pytest.mark.parametrize("batch", [1, 127, 128, 129, 300])
def test_nothing_outside_is_touched(
    backend: Backend, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **options: guarded(allocate(*a, **options)))
    ids = torch.arange(batch) * 3 + 11
    labels = ids % 10
    strided = torch.stack([ids, ids.flip(0)], dim=-1)[:, 0]
    right = expected(4, ids, labels, **EVERYTHING)
    for positions in (ids, strided):
        got = training_draws(
            torch.tensor(4, device=backend.device), guarded(positions), labels=guarded(labels),
            **EVERYTHING,
        )  # fmt: skip
        for one, other in zip(got, right, strict=True):
            assert_equal(one, other)


def test_labels_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels has shape \(2,\); it must be \(3,\)"):
        training_draws(0, torch.arange(3), labels=torch.arange(2))
