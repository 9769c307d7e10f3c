"""The EMA of the weights: its warm-up and its arithmetic."""

from __future__ import annotations

import pytest
import torch

from ddpm_engine.training.ema import move_towards, warmed_up


def test_the_average_follows_its_formula() -> None:
    decay = warmed_up(0.9)
    average, expected = [torch.zeros(3), torch.zeros(2, 2)], 0.0
    for updates in range(200):
        values = [torch.full_like(tensor, updates + 1.0) for tensor in average]
        move_towards(average, values, torch.tensor(1 - decay(updates)))
        share = min(0.9, (1 + updates) / (10 + updates))
        expected = share * expected + (1 - share) * (updates + 1)
        if updates == 0:  # the initial weights are mostly forgotten at once
            assert average[0].tolist() == pytest.approx([0.9] * 3)
    for tensor in average:
        assert tensor.flatten().tolist() == pytest.approx([expected] * tensor.numel(), rel=1e-5)
