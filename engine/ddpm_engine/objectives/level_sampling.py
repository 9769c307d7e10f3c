"""How often each timestep is trained.

A timestep is drawn for each sample by the inverse of a distribution function, from one Philox word
of the seed and the sample's position: with the same probabilities, always the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_kernels import Stream, random_integers
from ddpm_kernels.philox import random_words


class UniformTimesteps:
    """All alike.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Int64 `[B]` in [0, T), for positions int64 `[B]`."""
        return random_integers(seed, positions, self.timesteps, 0, Stream.TRAINING_TIMESTEP)

    def correction(self, timesteps: Tensor) -> Tensor | None:
        """What the loss at these timesteps is multiplied with, float64 `[B]`; None: nothing."""
        return None

    def learn(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take note of losses, float `[N]`, at timesteps int64 `[N]`, in the order of positions."""

    def state(self) -> Mapping[str, Tensor]:
        """What has been learnt."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take on what has been learnt."""


class WeightedTimesteps(UniformTimesteps):
    """By given probabilities: another objective, since nothing makes up for it in the loss.

    Args:
        probabilities: float64 `[T]`, non-negative, with sum one.
    """

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__(len(probabilities))
        self.probabilities = probabilities

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Int64 `[B]` in [0, T), for positions int64 `[B]`."""
        word = random_words(seed, positions, 1, 0, Stream.TRAINING_TIMESTEP)[:, 0]
        u = (word.to(torch.float64) + 0.5) * 2.0**-32
        below = self.probabilities.cumsum(0).to(positions.device)
        # The last sum may fall short of one by rounding.
        return torch.searchsorted(below, u, right=True).clamp(max=self.timesteps - 1)


def logit_normal_probabilities(timesteps: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The mass that u ~ sigmoid(N(mean, std²)) has on [t / T, (t + 1) / T): float64 `[T]`.

    More of the middle, where there is most to learn, than of both ends (Esser et al. 2024,
    equation 19, there of continuous time).

    Args:
        timesteps: T.
        mean: of logit u; negative: more of the timesteps of little noise.
        std: > 0, of logit u.
    """
    edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return torch.special.ndtr((torch.logit(edges) - mean) / std).diff()


class ImportanceTimesteps(WeightedTimesteps):
    """By how large each timestep's loss is, p_t ∝ sqrt(E[L_t²]), and the loss divided by T p_t.

    The mean stays what it is with uniform timesteps, and its variance is the least possible
    (Nichol & Dhariwal 2021, section 3.3). E[L_t²] is taken over the last `HISTORY` losses of the
    timestep; until each has as many, timesteps are uniform. As in the authors' code a small share
    stays uniform, so that none is forgotten.

    Args:
        timesteps: T.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001

    def __init__(self, timesteps: int) -> None:
        self._losses = torch.zeros(timesteps, self.HISTORY, dtype=torch.float64)
        self._counts = torch.zeros(timesteps, dtype=torch.int64)
        super().__init__(torch.full((timesteps,), 1 / timesteps, dtype=torch.float64))

    @property
    def warm(self) -> bool:
        """Whether every timestep has a full history."""
        return bool((self._counts >= self.HISTORY).all())

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Int64 `[B]` in [0, T), for positions int64 `[B]`."""
        if self.warm:
            return super().draw(seed, positions)
        return UniformTimesteps.draw(self, seed, positions)

    def correction(self, timesteps: Tensor) -> Tensor:
        """1 / (T p_t), float64 `[B]`."""
        return 1 / (self.timesteps * self.probabilities.to(timesteps.device)[timesteps])

    def learn(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take note of losses, float `[N]`, in the order of positions, before their correction.

        Timesteps are int64 `[N]`.
        """
        order = timesteps.argsort(stable=True)
        timesteps, losses = timesteps[order], losses[order].to(torch.float64)
        counts = timesteps.bincount(minlength=self.timesteps)
        rank = torch.arange(len(timesteps)) - (counts.cumsum(0) - counts)[timesteps]
        # Of more than HISTORY at once, the last: no two of them then have the same place.
        kept = rank >= counts[timesteps] - self.HISTORY
        timesteps, losses, rank = timesteps[kept], losses[kept], rank[kept]
        self._losses[timesteps, (self._counts[timesteps] + rank) % self.HISTORY] = losses
        self._counts += counts
        self._weigh()

    def _weigh(self) -> None:
        if not self.warm:
            return
        size = self._losses.square().mean(1).sqrt()
        share = self.UNIFORM_SHARE
        self.probabilities = (1 - share) * size / size.sum() + share / self.timesteps

    def state(self) -> Mapping[str, Tensor]:
        """The losses, float64 `[T, HISTORY]`, each timestep's a ring, and how many it has had."""
        return {"losses": self._losses, "counts": self._counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Objective`."""
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])
        self._weigh()
