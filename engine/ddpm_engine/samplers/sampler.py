"""The one loop that runs every sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_engine.diffusion.config import MAX_LEVEL, Variance
from ddpm_engine.diffusion.guidance import Guidance
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.samplers.config import Spacing
from ddpm_engine.samplers.inpainting import Inpainting, KnownPixels, levels_of, resampled
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import build_table
from ddpm_engine.samplers.step_runner import Model, StepRunner, captured
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column, Stream, gaussian_noise


@dataclass(frozen=True)
class TrajectoryStep:
    """What the loop yields after each step. The tensors are overwritten by the next."""

    index: int
    """0 … S − 1."""
    timestep: float
    """The timestep that the step began at."""
    x: Tensor
    """The state after the step, x = a x_0 + s ε, float32 `[B, C, H, W]`."""
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
    low_resolution: Tensor | None = None,
    augmentation: int = 0,
    clip: bool = True,
) -> Iterator[TrajectoryStep]:
    """Run one batch through a coefficient table, yielding after every step.

    Args:
        model: called with x float32 `[B, C, H, W]` channels-last, timesteps `[B]`, and what there
            is of labels, enlarged images and their augmentation levels.
        table: the sampler.
        shape: (C, H, W).
        seed: of all noise.
        sample_ids: int64 `[B]` on the model's device; picture k of a seed is the same picture in
            every batch.
        labels: int64 `[B]` classes, or None.
        low_resolution: `[B, C, side, side]` to be enlarged, as in `sample`, or None.
        augmentation: level of their noise.
        clip: clip each estimate of x_0 to [-1, 1].
    """
    process = StepRunner(
        model, table, (len(sample_ids), *shape), sample_ids.device,
        labelled=labels is not None, enlarging=low_resolution is not None, clip=clip,
    )  # fmt: skip
    enlarged = None
    if low_resolution is not None:
        enlarged = _augmented(low_resolution, shape[-1], augmentation, seed, sample_ids)
    scale = table.state_scale.tolist()
    x = scale[0] * initial_noise(seed, sample_ids, shape)
    process.begin(x, seed, sample_ids, labels, enlarged, augmentation)
    for i, timestep in enumerate(table.timesteps.tolist()):
        process.step(i)
        x = process.x / scale[i + 1]
        yield TrajectoryStep(i, timestep, x, process.x0(i))


@torch.inference_mode()
def sample(
    model: Model,
    schedule: NoiseSchedule,
    *,
    sample_ids: Tensor | Sequence[int],
    seed: int = 0,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: Spacing = "trailing",
    timesteps: Sequence[int] | None = None,
    variance: Variance = "fixed_large",
    eta: float = 0.0,
    prediction: str = "eps",
    shape: tuple[int, int, int] | None = None,
    labels: Tensor | None = None,
    low_resolution: Tensor | None = None,
    augmentation: int = 0,
    guidance: Guidance | None = None,
    clip: bool = True,
    threshold: float | None = None,
    initial: Tensor | None = None,
    images: Tensor | None = None,
    strength: float = 0.5,
    inpainting: Inpainting | None = None,
    cache_interval: int = 1,
    batch_size: int = 64,
    capture: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw pictures (Ho et al. 2020, algorithm 2, and all the samplers that followed it).

    Picture k of seed s starts from the same noise, and meets the same noise at every step, whatever
    else is drawn with it: the result does not depend on batch size, order or device count beyond
    the rounding of the network's own arithmetic.

    Args:
        model: `model(x, timesteps[, labels])`; put it in eval mode first.
        schedule: what the model was trained on.
        sample_ids: which pictures of the seed to make, int64 `[N]` in [0, 2⁵⁶).
        seed: of all noise.
        sampler: a key of `SAMPLERS`.
        steps: how many of the schedule's timesteps to visit; None: all.
        spacing: which ones.
        timesteps: visit these instead, strictly decreasing.
        variance: of the noise that ddpm adds.
        eta: share of fresh noise in ddim, 0 to 1.
        prediction: what the model predicts.
        shape: (C, H, W); None: `model.sample_shape`.
        labels: int64 `[N]`, the class of each picture, or None.
        low_resolution: the small picture to enlarge for each, `[len(sample_ids), C, side, side]` in
            [-1, 1], if and only if the model has a `low_resolution` side.
        augmentation: steps of noise that these are given first, 0 to 1000, the same for all; some
            noise hides the flaws of small pictures that another model drew.
        guidance: how far to go beyond the conditional prediction; needs labels and a model with a
            `null_class`.
        clip: clip each estimate of x_0 to [-1, 1].
        threshold: clip instead at this quantile of the estimate's absolute values, if beyond 1, and
            divide by it (Saharia et al. 2022); such as 0.995.
        initial: the state to begin with, `[len(sample_ids), C, H, W]`, instead of the noise of the
            counter map; see `interpolated_noise`.
        images: begin with these, noised, instead of with noise alone: `[len(sample_ids), C, H, W]`
            in [-1, 1] (Meng et al., "SDEdit", 2022).
        strength: share of the steps that is then taken, the last ones; 1 leaves little of an image.
        inpainting: pixels that are known.
        cache_interval: recompute the U-Net's deep levels at every so many-th step only, and take
            their features from the step before otherwise ("DeepCache"); 1: always.
        batch_size: pictures at a time.
        capture: replay each step as a CUDA graph; None: on CUDA devices.
        on_step: called with the number of pictures advanced by each step, for progress bars.

    Returns:
        float32 `[len(sample_ids), C, H, W]` around [-1, 1], on the device of `sample_ids` if that
        is a tensor, else the model's.

    Raises:
        UserError: an unknown sampler; steps that the schedule does not have; guidance without
            labels; or other arguments that do not go together.
    """
    if not isinstance(sample_ids, Tensor):
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        device = next((p.device for p in parameters), torch.device("cpu"))
        sample_ids = torch.tensor(list(sample_ids), dtype=torch.int64, device=device)
    chain = Chain(
        model,
        schedule,
        seed=seed,
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        timesteps=timesteps,
        variance=variance,
        eta=eta,
        prediction=prediction,
        shape=shape,
        augmentation=augmentation,
        guidance=guidance,
        clip=clip,
        threshold=threshold,
        strength=None if images is None else strength,
        draws=1 if inpainting is None else inpainting.draws,
        cache_interval=cache_interval,
        capture=capture,
    )
    chain.check(sample_ids, labels, low_resolution, initial, images, inpainting)
    pictures = torch.empty(len(sample_ids), *chain.shape, device=sample_ids.device)
    for start in range(0, len(sample_ids), batch_size):
        part = slice(start, start + batch_size)
        pictures[part] = chain.draw(
            sample_ids[part],
            labels=None if labels is None else labels[part],
            low_resolution=None if low_resolution is None else low_resolution[part],
            initial=None if initial is None else initial[part],
            images=None if images is None else images[part],
            inpainting=None if inpainting is None else inpainting.part(start, start + batch_size),
            on_step=on_step,
        )
    return pictures


class Chain:
    """A sampler bound to a network: it draws one batch after another.

    What a batch shape needs (memory, on GPUs a captured step) is kept for the next batch of that
    shape. `sample` is this for pictures that fit in memory together.

    Args:
        model: as in `sample`, and so are the arguments not named here.
        schedule: what the model was trained on.
        strength: share of the steps to take from images that `draw` is given; None: it is given
            none.
        draws: how often each step is taken, for inpainting.

    Raises:
        UserError: an unknown sampler, or steps that the schedule does not have.
    """

    def __init__(
        self,
        model: Model,
        schedule: NoiseSchedule,
        *,
        seed: int = 0,
        sampler: str = "ddpm",
        steps: int | None = None,
        spacing: Spacing = "trailing",
        timesteps: Sequence[int] | None = None,
        variance: Variance = "fixed_large",
        eta: float = 0.0,
        prediction: str = "eps",
        shape: tuple[int, int, int] | None = None,
        augmentation: int = 0,
        guidance: Guidance | None = None,
        clip: bool = True,
        threshold: float | None = None,
        strength: float | None = None,
        draws: int = 1,
        cache_interval: int = 1,
        capture: bool | None = None,
    ) -> None:
        if cache_interval < 1:
            raise UserError(
                f"cache_interval is {cache_interval}; 1 recomputes everything at each step"
            )
        if threshold is not None and not 0 < threshold <= 1:
            raise UserError(f"threshold is {threshold}; it is a quantile, above 0 and at most 1")
        if not 0 <= augmentation <= MAX_LEVEL:
            raise UserError(f"augmentation is {augmentation}; it must lie in [0, {MAX_LEVEL}]")
        self.model = model
        self.schedule = schedule
        self.seed = seed
        self.shape: tuple[int, int, int] = shape or model.sample_shape  # type: ignore[attr-defined]
        self.augmentation = augmentation
        self.guidance = guidance
        self.clip = clip
        self.threshold = threshold
        self.cache_interval = cache_interval
        spec: ConditioningSpec = getattr(model, "conditioning", ConditioningSpec())
        self._null_class, self._side = spec.null_class, spec.low_resolution
        skip = 0
        if strength is not None:
            count = len(timesteps) if timesteps is not None else (steps or schedule.timesteps)
            skip = skipped_steps(count, strength)
        table = build_table(
            schedule, sampler, steps, spacing, prediction,
            variance=variance, eta=eta, timesteps=timesteps, skip=skip,
        )  # fmt: skip
        self.table, self.levels = resampled(table, levels_of(schedule, table), draws)
        self._capture = capture
        self._process: StepRunner | None = None

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return bool((self.table.rows[:, Column.NOISE] != 0).any())

    @torch.inference_mode()
    def draw(
        self,
        sample_ids: Tensor,
        *,
        labels: Tensor | None = None,
        low_resolution: Tensor | None = None,
        initial: Tensor | None = None,
        images: Tensor | None = None,
        inpainting: Inpainting | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw one batch.

        Args:
            sample_ids: int64 `[B]` on the model's device.
            labels: int64 `[B]`, or None.
            low_resolution: as in `sample`, `[B, C, side, side]`.
            initial: as in `sample`, `[B, C, H, W]`.
            images: likewise.
            inpainting: of the batch.
            on_step: called with B after each step.

        Returns:
            float32 `[B, C, H, W]` around [-1, 1]; overwritten by the next batch.

        Raises:
            UserError: arguments that do not go together.
        """
        self.check(sample_ids, labels, low_resolution, initial, images, inpainting)
        device = sample_ids.device
        process = self._process_for(len(sample_ids), device, labels is not None)
        x = initial_noise(self.seed, sample_ids, self.shape) if initial is None else initial
        x = x.to(device)
        if images is not None:
            ends = noise_levels(self.schedule, self.table.timesteps)
            a, s = (level[0].item() for level in ends)
            x = a * images.to(device) + s * x
        x = self.table.state_scale[0].item() * x
        enlarged = None
        if low_resolution is not None:
            enlarged = _augmented(
                low_resolution, self.shape[-1], self.augmentation, self.seed, sample_ids
            )
        process.begin(x, self.seed, sample_ids, labels, enlarged, self.augmentation)
        known = None
        if inpainting is not None:
            known = KnownPixels(inpainting, self.levels, self.seed, sample_ids)
        for i in range(process.steps):
            process.step(i)
            if known is not None:
                known.put_back(process.x, i)
            if on_step is not None:
                on_step(len(sample_ids))
        return process.x

    @torch.inference_mode()
    def warm_up(self, batch: int, device: torch.device, labelled: bool) -> None:
        """Take a step of each kind on meaningless data, so that compilers run now.

        Args:
            batch: B of the batches to come.
            device: the model's.
            labelled: whether they have labels.
        """
        self._process_for(batch, device, labelled).warm_up()

    def check(
        self,
        sample_ids: Tensor,
        labels: Tensor | None,
        low_resolution: Tensor | None,
        initial: Tensor | None,
        images: Tensor | None,
        inpainting: Inpainting | None,
    ) -> None:
        """Refuse arguments of `draw` that do not go together.

        Raises:
            UserError: guidance without labels, small images missing or superfluous, or a tensor of
                another shape.
        """
        if self.guidance is not None and (labels is None or self._null_class is None):
            raise UserError(
                "guidance needs labels and a class-conditional network with a null class; "
                + ("there are no labels" if labels is None else "this network has no null class")
            )
        if labels is not None and labels.shape != sample_ids.shape:
            raise UserError(f"there are {len(labels)} labels for {len(sample_ids)} pictures")
        if (low_resolution is None) != (self._side is None):
            raise UserError(
                f"this network enlarges pictures of side {self._side}; give low_resolution"
                if low_resolution is None
                else "low_resolution is given, but this network enlarges nothing; leave it out"
            )
        large = (len(sample_ids), *self.shape)
        given = [
            ("low_resolution", low_resolution, (*large[:2], self._side, self._side)),
            ("initial", initial, large),
            ("images", images, large),
            ("inpainting.known", None if inpainting is None else inpainting.known, large),
        ]
        for name, tensor, expected in given:
            if tensor is not None and tensor.shape != expected:
                raise UserError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}")

    def _process_for(self, batch: int, device: torch.device, labelled: bool) -> StepRunner:
        """The process of a batch shape: the last one, if it fits."""
        if self._process is None or len(self._process.x) != batch:
            capture = device.type == "cuda" if self._capture is None else self._capture
            self._process = StepRunner(
                self.model,
                self.table,
                (batch, *self.shape),
                device,
                labelled=labelled,
                enlarging=self._side is not None,
                null_class=self._null_class,
                guidance=self.guidance,
                alpha_bar=self.levels.before,
                clip=self.clip,
                threshold=self.threshold,
                cache_interval=self.cache_interval,
                keep_x0=False,
                capture=captured if capture else None,
            )
        return self._process


def initial_noise(seed: int, sample_ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """What picture k of a seed begins with: float32 `[B, C, H, W]`."""
    return gaussian_noise(seed, sample_ids, shape, 0, Stream.INITIAL_NOISE)


def _augmented(small: Tensor, side: int, level: int, seed: int, sample_ids: Tensor) -> Tensor:
    """What the network is shown of small pictures: `[B, C, side, side]`."""
    device = sample_ids.device
    levels = torch.full_like(sample_ids, level)
    return NoiseConditioningAugmentation(device)(
        small.to(device, torch.float32), side, levels, seed, sample_ids
    )


def interpolated_noise(
    seed: int, first: int, second: int, weights: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """States between those that two pictures begin with, for `sample(initial=…)`.

    On the great circle through both, so that each is as likely as noise is (Shoemake 1985; Song et
    al. 2020, appendix D.5). With a sampler that adds no noise, the pictures lie between the two.

    Args:
        seed: of both pictures.
        first: a sample id.
        second: another.
        weights: `[N]`: 0 is the first picture, 1 the second.
        shape: (C, H, W).

    Returns:
        float32 `[N, C, H, W]`.
    """
    a, b = initial_noise(seed, torch.tensor([first, second]), shape).double()
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    w = weights.double().cpu()[:, None, None, None]
    return ((((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin()).float()


def skipped_steps(steps: int, strength: float) -> int:
    """How many first steps are left out when an image is begun with; at least one is taken.

    Raises:
        UserError: strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must be above 0 and at most 1")
    return steps - max(1, round(strength * steps))
