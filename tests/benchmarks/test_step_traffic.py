"""The tracer counts what is known of a hand-made network, and traces the engine's own step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from benchmarks.step_traffic import trace_step
from benchmarks.traffic.launches import foreach_launches
from benchmarks.traffic.trace import Entry, Trace, tracing
from torch import Tensor, nn

from ddpm_kernels import group_norm_silu, group_norm_silu_residual, modulate, residual_sum
from ddpm_kernels.dropout import Dropout

META = torch.device("meta")
N, C, SIDE = 128, 64, 8
MAP = N * C * SIDE * SIDE * 2
"""Bytes of a feature map in bfloat16."""


def channels_last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    empty = torch.empty(shape, dtype=dtype, device=META, memory_format=torch.channels_last)
    return empty.requires_grad_()


def counts(entries: list[Entry]) -> dict[str, tuple[int, int]]:
    """Launches and bytes of each pass."""
    launches, moved = Counter[str](), Counter[str]()
    for entry in entries:
        launches[entry.step_pass] += entry.launches
        moved[entry.step_pass] += entry.bytes
    return {name: (launches[name], moved[name]) for name in launches}


def test_a_convolution_and_a_norm() -> None:
    """Every number is worked out by hand."""
    x, weight = channels_last(N, C, SIDE, SIDE), channels_last(C, C, 3, 3)
    bias, (gamma, beta) = nn.Parameter(torch.empty(C, device=META)), torch.empty(2, C, device=META)
    gamma, beta = nn.Parameter(gamma), nn.Parameter(beta)
    trace = Trace()
    with tracing(trace):
        with trace.during("network"):
            h = nn.functional.conv2d(x, weight, bias.bfloat16(), padding=1)
            y = group_norm_silu(h, 32, gamma, beta)
        with trace.during("backward"):
            y.backward(torch.empty_like(y))
    found = counts(trace.entries)
    affine, statistics = 4 * C, N * 3 * 32 * 4
    assert found["convolutions"] == (1 + 2, 0)
    assert found["convolution biases"] == (1, 2 * MAP + 2 * C)
    # Each sample in one launch, which is given room for moments that it does not need: none.
    assert found["norm forward"] == (1, 2 * MAP + 2 * affine + statistics)
    # x and dy are read once and dx is written; each sample's terms of dγ and dβ pass between two.
    rows = N * 2 * C * 4
    assert found["norm backward"] == (2, 3 * MAP + 4 * affine + statistics + 2 * rows)
    assert found["bias gradients"] == (1, MAP + 2 * C)
    assert found["casts"] == (2, 2 * (2 + 4) * C)  # of the bias, and of its gradient
    assert set(found) == {
        "convolutions", "convolution biases", "norm forward", "norm backward", "bias gradients",
        "casts",
    }  # fmt: skip
    assert not trace.unknown
    assert not trace.host_reads
    flop = sum(entry.flop for entry in trace.entries)
    assert flop == 3 * 2 * N * C * C * 9 * SIDE * SIDE


def test_the_norm_of_two_large_maps_and_the_sum_that_follows() -> None:
    """A vector, dropout and the residual's gradient cost no pass; large maps are read twice."""
    side = 64
    maps = N * C * side**2 * 2
    x, skip, h = (channels_last(N, C, side, side) for _ in range(3))
    before = torch.empty(N, 2 * C, device=META, dtype=torch.bfloat16, requires_grad=True)
    gamma, beta = (nn.Parameter(torch.empty(2 * C, device=META)) for _ in range(2))
    dropout = Dropout(0.1, torch.empty(N, dtype=torch.int64, device=META))
    trace = Trace()
    with tracing(trace):
        with trace.during("network"):
            y, x_on, skip_on = group_norm_silu_residual(
                x, 32, gamma, beta, skip=skip, before=before, dropout=dropout
            )
            assert skip_on is not None
            total, moments = residual_sum(h.detach(), x_on, torch.empty(C, device=META))
        with trace.during("backward"):
            torch.autograd.backward([y, total, skip_on], [*map(torch.empty_like, (y, total, x))])
    assert moments is not None
    found = counts(trace.entries)
    small = 0.03 * maps
    launches, moved = found["norm forward"]
    assert (launches, moved) == (2, pytest.approx((2 + 2 + 2) * maps, abs=small))
    assert found["residual sums"] == (1, pytest.approx(3 * maps, abs=small))
    # Sums read both maps and dy; dx reads these and what autograd would add, and is written.
    _, moved = found["norm backward"]
    assert moved == pytest.approx((4 + 4 + 2 + 2) * maps, abs=4 * small)
    assert set(found) <= {
        "norm forward", "norm backward", "residual sums", "condition gradients", "casts"
    }  # fmt: skip


def test_a_product_that_accumulates() -> None:
    """What it adds to is read and written once more; that of a fresh product is not counted."""
    rows, weights = (torch.empty(*shape, device=META) for shape in ((512, 64), (64, 32)))
    trace = Trace()
    with tracing(trace), trace.during("network"):
        torch.mm(rows, weights).addmm_(rows, weights)
    found = counts(trace.entries)
    assert found["linear layers, attention"] == (2, 0)
    assert found["accumulating products"] == (0, 2 * 512 * 32 * 4)
    assert sum(entry.flop for entry in trace.entries) == 2 * 2 * 512 * 64 * 32


def test_what_no_table_knows_is_named() -> None:
    trace = Trace()
    with tracing(trace):
        torch.empty(3, 3, device=META).cumsum(0)
    assert trace.unknown == {"aten.cumsum": 1}
    assert [entry.launches for entry in trace.entries] == [1]


@pytest.mark.parametrize("gated", [True, False])
def test_the_join_of_a_transformers_branches(gated: bool) -> None:
    """Each map is read or written once: 8 and 12 bytes an element; with no branch yet 4 and 8."""
    batch, length, channels = 256, 64, 384

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device=META, dtype=dtype, requires_grad=True)

    x, y = empty(batch, length, channels), empty(batch, length, channels)
    gate, scale, shift = empty(batch, 6 * channels).chunk(6, dim=1)[:3]
    trace = Trace()
    with tracing(trace):
        with trace.during("network"):
            r, m = modulate(x, y if gated else None, gate if gated else None, scale, shift)
        with trace.during("backward"):
            torch.autograd.backward([r, m], [torch.empty_like(x), torch.empty_like(x)])
    found = counts(trace.entries)
    maps, row = batch * length * channels * 2, batch * channels * 2
    assert found["residual, norm, modulation"] == (
        (1, 4 * maps + 3 * row) if gated else (1, 2 * maps + 2 * row)
    )
    launches, moved = found["residual, norm, modulation backward"]
    sums = batch * 3 * channels * 4  # of one program a sample, written and read
    assert launches == 2
    assert moved - 2 * sums == (6 * maps + 6 * row if gated else 4 * maps + 4 * row)


def test_launches_over_lists_of_tensors() -> None:
    def sized(*sizes: int) -> list[Tensor]:
        return [torch.empty(size, device=META) for size in sizes]

    assert foreach_launches(sized(*[1] * 110), 1) == 1
    assert foreach_launches(sized(*[1] * 111), 1) == 2
    assert foreach_launches(sized(*[1] * 37), 4) == 2
    assert foreach_launches(sized(320 * 65536), 1) == 1
    assert foreach_launches(sized(320 * 65536 + 1), 1) == 2


@pytest.mark.parametrize("what", ["training", "sampling"])
def test_a_step_of_the_digits(what: str) -> None:
    """The engine's own step, traced: nothing is read by the host, and everything is known."""
    engine, textbook = (trace_step("digits", 64, what, c, "bf16") for c in ("engine", "textbook"))
    for trace in (engine, textbook):
        assert not trace.unknown
        assert trace.host_reads == 0
    ours, theirs = (counts(trace.entries) for trace in (engine, textbook))
    flop = [sum(e.flop for e in trace.entries) for trace in (engine, textbook)]
    # Where maps are halved, a row and a column of outputs more.
    assert flop[1] < flop[0] < 1.05 * flop[1]
    assert sum(e.bytes for e in engine.entries) < 0.3 * sum(e.bytes for e in textbook.entries)
    assert sum(e.launches for e in engine.entries) < 0.5 * sum(e.launches for e in textbook.entries)
    assert "convolution biases" in theirs
    assert "convolution biases" not in ours
    assert "condition adds" in theirs
    assert "condition adds" not in ours
    # Weights have a half already; what is left are biases, and the embedding.
    assert ours["casts"][0] <= 8 < theirs["casts"][0]
