"""A sampler bound to a model: the one loop that every sampler runs in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.errors import UserError
from ddpm_engine.graphs import captured
from ddpm_engine.images.transfer import Pending, to_host
from ddpm_engine.memory import check_fits
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.half_weights import in_half
from ddpm_engine.runtime import DTYPES, autocast, check_precision, device_memory
from ddpm_engine.samplers.conditions import RequestConditions, check_shape
from ddpm_engine.samplers.finite import finite_samples, refuse_not_finite
from ddpm_engine.samplers.identity import Ids, numbers_of, tensor_of, whole
from ddpm_engine.samplers.initial_noise import (
    check_interpolation,
    initial_noise,
    noise_between,
    skipped_steps,
)
from ddpm_engine.samplers.inpainting import KnownPixels, check_mask, levels_of, resampled
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.noise_levels import check_guided_steps, noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.request import SampleRequest, as_source, rows_of
from ddpm_engine.samplers.step_runner import StepRunner
from ddpm_engine.samplers.timesteps import check_begins_in_noise
from ddpm_kernels import Column


@dataclass(frozen=True, eq=False)
class TrajectoryStep:
    """A step of a trajectory. Its tensors are overwritten by the next step."""

    index: int
    """0 … S − 1."""
    timestep: float
    """Timestep of the state before the step."""
    scale: float
    """Ratio between the loop's state after the step and x."""
    runner: StepRunner

    @property
    def x(self) -> Tensor:
        """The state after the step, x = a x_0 + s ε, float32 `[B, C, H, W]`."""
        return self.runner.x if self.scale == 1 else self.runner.x / self.scale

    @property
    def x0(self) -> Tensor:
        """The step's estimate of the clean image, float32 `[B, C, H, W]`."""
        return self.runner.x0(self.index)


class Sampler:
    """A request bound to a model: it owns the coefficient table and a step's buffers.

    Sample k of a seed starts from the same noise and meets the same noise at every step, whatever
    else is sampled with it: the result does not depend on batch size, order or number of devices,
    beyond the rounding of the network's own arithmetic. Whatever a batch shape needs, memory and on
    GPUs captured steps, is kept for the next batch of that shape.

    Args:
        model: the network and its process.
        request: what to sample.
        capture: whether to replay each step as a CUDA graph; None: on CUDA devices.

    Raises:
        UserError: a request that this model, or this machine, cannot serve.
    """

    def __init__(
        self,
        model: DiffusionModel,
        request: SampleRequest = SampleRequest(),  # noqa: B008
        *,
        capture: bool | None = None,
    ) -> None:
        self.model, self.device = model, model.device
        self.request = request = model.resolve(request)
        if self.device.type == "cpu":
            check_precision(request.precision, "`precision`")
        if request.cache_interval > 1 and not getattr(model.network, "caches_features", False):
            raise UserError(
                f"`cache_interval` is {request.cache_interval}, but this network caches no "
                "features: it has no deep levels to keep while the others are evaluated "
                "(DeepCache); leave it out"
            )
        self.sampling = sampling = request.sampling or model.sampling
        skip = 0
        if request.strength is not None:
            listed = request.timesteps
            count = (sampling.steps or 0) if listed is None else len(listed)
            skip = skipped_steps(count, request.strength)
        table = build_table(
            model.schedule, **sampling.table_options(), prediction=model.prediction,
            timesteps=request.timesteps, skip=skip,
        )  # fmt: skip
        if request.strength is None:
            check_begins_in_noise(model.schedule, table.timesteps, request.timesteps is not None)
        levels = levels_of(model.schedule, table)
        self.table, self._levels = resampled(table, levels, request.repeats)
        self.conditions = RequestConditions(model, request)
        """Whatever the samples are conditioned on."""
        if request.interpolate is not None:
            check_interpolation(request.interpolate, sampling.sampler, self.stochastic)
        self.network = in_half(model.network, DTYPES.get(request.precision))
        """The model's network; in half precision, one whose weights are converted already."""
        self._mask = None
        if request.mask is not None:
            check_mask(request.mask, (len(request.mask), *model.image_shape))
            self._mask = model.codec.from_mask(request.mask)
        self._capture = self.device.type == "cuda" if capture is None else capture
        self._key: object = None
        self._runner: StepRunner | None = None
        if request.guidance is not None:
            self.conditions.check_guided()
            check_guided_steps(request.guidance, self._levels.before)

    @property
    def evaluations(self) -> int:
        """Network evaluations per sample."""
        return self.table.evaluations

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return bool((self.table.rows[:, Column.NOISE] != 0).any())

    def settings(self) -> dict[str, Any]:
        """Return everything that determines the samples besides the model, as JSON values."""
        settings = {**self.request.settings(), "classes": self.classes}
        if self.sampling.clip_x0 != self.model.sampling.clip_x0:
            settings["clip_x0"] = self.sampling.clip_x0
        return settings

    @property
    def classes(self) -> tuple[int, ...] | None:
        """Class of samples 0, 1, 2, … and again from the first; None: the null class."""
        return self.conditions.classes

    def label_of(self, sample_id: int) -> int | None:
        """Return the class of a sample, or None."""
        return self.conditions.label_of(sample_id)

    @torch.inference_mode()
    def trajectory(
        self, ids: Ids, *, conditioning: Conditioning | None = None, keep_x0: bool = True
    ) -> Iterator[TrajectoryStep]:
        """Sample one batch, yielding after every step.

        Args:
            ids: `[B]`, in [0, 2⁵⁶).
            conditioning: conditions of the batch; None: those of the request.
            keep_x0: whether to make every step's estimate of x_0 available.

        Raises:
            UserError: ids out of range, images that cannot be read or have another shape, or
                guidance without conditions.
        """
        request, seed = self.request, self.request.seed
        numbers = numbers_of(ids)
        sample_ids = tensor_of(numbers, self.device)
        conditions = self.conditioning(numbers) if conditioning is None else conditioning
        conditions, null = self._precomputed(conditions)
        known = self._known_pixels(numbers)
        runner = self._runner_for(conditions, len(numbers), keep_x0)
        runner.begin(self._initial(numbers, sample_ids), seed, sample_ids, conditions, null)
        if known is not None and runner.known is not None:
            runner.known.begin(*known)
        scales = self.table.state_scale.tolist()
        for index, timestep in enumerate(self.table.timesteps.tolist()):
            with autocast(request.precision, self.device):
                runner.step()
            yield TrajectoryStep(index, timestep, scales[index + 1], runner)

    @torch.inference_mode()
    def sample(
        self,
        ids: Ids,
        *,
        conditioning: Conditioning | None = None,
        batch_size: int = 64,
        on_step: Callable[[int], None] | None = None,
        only_finite: bool = True,
    ) -> Tensor:
        """Sample, batch after batch.

        Args:
            ids: `[N]`, in [0, 2⁵⁶).
            conditioning: conditions of the samples, row by row; None: those of the request.
            batch_size: number of samples at a time.
            on_step: called with the number of samples that each step has advanced.
            only_finite: whether to refuse samples that are not finite numbers.

        Returns:
            float32 `[N, C, H, W]` around [-1, 1], on the model's device.

        Raises:
            UserError: as `trajectory`; a batch size below 1; `NotFiniteError`, which names the
                samples.
        """
        self.check_fits(len(ids), batch_size)
        samples = torch.empty(len(ids), *self.model.shape, device=self.device)
        for start in range(0, len(ids), batch_size):
            part = slice(start, start + batch_size)
            batch = ids[part]
            conditions = None if conditioning is None else conditioning.select(part)
            last = None
            for last in self.trajectory(batch, conditioning=conditions, keep_x0=False):  # noqa: B007
                if on_step is not None:
                    on_step(len(batch))
            assert last is not None, "a table has rows"
            samples[part] = last.x
            if only_finite:
                finite = finite_samples(last.x).tolist()
                refuse_not_finite(numbers_of(batch), self.request.seed, finite)
        return samples

    def images(
        self,
        ids: Ids,
        *,
        batch_size: int = 64,
        on_step: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Sample, and decode to uint8 images `[N, H, W, C]`; arguments as in `sample`."""
        return self.model.codec.decode(self.sample(ids, batch_size=batch_size, on_step=on_step))

    @torch.inference_mode()
    def start_images(
        self, ids: Ids, *, on_step: Callable[[int], None] | None = None
    ) -> np.ndarray | Pending:
        """Sample one batch as uint8 images `[B, H, W, C]`, on a GPU without waiting for them.

        Args:
            ids: `[B]`, in [0, 2⁵⁶).
            on_step: as in `sample`.

        Returns:
            uint8 `[B, H, W, C]`; of a GPU, a function that waits for them, so that the next batch
            can be queued meanwhile.

        Raises:
            UserError: as `trajectory`; `NotFiniteError`, also by that function.
        """
        numbers = numbers_of(ids)
        last = None
        for last in self.trajectory(numbers, keep_x0=False):  # noqa: B007
            if on_step is not None:
                on_step(len(numbers))
        assert last is not None, "a table has rows"
        x = last.x
        finite, levels = to_host(finite_samples(x)), to_host(self.model.codec.levels(x))

        def images() -> np.ndarray:
            refuse_not_finite(numbers, self.request.seed, finite().tolist())
            return levels()

        return images if self.device.type == "cuda" else images()

    def conditioning(self, ids: Sequence[int]) -> Conditioning:
        """Return the conditions that the request gives to a batch of samples `[B]`.

        Raises:
            UserError: as `RequestConditions.of`.
        """
        return self.conditions.of(ids)

    def check_fits(self, count: int, batch_size: int) -> None:
        """Refuse what takes more memory than there is.

        Args:
            count: samples that are kept at a time.
            batch_size: samples that are generated at a time.

        Raises:
            UserError: too many, or a batch size below 1.
        """
        if whole(batch_size, "batch_size") < 1:
            raise UserError(f"`batch_size` is {batch_size}; it must be at least 1", "batch_size")
        one, limit = 4 * math.prod(self.model.shape), device_memory(self.device)
        check_fits(count * one, "ids", "ask for fewer at a time", limit)
        # The state, and what the network makes of it.
        batch = 2 * one * min(count, batch_size)
        check_fits(batch, "batch_size", "choose a smaller one", limit)

    def check_inputs(self, sample_id: int) -> None:
        """Read the images that a sample is made from, if it is made from any.

        Raises:
            UserError: an image that cannot be read, or images or a mask of another shape.
        """
        ids = numbers_of([sample_id])
        sample_ids = tensor_of(ids, self.device)
        self.conditioning(ids)
        self._initial(ids, sample_ids)
        self._known_pixels(ids)

    def compile(self) -> None:
        """Compile the network block by block, on the next step that it takes."""
        self.network.compile_blocks()
        self._runner = self._key = None  # captured steps are of what was there before

    @torch.inference_mode()
    def warm_up(self, ids: Sequence[int]) -> None:
        """Take steps of each kind on meaningless data, so that compilers run now.

        Args:
            ids: of a batch such as those to come, `[B]`.

        Raises:
            torch.OutOfMemoryError: there is not enough memory for such a batch.
        """
        conditions, _ = self._precomputed(self.conditioning(ids))
        with autocast(self.request.precision, self.device):
            self._runner_for(conditions, len(ids), keep_x0=False).warm_up()
        # What decodes samples needs memory, too.
        self.model.codec.levels(torch.zeros(len(ids), *self.model.shape, device=self.device))

    def _precomputed(self, conditions: Conditioning) -> tuple[Conditioning, Conditioning | None]:
        """What the network makes of a batch's conditions, and of its null conditions if guided."""
        conditions = conditions.to(self.device)
        guided = self.request.guidance is not None
        null = self.conditions.null(conditions) if guided else None
        precompute = getattr(self.network, "precompute", None)
        if precompute is None:
            return conditions, null
        with autocast(self.request.precision, self.device):
            return precompute(conditions), None if null is None else precompute(null)

    def _runner_for(self, conditioning: Conditioning, batch: int, keep_x0: bool) -> StepRunner:
        """The buffers of a batch: the last batch's, if they fit."""
        key = batch, conditioning.layout(), keep_x0
        if self._runner is None or self._key != key:
            request, known, shape = self.request, None, (batch, *self.model.shape)
            self._runner = None  # free its memory first
            if self._mask is not None:
                rows = 1 if len(self._mask) == 1 else batch
                mask_shape = (rows, *self._mask.shape[1:])
                known = KnownPixels(self._levels, shape, mask_shape, self.device)
            self._runner = StepRunner(
                self.network,
                self.table,
                shape,
                conditioning,
                self.device,
                guidance=request.guidance,
                alpha_bar=self._levels.before,
                clip=bool(self.sampling.clip_x0),
                threshold=request.threshold,
                cache_interval=request.cache_interval,
                keep_x0=keep_x0,
                known=known,
                capture=captured if self._capture else None,
            )
            self._key = key
        return self._runner

    def _initial(self, ids: list[int], sample_ids: Tensor) -> Tensor:
        """The state before the first step."""
        request = self.request
        if request.interpolate is None:
            x = initial_noise(request.seed, sample_ids, self.model.shape)
        else:
            x = noise_between(request.seed, request.interpolate, ids, self.model.shape)
            x = x.to(self.device)
        if self.request.strength is not None:
            ends = noise_levels(self.model.schedule, self.table.timesteps)
            a, s = (level[0].item() for level in ends)
            x = a * self._given_images(ids) + s * x
        return self.table.state_scale[0].item() * x

    def _given_images(self, ids: list[int]) -> Tensor:
        assert self.request.images is not None, "checked"
        images = as_source(self.request.images).of(ids)
        check_shape("images", images, self.model.image_shape)
        return self.model.codec.from_images(images.to(self.device))

    def _known_pixels(self, ids: list[int]) -> tuple[Tensor, Tensor] | None:
        """The images of a batch and where they are known."""
        mask = self._mask
        if mask is None:
            return None
        mask = mask[rows_of(ids, len(mask))] if len(mask) > 1 else mask
        return self._given_images(ids), mask
