"""The tracer counts what is known of a hand-made network, and traces the engine's own step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from benchmarks.step_traffic import trace_step
from benchmarks.traffic.launches import foreach_launches
from benchmarks.traffic.trace import Entry, Trace, tracing
from torch import Tensor, nn

from ddpm_kernels import group_norm_silu

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
    rows = (N + 2 * N) * 2 * C * 4
    sums = 2 * MAP + 2 * affine + statistics + rows
    dx = 3 * MAP + 4 * affine + statistics + rows
    assert found["norm backward"] == (2, sums + dx)
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


def test_what_no_table_knows_is_named() -> None:
    trace = Trace()
    with tracing(trace):
        torch.empty(3, 3, device=META).cumsum(0)
    assert trace.unknown == {"aten.cumsum": 1}
    assert [entry.launches for entry in trace.entries] == [1]


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
    assert ours["convolutions"] == theirs["convolutions"]
    assert ours["residual adds"] == theirs["residual adds"]
    flop = [sum(e.flop for e in trace.entries) for trace in (engine, textbook)]
    assert flop[0] == flop[1]
    assert sum(e.bytes for e in engine.entries) < 0.7 * sum(e.bytes for e in textbook.entries)
    assert ours.get("casts", (0, 0))[0] <= 3 < theirs["casts"][0]  # weights have a half already
