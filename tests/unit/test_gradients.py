"""Gradients summed in a flat buffer, and exchanged while the backward pass goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_engine.training.strategies import gradients
from ddpm_engine.training.strategies.flat_state import FlatState
from ddpm_engine.training.strategies.gradients import LocalGradients, SummedGradients


class Chain(nn.Module):
    """Linear layers one after the other, of which some can be left out, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor, left_out: int = -1) -> Tensor:
        for index, layer in enumerate(self.layers):
            if index != left_out:
                x = layer(x.to(layer.weight.dtype)).tanh()  # type: ignore[arg-type]
        return self.norm(x.to(self.norm.weight.dtype)).square().mean()


class TwinRank:
    """Stands in for a second rank with the same gradients; notes what is exchanged, and when."""

    def __init__(self) -> None:
        self.exchanged: list[int] = []
        self.during_backward = 0
        self.in_backward = False

    def all_reduce(self, flat: Tensor, async_op: bool) -> Any:
        assert async_op
        self.exchanged.append(int(flat.storage_offset()))
        self.during_backward += self.in_backward
        return _Doubling(flat)


class _Doubling:
    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    def wait(self) -> None:
        self._flat *= 2


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> TwinRank:
    twin = TwinRank()
    monkeypatch.setattr(gradients.dist, "all_reduce", twin.all_reduce)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 200)  # a layer or two
    return twin


def piece(number: int) -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(number))


def expected(model: Chain, state: FlatState, pieces: range, left_out: int) -> Tensor:
    """Sums of autograd's gradients as a flat buffer."""
    flat = torch.zeros_like(state.weights)
    for number in pieces:
        model.zero_grad()
        model(piece(number), left_out).backward()
        for segment in state.segments:
            gradient = dict(model.named_parameters())[segment.name].grad
            if gradient is not None:
                segment.view(flat).add_(gradient)
    model.zero_grad()
    return flat


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["float", "bf16"])
@pytest.mark.parametrize("left_out", [-1, 0, 4])
def test_sums_over_pieces_and_ranks(
    left_out: int, half: torch.dtype | None, twin: TwinRank
) -> None:
    model = Chain()
    state = FlatState(model, [], half)
    # Every layer takes part in the first step, so that the buffer is not zero any more.
    out = [-1, left_out, left_out]
    sums = [expected(model, state, range(2 * k, 2 * k + 2), out[k]) for k in range(3)]
    summed = SummedGradients(model, state, ranks=2)
    orders = []
    for step in range(3):
        for number in (2 * step, 2 * step + 1):
            with summed.accumulate(last=number % 2 == 1):
                loss = model(piece(number), out[step])
                twin.in_backward = True
                loss.backward()
                twin.in_backward = False
                assert number % 2 or not twin.exchanged
        (flat,) = summed.take()
        summed.clear()
        assert flat.dtype == torch.float32
        torch.testing.assert_close(flat, 2 * sums[step], rtol=1e-6, atol=0)
        orders.append(tuple(twin.exchanged))
        twin.exchanged.clear()
    assert len(orders[0]) > 3
    # The same on every rank, whatever took part.
    assert set(orders) == {tuple(bucket.flat.storage_offset() for bucket in summed._buckets)}
    # What waits for the last layer waits for the end; everything, if nothing is missing, is early.
    possible = 3 * len(orders[0])
    first = len(orders[0])
    early = {-1: [possible], 0: range(first + 2, possible), 4: [first]}
    assert twin.during_backward in early[left_out]


def test_nothing_is_collected_once_closed(twin: TwinRank) -> None:
    model = Chain()
    summed = SummedGradients(model, FlatState(model, []), ranks=2)
    summed.close()
    model(piece(0)).backward()
    assert not twin.exchanged
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_local_gradients_stay_where_they_are() -> None:
    model = Chain()
    state = FlatState(model, [])
    local = LocalGradients(model, state)
    with local.accumulate(last=True):
        model(piece(0), left_out=2).backward()
    taken = local.take()
    assert len(taken) == len(state.segments)
    for gradient, (name, parameter) in zip(taken, model.named_parameters(), strict=True):
        assert gradient is parameter.grad or name.startswith("layers.2.")
        assert name.startswith("layers.2.") == (not gradient.any())
    local.clear()
    assert all(parameter.grad is None for parameter in model.parameters())
