"""How often each noise level is trained.

A level is drawn for each sample from Philox words of the seed and the sample's position, by the
inverse of a distribution function: with the same probabilities it is always the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ddpm_kernels import Stream, gaussian_noise, training_draws
from ddpm_kernels.draws import WORDS


class LevelSampler(ABC):
    """Chooses the noise level that each sample is trained at."""

    continuous: ClassVar[bool] = False
    """Whether levels are noise levels σ of a continuum; False: timesteps of the schedule."""
    learns: ClassVar[bool] = False
    """Whether `update` changes what is chosen."""

    @property
    def integers(self) -> int | None:
        """Number of equally likely integers that levels are chosen by; None: by other numbers."""
        return None

    @abstractmethod
    def sample(
        self, seed: int | Tensor, positions: Tensor, integers: Tensor | None = None
    ) -> Tensor:
        """Choose levels, on the device of the positions, by what has been learnt so far.

        Args:
            seed: of training, an integer or a 0-dim int64 tensor.
            positions: int64 `[B]`.
            integers: int64 `[B]`, those of `training_draws` where they have been drawn already.

        Returns:
            Timesteps, int64 `[B]` in [0, T); or σ, float64 `[B]`, of x_0 + σ ε.
        """

    def correction(self, levels: Tensor) -> Tensor | None:
        """Return the factors of the losses at these levels, float64 `[B]`; None: ones."""
        return None

    def update(self, levels: Tensor, losses: Tensor) -> None:
        """Learn from losses, float `[N]`, at levels `[N]`, on the host, by order of positions."""
        return

    def state(self) -> Mapping[str, Tensor]:
        """Return what has been learnt."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what has been learnt."""
        return


class UniformTimesteps(LevelSampler):
    """Every timestep equally often.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    @property
    def integers(self) -> int:
        """See `LevelSampler`: the timesteps."""
        return self.timesteps

    def sample(
        self, seed: int | Tensor, positions: Tensor, integers: Tensor | None = None
    ) -> Tensor:
        """See `LevelSampler`."""
        if integers is None:
            integers = training_draws(seed, positions, integers=self.integers).integers
            assert integers is not None
        return self.levels_of(integers)

    def levels_of(self, integers: Tensor) -> Tensor:
        """Return the timesteps, int64 `[B]`, that integers stand for."""
        return integers


class WeightedTimesteps(UniformTimesteps):
    """Timesteps by given probabilities; nothing makes up for them in the loss.

    Args:
        probabilities: float64 `[T]` on the CPU, non-negative, with sum one.
        device: where levels are chosen.
    """

    def __init__(self, probabilities: Tensor, device: torch.device | str = "cpu") -> None:
        super().__init__(len(probabilities))
        self.probabilities = probabilities
        self._below = probabilities.cumsum(0).to(device)

    @property
    def integers(self) -> int:
        """See `LevelSampler`: 2³², for numbers in (0, 1)."""
        return WORDS

    def levels_of(self, integers: Tensor) -> Tensor:
        """See `UniformTimesteps`."""
        u = (integers.to(torch.float64) + 0.5) * 2.0**-32
        # The last sum may fall short of one by rounding.
        return torch.searchsorted(self._below, u, right=True).clamp(max=self.timesteps - 1)


def logit_normal_probabilities(timesteps: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return the mass of u ~ sigmoid(N(mean, std²)) on [t / T, (t + 1) / T): float64 `[T]`.

    The middle, where there is most to learn, is trained more often than both ends (Esser et al.
    2024, equation 19, there of continuous time).

    Args:
        timesteps: T.
        mean: of logit u; negative: more of the timesteps of little noise.
        std: > 0, of logit u.
    """
    edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return torch.special.ndtr((torch.logit(edges) - mean) / std).diff()


class ImportanceTimesteps(WeightedTimesteps):
    """Timesteps by the size of their losses, p_t ∝ sqrt(E[L_t²]), with the loss divided by T p_t.

    The mean stays that of uniform timesteps, with the least possible variance (Nichol & Dhariwal
    2021, section 3.3). E[L_t²] is taken over the last `HISTORY` losses of each timestep; until all
    have that many, timesteps are uniform. As in the authors' code a small fraction stays uniform,
    so that no timestep is forgotten.

    Args:
        timesteps: T.
        device: where levels are chosen; what is learnt is kept on the host.
    """

    learns = True
    HISTORY = 10
    UNIFORM_FRACTION = 0.001

    def __init__(self, timesteps: int, device: torch.device | str = "cpu") -> None:
        self._losses = torch.zeros(timesteps, self.HISTORY, dtype=torch.float64)
        self._counts = torch.zeros(timesteps, dtype=torch.int64)
        super().__init__(torch.full((timesteps,), 1 / timesteps, dtype=torch.float64), device)
        self._on_device = self.probabilities.to(device)

    @property
    def warm(self) -> bool:
        """Whether every timestep has a full history."""
        return bool((self._counts >= self.HISTORY).all())

    @property
    def integers(self) -> int:
        """See `LevelSampler`."""
        return WORDS if self.warm else self.timesteps

    def levels_of(self, integers: Tensor) -> Tensor:
        """See `UniformTimesteps`."""
        return super().levels_of(integers) if self.warm else integers

    def correction(self, levels: Tensor) -> Tensor:
        """See `LevelSampler`: 1 / (T p_t)."""
        return 1 / (self.timesteps * self._on_device[levels])

    def update(self, levels: Tensor, losses: Tensor) -> None:
        """See `LevelSampler`; the losses are those before their correction."""
        order = levels.argsort(stable=True)
        levels, losses = levels[order], losses[order].to(torch.float64)
        counts = levels.bincount(minlength=self.timesteps)
        rank = torch.arange(len(levels)) - (counts.cumsum(0) - counts)[levels]
        # Of more than HISTORY at once, the last: no two of them then have the same place.
        kept = rank >= counts[levels] - self.HISTORY
        levels, losses, rank = levels[kept], losses[kept], rank[kept]
        self._losses[levels, (self._counts[levels] + rank) % self.HISTORY] = losses
        self._counts += counts
        self._set_probabilities()

    def _set_probabilities(self) -> None:
        if not self.warm:
            return
        size = self._losses.square().mean(1).sqrt()
        uniform = self.UNIFORM_FRACTION
        self.probabilities = (1 - uniform) * size / size.sum() + uniform / self.timesteps
        self._below.copy_(self.probabilities.cumsum(0))
        self._on_device.copy_(self.probabilities)

    def state(self) -> Mapping[str, Tensor]:
        """Return the losses, float64 `[T, HISTORY]`, a ring for each timestep, and their counts."""
        return {"losses": self._losses, "counts": self._counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `LevelSampler`."""
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])
        self._set_probabilities()


class UniformShare(LevelSampler):
    """Noise levels of a continuum, where the share of noise τ = σ / (1 + σ) is uniform in (0, 1).

    Lipman et al. 2023; with the shift of Esser et al. 2024, equation 23, that of a uniform one.

    Args:
        shift: α > 0, by which σ is multiplied.
    """

    continuous = True

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    @property
    def integers(self) -> int:
        """See `LevelSampler`: 2³², for numbers in (0, 1)."""
        return WORDS

    def sample(
        self, seed: int | Tensor, positions: Tensor, integers: Tensor | None = None
    ) -> Tensor:
        """See `LevelSampler`."""
        if integers is None:
            integers = training_draws(seed, positions, integers=self.integers).integers
            assert integers is not None
        share = (integers.to(torch.float64) + 0.5) * 2.0**-32
        return self.shift * share / (1 - share)


class LogNormalSigma(LevelSampler):
    """Noise levels of a continuum, ln σ ~ N(mean, std²) (Karras et al. 2022, table 1).

    Since ln σ = logit τ, these are also the levels of flow matching at which the share of noise is
    logit-normal (Esser et al. 2024, equation 19); its shift α adds ln α to the mean.

    Args:
        mean: of ln σ, P_mean of the paper.
        std: of ln σ, positive, P_std of the paper.
    """

    continuous = True

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        self.mean = mean
        self.std = std

    def sample(
        self, seed: int | Tensor, positions: Tensor, integers: Tensor | None = None
    ) -> Tensor:
        """See `LevelSampler`."""
        normal = gaussian_noise(seed, positions, (1, 1, 1), 0, Stream.TRAINING_SIGMA)
        return (self.mean + self.std * normal.flatten().double()).exp()
