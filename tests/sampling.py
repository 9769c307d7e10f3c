"""Sampling from bare networks, with whatever belongs to a sample given row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler, TrajectoryStep


class ById:
    """Images for some ids, one row for each.

    Args:
        ids: of the samples.
        images: `[N, C, H, W]`.
    """

    classes: tuple[int, ...] | None = None
    sha256 = ""

    def __init__(self, ids: Sequence[int], images: Tensor) -> None:
        self.rows = {k: row for row, k in enumerate(ids)}
        self.images = images

    def of(self, ids: Sequence[int]) -> Tensor:
        return self.images[[self.rows[k] for k in ids]]


def bind(
    network: Any,
    schedule: NoiseSchedule,
    ids: Sequence[int] | Tensor,
    *,
    labels: Tensor | None = None,
    prediction: str = "eps",
    clip: bool = True,
    shape: tuple[int, int, int] | None = None,
    capture: bool | None = None,
    **options: Any,
) -> tuple[Sampler, Conditioning]:
    """Bind a request to a network; images and labels are row by row for these ids."""
    sampling = SamplingConfig(clip_x0=clip)
    model = DiffusionModel(network, schedule, prediction, sampling, sample_shape=shape)
    numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    for name in ("images", "low_resolution"):
        if isinstance(options.get(name), Tensor):
            options[name] = ById(numbers, options[name])
    if model.spec.null_class is not None:
        options.setdefault("classes", "none" if labels is None else "all")
    sampler = Sampler(model, model.request(**options), capture=capture)
    return sampler, replace(sampler.conditioning(numbers), labels=labels)


def sample(
    network: Any,
    schedule: NoiseSchedule,
    *,
    sample_ids: Sequence[int] | Tensor,
    batch_size: int = 64,
    on_step: Callable[[int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Sample: float32 `[N, C, H, W]`; options as `bind` takes them."""
    sampler, conditioning = bind(network, schedule, sample_ids, **options)
    return sampler.sample(
        sample_ids, conditioning=conditioning, batch_size=batch_size, on_step=on_step
    )


def trajectory(
    network: Any, schedule: NoiseSchedule, *, sample_ids: Sequence[int] | Tensor, **options: Any
) -> Iterator[TrajectoryStep]:
    """Sample one batch step by step; options as `bind` takes them."""
    sampler, conditioning = bind(network, schedule, sample_ids, **options)
    return sampler.trajectory(sample_ids, conditioning=conditioning)
