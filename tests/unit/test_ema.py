"""The EMA of the weights: its warm-up, its arithmetic, and what it copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpm_engine.training.ema import EMA, warmed_up


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.tensor(0))


def test_the_average_follows_its_formula() -> None:
    model = Counter()
    ema = EMA(model, warmed_up(0.9))
    expected = 0.0
    for update in range(200):
        nn.init.constant_(model.weight, update + 1)
        ema.update(model, update)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * (update + 1)
        if update == 0:  # the initial weights are mostly forgotten at once
            assert ema.model.weight.tolist() == pytest.approx([0.9] * 3)
    assert ema.model.weight.tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_the_average_is_apart_from_training_and_copies_buffers() -> None:
    model = Counter()
    ema = EMA(model, warmed_up(0.9))
    nn.init.constant_(model.weight, 5)
    model.seen.fill_(7)
    assert ema.model.weight.tolist() == [0.0] * 3
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not ema.model.training
    assert model.training
    ema.update(model, 1000)
    assert int(ema.model.seen) == 7
