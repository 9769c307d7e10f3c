"""Moment matching: a student of few noisy steps whose pictures a teacher finds nothing wrong with.

Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment
Matching", 2024, algorithm 2. The student's estimate x̃ of a step from a timestep t takes a sample
on, as ancestral sampling does, to x_s ~ q(x_s ∣ x_t, x̃). There the teacher expects E[x_0 ∣ x_s] of
real images; what the student's own images are expected to be is learnt by a third network, the
critic, which begins as the teacher. Where the two disagree, x̃ is moved by their difference:

    critic:   (g_φ(x_s) − x̃)² + (g_φ(x_s) − g_θ(x_s))²,  least at the mean of both estimates
    student:  w ⟨x̃, 2 (g_φ(x_s) − g_θ(x_s))⟩,            differentiated in x̃ alone

The difference of the mean of both to the teacher's estimate is half of what the student's images
are off by, hence the 2. w = 1 / mean ∣x̃ − g_θ∣, for each image, makes all noise levels count alike
(Yin et al. 2024, "One-step Diffusion with Distribution Matching Distillation", equation 8).

Unlike the other methods, the student follows no path of its teacher's. What it has drawn wrongly is
mended later, since steps add noise; and it may become better than ddim in any number of steps. It
takes a student that draws already, by another method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.parameterization import parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.objectives.distillation.trajectory import Teacher, guided
from ddpm_engine.objectives.inputs import Conditions
from ddpm_engine.objectives.objective import Averaged, Network, Objective
from ddpm_kernels import Stream, gaussian_noise, q_sample, random_integers

if TYPE_CHECKING:
    from ddpm_engine.objectives.config import DistillationConfig

CRITIC_RATE = 4.0
"""Learning rate of the critic, in units of the student's: it has to keep up with the student."""
_LEAST_ERROR = 0.02
"""Of x̃ against the teacher's estimate, in the weight: at low noise the two are nearly one."""
_AFTER = 1
"""The sampler's step in random numbers of what comes after a jump; 0 is that of its beginning."""


class MomentMatching(Objective):
    """How far what a student draws is from what its teacher expects, in every step's surroundings.

    The loss of a sample is half the mean square of the gradient in its x̃. The critic learns with
    every optimizer step by Adam, at `CRITIC_RATE` times the rate of the student; it is whole on
    every rank.

    Args:
        schedule: the noise schedule.
        prediction: what the student predicts: `"eps"`, `"x0"` or `"v"`.
        conditions: mirrored images and dropped labels; with the seed of timesteps and noise.
        teacher: on the device, with a critic.
        plan: number of steps, and guidance of the teacher.
        rate: the student's learning rate in an optimizer step.
        betas: of Adam.
        clip_norm: the longest gradient of the critic.
        device: where the networks run.
        clip: whether samplers clip estimates of x_0 to [-1, 1].
        dtype: of the tables, and so of the arithmetic.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        conditions: Conditions,
        teacher: Teacher,
        plan: DistillationConfig,
        rate: Callable[[int], float],
        betas: tuple[float, float],
        clip_norm: float,
        device: torch.device | str = "cpu",
        *,
        clip: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert teacher.critic is not None, "moment matching needs a critic"
        self.timesteps = schedule.timesteps
        self.prediction = parameterization(prediction, schedule)
        self._taught = parameterization(teacher.prediction, schedule)
        self.conditions = conditions
        self.teacher = teacher
        self.critic = teacher.critic
        self.plan = plan
        self.rate = rate
        self.clip_norm = clip_norm
        self.device = torch.device(device)
        self.clip = clip
        self.dtype = dtype
        self._alpha_bar = schedule.alpha_bar.to(self.device)
        self._signal = schedule.sqrt_alpha_bar.to(self.device, dtype)
        self._sigma = schedule.sqrt_one_minus_alpha_bar.to(self.device, dtype)
        self._seed = torch.tensor(conditions.seed, device=self.device)
        self._weights = dict(self.critic.named_parameters())
        self._optimizer = torch.optim.Adam(self._weights.values(), betas=betas)
        for weight in self._weights.values():
            # As Adam makes it in its first step, but there from the beginning, to be saved.
            self._optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._pieces = 0

    def __call__(self, model: Network, batch: Batch) -> Tensor:
        """See `Objective`; the critic's gradients are kept until `end_step`."""
        conditions = self.conditions
        before, after = map(self._here, self.draw(batch.positions))
        images, positions = self._here(batch.images), self._here(batch.positions)
        flips = conditions.flip(batch.positions)
        labels = conditions.labels(batch.positions, batch.labels)
        told = conditions.told(images, batch.positions, labels, flips)
        flip = None if flips is None else self._here(flips)
        x = q_sample(
            images, before, self._signal, self._sigma, self._seed, positions, flip, self.dtype
        )
        output = model(x, before, told)[:, : x.shape[1]].to(self.dtype)
        drawn = self.prediction.to_x0(output, x, *self._levels(before))

        shown = self._clipped(drawn.detach())
        x = self.taken_on(x, shown, before, after, positions)
        expected = self._teachers_estimate(x, after, told)
        believed = self._teach_critic(x, shown, expected, after, told)
        error = (shown - expected).abs().mean((1, 2, 3), keepdim=True).clamp(min=_LEAST_ERROR)
        # What lies beyond the range is clipped away, and would learn nothing of it otherwise.
        beyond = drawn.detach() - shown
        gradient = 2 * (believed - expected) / error + 2 * beyond
        aim = drawn.detach() - gradient
        return (drawn - aim).square().mean((1, 2, 3)) / 2

    def draw(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps t and s of jumps, each int64 `[B]`, for positions int64 `[B]`: t > s ≥ 0.

        s is uniform below T − 1, and t above it by up to T / N, uniformly, but at most T − 1
        (algorithm 2).
        """
        seed, stream = self.conditions.seed, Stream.TRAINING_TIMESTEP
        after = random_integers(seed, positions, self.timesteps - 1, 0, stream)
        longest = max(1, self.timesteps // self.plan.steps)
        length = 1 + random_integers(seed, positions, longest, _AFTER, stream)
        return (after + length).clamp(max=self.timesteps - 1), after

    def taken_on(
        self, x: Tensor, x0: Tensor, before: Tensor, after: Tensor, positions: Tensor
    ) -> Tensor:
        """A sample of q(x_s ∣ x_t, x_0) (Ho et al. 2020, equations 6 and 7), shaped as `x`.

        Args:
            x: x_t, `[B, C, H, W]`.
            x0: shaped as `x`.
            before: t, int64 `[B]`.
            after: s < t, int64 `[B]`.
            positions: int64 `[B]`, which the noise follows from.
        """
        alpha_bar, reached = self._alpha_bar[before], self._alpha_bar[after]
        alpha = alpha_bar / reached
        of_x0 = reached.sqrt() * (1 - alpha) / (1 - alpha_bar)
        of_x = alpha.sqrt() * (1 - reached) / (1 - alpha_bar)
        deviation = ((1 - reached) / (1 - alpha_bar) * (1 - alpha)).sqrt()
        shape = (x.shape[1], x.shape[2], x.shape[3])
        noise = gaussian_noise(self._seed, positions, shape, _AFTER, Stream.TRAINING_NOISE)
        factors = torch.stack([of_x0, of_x, deviation]).to(self.dtype)[..., None, None, None]
        return factors[0] * x0 + factors[1] * x + factors[2] * noise

    def begin_step(self, step: int, averaged: Averaged) -> None:
        """See `Objective`: the learning rate follows the student's."""
        for group in self._optimizer.param_groups:
            group["lr"] = CRITIC_RATE * self.rate(step)

    def end_step(self, ranks: Ranks | None) -> None:
        """See `Objective`: the critic takes a step, by the mean gradient of all ranks."""
        if ranks is not None:
            self._average_gradients(ranks)
            # The student's may be finite where the critic's are not.
            norm = nn.utils.clip_grad_norm_(self._weights.values(), self.clip_norm)
            if norm.isfinite():
                self._optimizer.step()
        self._optimizer.zero_grad()
        self._pieces = 0

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the critic's weights, and what Adam remembers of each."""
        found = {f"critic.{name}": weight.data for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            for kind, tensor in self._optimizer.state[weight].items():
                found[f"{kind}.{name}"] = tensor
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _teach_critic(
        self,
        x: Tensor,
        drawn: Tensor,
        expected: Tensor,
        timesteps: Tensor,
        told: Conditioning,
    ) -> Tensor:
        """Add the gradient of the critic's loss to its own; returns its estimate, without one."""
        a, s = self._levels(timesteps)
        with torch.enable_grad():
            output = self.critic(x, timesteps, told)[:, : x.shape[1]].to(self.dtype)
            # Both squares are one, about the mean, and a constant.
            wanted = self._taught.from_x0((drawn + expected) / 2, x, a, s)
            (output - wanted).square().mean().backward()
        self._pieces += 1
        return self._clipped(self._taught.to_x0(output.detach(), x, a, s))

    @torch.no_grad()
    def _teachers_estimate(self, x: Tensor, timesteps: Tensor, told: Conditioning) -> Tensor:
        output = guided(
            self.teacher.network, x, timesteps, told, self.plan.guidance_scale,
            self.conditions.null_class, self.dtype,
        )  # fmt: skip
        return self._clipped(self._taught.to_x0(output, x, *self._levels(timesteps)))

    def _average_gradients(self, ranks: Ranks) -> None:
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / self._pieces
        mean = ranks.mean(flat)
        for gradient, part in zip(
            gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of image and noise, each `[B, 1, 1, 1]`."""
        return (
            self._signal[timesteps][:, None, None, None],
            self._sigma[timesteps][:, None, None, None],
        )

    def _clipped(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if self.clip else x0

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
