"""Moment matching: distillation to few noisy steps whose samples have the teacher's expectations.

Salimans, Mensink, Heek & Hoogeboom, "Multistep Distillation of Diffusion Models via Moment
Matching", 2024, algorithm 2. The student's estimate x̃ at a timestep t takes a sample to an earlier
timestep s, as ancestral sampling does: x_s ~ q(x_s ∣ x_t, x̃). There the teacher g_θ expects
E[x_0 ∣ x_s] of real images. What is expected of the student's own samples is learnt by a third
network, the critic g_φ, which begins as a copy of the teacher. Where the two disagree, x̃ is moved
by their difference:

    critic:   (g_φ(x_s) − x̃)² + (g_φ(x_s) − g_θ(x_s))²,  least at the mean of both estimates
    student:  w ⟨x̃, 2 (g_φ(x_s) − g_θ(x_s))⟩,            differentiated in x̃ alone

The critic's optimum lies half-way between the student's samples and the teacher's estimate, hence
the 2. w = 1 / mean ∣x̃ − g_θ∣, for each image, makes all noise levels count alike (Yin et al. 2024,
"One-step Diffusion with Distribution Matching Distillation", equation 8).

Unlike the other methods, this one follows no trajectory of the teacher. Since steps add noise,
later ones correct the errors of earlier ones, and the student may surpass ddim in any number of
steps. It starts from a student that another method has distilled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.parameterization import Parameterization, parameterization
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.distributed import Ranks
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.objectives.base import Averaged, Network, Objective
from ddpm_engine.objectives.config import DistillationConfig
from ddpm_engine.objectives.distillation.teacher import Teacher, predict
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_kernels import Stream, gaussian_noise, q_sample, training_draws

CRITIC_RATE = 4.0
"""Learning rate of the critic, in units of the student's: it has to keep up with the student."""
_LEAST_ERROR = 0.02
"""Floor of mean ∣x̃ − g_θ∣ in the weight: at low noise the two are nearly equal."""
_SECOND_DRAW = 1
"""Counter step of the second set of random numbers per sample; the first uses step 0."""


class MomentMatching(Objective):
    """The distance of a student's samples from what its teacher expects, around every step.

    The loss of a sample is half the mean square of the gradient in its x̃. The critic is trained in
    every optimizer step by Adam, at `CRITIC_RATE` times the student's rate; it is whole on every
    rank.

    Args:
        schedule: the noise schedule.
        prediction: what the student predicts.
        inputs: mirrored images, conditions, and the seed of timesteps and noise.
        teacher: on the device of the inputs, with a critic.
        config: number of steps, and guidance of the teacher.
        rate: the student's learning rate in an optimizer step.
        betas: of Adam.
        clip_norm: largest norm of the critic's gradient.
        clip: whether estimates of x_0 are clipped to [-1, 1], as the sampler does.
        dtype: of the tables, and so of the arithmetic.
    """

    learns_on_host = True

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction: str,
        inputs: TrainingInputs,
        teacher: Teacher,
        config: DistillationConfig,
        rate: Callable[[int], float],
        betas: tuple[float, float],
        clip_norm: float,
        *,
        clip: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert teacher.critic is not None, "moment matching needs a critic"
        self.timesteps = schedule.timesteps
        self.student_row = parameterization(prediction, schedule)
        self.teacher_row = parameterization(teacher.prediction, schedule)
        self.inputs = inputs
        self.teacher = teacher
        self.critic = teacher.critic
        self.config = config
        self.rate = rate
        self.clip_norm = clip_norm
        self.clip = clip
        self.dtype = dtype
        a, s = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
        level = self.student_row.noise_level(a, s, torch.arange(schedule.timesteps))
        self._alpha_bar = schedule.alpha_bar.to(inputs.device)
        self._signal, self._noise, self._scale = (
            table.to(inputs.device, dtype) for table in (a, s, self.student_row.state_scale(a, s))
        )
        self._noise_input = level.to(
            inputs.device, dtype if level.is_floating_point() else level.dtype
        )
        self._weights = dict(self.critic.named_parameters())
        fused = inputs.device.type == "cuda"
        self._optimizer = torch.optim.Adam(self._weights.values(), betas=betas, fused=fused)
        for weight in self._weights.values():
            # What Adam creates in its first step, created here so that it can be saved and loaded.
            self._optimizer.state[weight] = {
                "step": torch.zeros((), device=inputs.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }
        self._micro_batches = 0

    def __call__(self, network: Network, batch: Batch) -> Tensor:
        """See `Objective`; the critic's gradients accumulate until `end_step`."""
        inputs = self.inputs.prepare(batch)
        t, s = self.sample_timesteps(inputs.positions)
        x_t = q_sample(
            inputs.images, t, self._signal, self._noise, self.inputs.seed, inputs.positions,
            inputs.flip, self.dtype, latent_scale=self.inputs.latent_scale,
            latent_shift=self.inputs.latent_shift,
        )  # fmt: skip
        z = self._input(x_t, t)
        output = network(z, self._noise_input[t], inputs.conditioning)
        student_x0 = self._x0(self.student_row, output, z, t)
        student_x0_clipped = self._clipped(student_x0.detach())

        x_s = self.sample_posterior(x_t, student_x0_clipped, t, s, inputs.positions)
        z = self._input(x_s, s)
        teacher_x0 = self._teacher_x0(z, s, inputs.conditioning)
        critic_x0 = self._train_critic(z, student_x0_clipped, teacher_x0, s, inputs.conditioning)
        error = (student_x0_clipped - teacher_x0).abs().mean((1, 2, 3), keepdim=True)
        # What lies beyond [-1, 1] is clipped away and would have no gradient otherwise.
        beyond = student_x0.detach() - student_x0_clipped
        gradient = 2 * (critic_x0 - teacher_x0) / error.clamp(min=_LEAST_ERROR) + 2 * beyond
        target = student_x0.detach() - gradient
        return (student_x0 - target).square().mean((1, 2, 3)) / 2

    def sample_timesteps(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Choose timesteps t > s ≥ 0, each int64 `[B]`, for positions int64 `[B]`.

        s is uniform below T − 1, and t lies above it by up to T / N, uniformly, but is at most
        T − 1 (algorithm 2).
        """
        longest = max(1, self.timesteps // self.config.steps)
        s, beyond = (
            training_draws(self.inputs.seed, positions, integers=count, step=step).integers
            for step, count in ((0, self.timesteps - 1), (_SECOND_DRAW, longest))
        )
        assert s is not None
        assert beyond is not None
        return (s + 1 + beyond).clamp(max=self.timesteps - 1), s

    def sample_posterior(
        self, x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, positions: Tensor
    ) -> Tensor:
        """Sample x_s from q(x_s ∣ x_t, x_0), shaped as `x_t` (Ho et al. 2020, equations 6 and 7).

        Args:
            x_t: `[B, C, H, W]`.
            x0: the clean images, shaped as `x_t`.
            t: int64 `[B]`.
            s: int64 `[B]`, s < t.
            positions: int64 `[B]`, which the noise follows from.
        """
        alpha_bar_t, alpha_bar_s = self._alpha_bar[t], self._alpha_bar[s]
        alpha = alpha_bar_t / alpha_bar_s
        of_x0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        of_x = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        deviation = ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)).sqrt()
        shape = (x_t.shape[1], x_t.shape[2], x_t.shape[3])
        noise = gaussian_noise(
            self.inputs.seed, positions, shape, _SECOND_DRAW, Stream.TRAINING_NOISE
        )
        factors = torch.stack([of_x0, of_x, deviation]).to(self.dtype)[..., None, None, None]
        return factors[0] * x0 + factors[1] * x_t + factors[2] * noise

    def begin_step(self, step: int, averaged: Averaged) -> bool:
        """See `Objective`: the critic's learning rate follows the student's."""
        for group in self._optimizer.param_groups:
            group["lr"] = CRITIC_RATE * self.rate(step)
        return False

    def end_step(self, ranks: Ranks | None) -> None:
        """See `Objective`: the critic takes a step, by the mean gradient of all ranks."""
        if ranks is not None:
            gradients = [w.grad for w in self._weights.values() if w.grad is not None]
            if self._micro_batches > 1:
                torch._foreach_div_(gradients, self._micro_batches)
            ranks.average_(gradients)
            # The student's gradient may be finite where the critic's is not.
            norm = nn.utils.clip_grad_norm_(self._weights.values(), self.clip_norm)
            if norm.isfinite():
                self._optimizer.step()
        self._optimizer.zero_grad()
        self._micro_batches = 0

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective`: the critic's weights, and Adam's state of each."""
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

    def _train_critic(
        self, z: Tensor, student_x0: Tensor, teacher_x0: Tensor, t: Tensor, given: Conditioning
    ) -> Tensor:
        """Add to the critic's gradient; returns its estimate of x_0, without one."""
        with torch.enable_grad():
            output = self.critic(z, self._noise_input[t], given)[:, : z.shape[1]].to(self.dtype)
            # Both squares are one square about the mean, plus a constant.
            target = self.teacher_row.from_x0((student_x0 + teacher_x0) / 2, z, *self._levels(t))
            (output - target).square().mean().backward()
        self._micro_batches += 1
        return self._clipped(self._x0(self.teacher_row, output.detach(), z, t))

    @torch.no_grad()
    def _teacher_x0(self, z: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output = predict(
            self.teacher.network, z, self._noise_input[t], conditioning, self.inputs.spec,
            self.config.guidance_scale, self.dtype,
        )  # fmt: skip
        return self._clipped(self._x0(self.teacher_row, output, z, t))

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of image and noise, each `[B, 1, 1, 1]`."""
        return self._signal[t][:, None, None, None], self._noise[t][:, None, None, None]

    def _input(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what networks see of x_t; that of the student and of its teacher is the same."""
        return self._scale[t][:, None, None, None] * x

    def _x0(self, row: Parameterization, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return row.to_x0(output[:, : z.shape[1]].to(self.dtype), z, *self._levels(t))

    def _clipped(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1) if self.clip else x0
