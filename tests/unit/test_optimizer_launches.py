"""What the optimizer step of the default networks launches and moves, from its own launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.half_weights import half_names
from ddpm_engine.presets import PRESETS
from ddpm_kernels import adamw_step, gradient_norm
from ddpm_kernels.dispatch import assume_gpu
from ddpm_kernels.triton_shim import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Names and arguments of what is launched, on tensors whose memory is never touched."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[str, dict[str, Any]]] = []

    def note(self: Any, *arguments: Any, **named: Any) -> None:
        found.append(
            (self.fn.__name__, {**dict(zip(self.arg_names, arguments, strict=False)), **named})
        )

    monkeypatch.setattr(JITFunction, "run", note)
    with assume_gpu("sm_90"):
        yield found


def moved(name: str, arguments: dict[str, Any]) -> tuple[int, int]:
    """Weights that a launch takes, and bytes that it moves for them, its table included."""
    rows: Tensor = arguments["rows"]
    weights = int(rows[:, 3].sum())
    bytes_ = arguments["GRADIENT"].primitive_bitwidth // 8 * weights + rows.nbytes
    if name == "update_kernel":
        bytes_ += (3 + arguments["AVERAGES"]) * 8 * weights
        in_shadow = rows[:, 2] < arguments["shadow_size"]
        bytes_ += 2 * int(rows[in_shadow, 3].sum())
    return weights, bytes_


@pytest.mark.parametrize("preset", ["cifar10", "celebahq256"])
def test_six_launches_move_38_bytes_a_weight(
    launches: list[tuple[str, dict[str, Any]]], preset: str
) -> None:
    """Two of the norm and two of the step for gradients in half precision and others."""
    with torch.device("meta"):
        model = build_network(PRESETS[preset]().model)
    halved = half_names(model)
    names = halved + [name for name, _ in model.named_parameters() if name not in set(halved)]
    gradients, offsets, end, half = [], [], 0, 0
    for index, name in enumerate(names):
        dtype = torch.bfloat16 if index < len(halved) else torch.float32
        gradients.append(torch.empty(model.get_parameter(name).shape, dtype=dtype))
        offsets.append(end)
        end += -(-gradients[-1].numel() // 4) * 4
        half = end if index < len(halved) else half
    number = torch.zeros(())
    gradient_norm(gradients)
    weights, exp_avg, exp_avg_sq, average = (torch.empty(end) for _ in range(4))
    adamw_step(
        gradients, offsets, weights, exp_avg, exp_avg_sq, average[None],
        torch.empty(half, dtype=torch.bfloat16), number, number, torch.zeros(1), number, number,
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    assert [name for name, _ in launches] == [
        "squares_kernel", "squares_kernel", "root_kernel",
        "begin_kernel", "update_kernel", "update_kernel",
    ]  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    each = [(name, *moved(name, a)) for name, a in launches if "rows" in a]
    for kernel in ("squares_kernel", "update_kernel"):
        assert sum(weights for name, weights, _ in each if name == kernel) == count
    total = sum(bytes_ for *_, bytes_ in each)
    assert 38 * count <= total <= 38.1 * count
