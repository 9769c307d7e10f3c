"""Arguments of `adamw_step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tests.kernels.inputs import Arguments
from torch import Tensor

NUMBERS: Arguments = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.03}
REFERENCE_NUMBERS: Arguments = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.03}
"""The same, as the operation takes them."""
BUFFERS = ("weights", "exp_avg", "exp_avg_sq", "averages", "shadow")
STATE = (*BUFFERS, "step")
SIZES = (300, 1, 129, 128, 7)
"""With tiles of 128: two and a bit, one element, one more than a tile, a tile, a few."""


def of_adamw_step(
    sizes: Sequence[int] = SIZES,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    *,
    alignment: int = 4,
    averages: int = 1,
    shadow: torch.dtype | None = torch.bfloat16,
    skip: float = 0,
    scale: float = 2,
    seed: int = 0,
) -> Arguments:
    """What `adamw_step` takes after seven updates; dtypes in turn; segments with gaps between."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // alignment) * alignment
    count = end + alignment
    half = offsets[len(sizes) // 2] + sizes[len(sizes) // 2] // 2
    weights = normal(count)
    return {
        "gradients": [
            (scale * normal(size)).to(dtypes[i % len(dtypes)]) for i, size in enumerate(sizes)
        ],
        "offsets": offsets,
        "weights": weights,
        "exp_avg": 0.1 * normal(count),
        "exp_avg_sq": normal(count).square(),
        "averages": weights + 0.1 * normal(averages, count),
        "shadow": None if shadow is None else weights[:half].to(shadow),
        "step": torch.tensor(7.0),
        "learning_rate": torch.tensor(1e-2),
        "ema_weights": torch.tensor([0.3, 1e-4, 1.0, 0.75])[:averages],
        "gradient_scale": torch.tensor(float(scale)),
        "skip": torch.tensor(float(skip)),
    }


def mapped(change: Callable[[Tensor], Tensor], arguments: Arguments) -> Arguments:
    """Change every tensor, also those in the list of gradients."""
    return {
        name: change(value)
        if isinstance(value, Tensor)
        else [change(v) if isinstance(v, Tensor) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in arguments.items()
    }
