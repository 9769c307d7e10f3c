"""The one loop that runs every sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.prediction import Prediction
from ddpm_engine.samplers.ddpm import Variance, ddpm_table
from ddpm_engine.samplers.spacing import Spacing, spaced_timesteps
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Stream, gaussian_noise, reverse_step

Model = Callable[..., Tensor]
"""`model(x, timesteps)` or `model(x, timesteps, labels)` → output, `[B, C, H, W]`."""

TableBuilder = Callable[[NoiseSchedule, Tensor, Prediction, Variance], CoefficientTable]
SAMPLERS: dict[str, TableBuilder] = {"ddpm": ddpm_table}


@dataclass(frozen=True)
class SamplingStep:
    """What the loop yields after each step. The tensors are overwritten by the next."""

    index: int
    """0 … S − 1."""
    timestep: int
    """The timestep that the network was shown."""
    x: Tensor
    """The state after the step, float32 `[B, C, H, W]`."""
    x0: Tensor
    """The estimate of the clean image that the step was made from, float32 `[B, C, H, W]`."""


@torch.inference_mode()
def sampling_steps(
    model: Model,
    table: CoefficientTable,
    shape: tuple[int, int, int],
    *,
    seed: int,
    sample_ids: Tensor,
    labels: Tensor | None = None,
    clip: bool = True,
) -> Iterator[SamplingStep]:
    """Run one batch through a coefficient table, yielding after every step.

    Args:
        model: called with x float32 `[B, C, H, W]` channels-last, timesteps int64 `[B]`, and labels
            if there are any.
        table: the sampler.
        shape: (C, H, W).
        seed: of all noise.
        sample_ids: int64 `[B]` on the model's device; picture k of a seed is the same picture in
            every batch.
        labels: int64 `[B]` classes, or None.
        clip: clip each estimate of x_0 to [-1, 1].
    """
    device = sample_ids.device
    rows = table.rows.to(device, torch.float32)
    seed_tensor = torch.tensor(seed, device=device)
    indices = torch.arange(len(rows), device=device)
    timesteps = table.timesteps.to(device)[:, None].expand(-1, len(sample_ids))
    conditioning = () if labels is None else (labels,)

    x = gaussian_noise(seed_tensor, sample_ids, shape, 0, Stream.INITIAL_NOISE)
    # At least one slot, so that every sampler's estimate of x_0 can be shown.
    # Each slot is channels-last, as the state is.
    slots = x.new_zeros(max(table.history, 1), *x.permute(0, 2, 3, 1).shape)
    history = slots.permute(0, 1, 4, 2, 3)
    if table.history == 0:
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
    for i, timestep in enumerate(table.timesteps.tolist()):
        output = model(x, timesteps[i], *conditioning)
        reverse_step(
            x, output, rows, indices[i], seed_tensor, sample_ids,
            history=history, clip=clip, in_place=True,
        )  # fmt: skip
        yield SamplingStep(i, timestep, x, history[i % len(history)])


def sample(
    model: Model,
    schedule: NoiseSchedule,
    *,
    sample_ids: Tensor | Sequence[int],
    seed: int = 0,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: Spacing = "trailing",
    variance: Variance = "fixed_large",
    prediction: Prediction = "eps",
    shape: tuple[int, int, int] | None = None,
    labels: Tensor | None = None,
    clip: bool = True,
    batch_size: int = 64,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw pictures.

    Picture k of seed s starts from the same noise, and meets the same noise at every step, whatever
    else is drawn with it: the result does not depend on batch size, order or device count beyond
    the rounding of the network's own arithmetic.

    Args:
        model: `model(x, timesteps[, labels])`; put it in eval mode first.
        schedule: what the model was trained on.
        sample_ids: which pictures of the seed to make, int64 in [0, 2⁵⁶).
        seed: of all noise.
        sampler: a key of `SAMPLERS`.
        steps: how many of the schedule's timesteps to visit; None: all.
        spacing: which ones.
        variance: of the noise that ancestral sampling adds.
        prediction: what the model predicts.
        shape: (C, H, W); None: `model.sample_shape`.
        labels: int64 class of each picture, or None.
        clip: clip each estimate of x_0 to [-1, 1].
        batch_size: pictures at a time.
        on_step: called with the number of pictures advanced by each step, for progress bars.

    Returns:
        float32 `[len(sample_ids), C, H, W]` around [-1, 1], on the device of `sample_ids` if that
        is a tensor, else the model's.

    Raises:
        UserError: an unknown sampler, or steps that the schedule does not have.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
    steps = schedule.timesteps if steps is None else steps
    timesteps = spaced_timesteps(schedule.timesteps, steps, spacing)
    table = SAMPLERS[sampler](schedule, timesteps, prediction, variance)
    if shape is None:
        shape = model.sample_shape  # type: ignore[attr-defined]
    if not isinstance(sample_ids, Tensor):
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        device = next((p.device for p in parameters), torch.device("cpu"))
        sample_ids = torch.tensor(list(sample_ids), dtype=torch.int64, device=device)

    pictures = []
    for start in range(0, len(sample_ids), batch_size):
        ids = sample_ids[start : start + batch_size]
        batch_labels = None if labels is None else labels[start : start + batch_size]
        for step in sampling_steps(
            model, table, shape, seed=seed, sample_ids=ids, labels=batch_labels, clip=clip
        ):
            state = step.x
            if on_step is not None:
                on_step(len(ids))
        pictures.append(state)
    if not pictures:
        return torch.empty(0, *shape, device=sample_ids.device)
    return torch.cat(pictures)
