"""Models in a chain: each samples from what the one before has sampled.

A stage is a source of images, or of image embeddings, by sample id, so that the sampler of the next
one takes it as it takes images in files. Sample k of a chain follows from the seed, k and what the
request gives to sample k, in every batch.

Source: Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2022; Ramesh et
al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022, section 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_engine.images.data_codec import PixelCodec
from ddpm_engine.images.transfer import Pending
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.identity import Ids, numbers_of
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.request import SampleRequest
from ddpm_engine.samplers.sampler import Sampler

_WORD = (1 << 64) - 1
OnStep = Callable[[int], object]


def stage_seed(seed: int, stage: int) -> int:
    """Return the seed of a stage's noise: its noise is independent of that of all other stages.

    The first stage's seed is that of the chain, so that the base model's samples are those that it
    generates alone. The others are SplitMix64's outputs (Steele, Lea & Flood 2014).

    Args:
        seed: of the chain.
        stage: from 0.
    """
    if stage == 0:
        return seed
    z = (seed + stage * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


class Stage:
    """A stage before the last: an `ImageSource` of samples that are generated when asked for.

    Args:
        sampler: of the stage.
        identity: what tells its model from others, as JSON values.
        embeddings: whether it samples image embeddings, `[D, 1, 1]`, and not images.
        classes: of its samples, as the next model numbers them; None: unknown.
    """

    def __init__(
        self,
        sampler: Sampler,
        identity: dict[str, Any],
        embeddings: bool = False,
        classes: tuple[int, ...] | None = None,
    ) -> None:
        self.sampler, self.identity, self.embeddings = sampler, identity, embeddings
        self.classes = classes
        self.on_step: OnStep | None = None
        """Called with the number of samples that each step has advanced."""
        self.warming_up = False
        """Whether samples may be meaningless, because only the time they take counts."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the samples, as JSON values."""
        return {**self.sampler.settings(), **self.identity}

    @property
    def sha256(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def of(self, ids: Sequence[int]) -> Tensor:
        """Return the samples of these ids.

        Images are rounded to 8 bits, as they are where one command writes them and another reads
        them.

        Returns:
            float32 `[N, C, H, W]` in [-1, 1]; or embeddings, `[N, D, 1, 1]`.

        Raises:
            UserError: as `Sampler.sample`.
        """
        model = self.sampler.model
        if self.warming_up:
            self.sampler.warm_up(ids)
            x = torch.zeros(len(ids), *model.shape, device=model.device)
        else:
            x = self.sampler.sample(ids, batch_size=max(len(ids), 1), on_step=self._advance)
        if self.embeddings:
            return x
        return PixelCodec().encode(model.codec.levels(x).permute(0, 3, 1, 2))

    def _advance(self, samples: int) -> None:
        if self.on_step is not None:
            self.on_step(samples)


class ChainSampler(Sampler):
    """The sampler of a chain's last stage, which accounts for all stages.

    Args:
        model: of the last stage.
        request: of the last stage, with the stage before it as a source.
        stages: all before the last.
        seed: of the chain.

    Raises:
        UserError: as `Sampler`.
    """

    def __init__(
        self, model: DiffusionModel, request: SampleRequest, stages: Sequence[Stage], seed: int
    ) -> None:
        super().__init__(model, request)
        self.stages, self.seed = tuple(stages), seed

    @property
    def evaluations(self) -> int:
        """Network evaluations per sample, of all stages."""
        return super().evaluations + sum(stage.sampler.evaluations for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """See `Sampler`; the other stages have entries of their own."""
        stages = [stage.settings for stage in self.stages]
        own = super().settings()
        shared = {
            name: next((of[name] for of in [own, *stages] if of.get(name) is not None), None)
            for name in ("prompts", "negative_prompt")
        }
        given = {name: value for name, value in shared.items() if value is not None}
        return {**own, **given, "seed": self.seed, "stages": stages}

    def sample(
        self,
        ids: Ids,
        *,
        conditioning: Conditioning | None = None,
        batch_size: int = 64,
        on_step: Callable[[int], None] | None = None,
        only_finite: bool = True,
    ) -> Tensor:
        """Sample; arguments and result `[N, C, H, W]` as in `Sampler`."""
        with self._reporting(on_step):
            return super().sample(
                ids, conditioning=conditioning, batch_size=batch_size, on_step=on_step,
                only_finite=only_finite,
            )  # fmt: skip

    def start_images(
        self, ids: Ids, *, on_step: Callable[[int], None] | None = None
    ) -> np.ndarray | Pending:
        """Sample one batch; arguments and result `[B, H, W, C]` as in `Sampler`."""
        with self._reporting(on_step):
            return super().start_images(ids, on_step=on_step)

    def check_fits(self, count: int, batch_size: int) -> None:
        """See `Sampler`.

        Raises:
            UserError: a stage needs more memory than there is.
        """
        super().check_fits(count, batch_size)
        for stage in self.stages:
            stage.sampler.check_fits(min(count, batch_size), batch_size)

    def check_inputs(self, sample_id: int) -> None:
        """See `Sampler`; only the first stage is made from anything but samples.

        Raises:
            UserError: as `Sampler`.
        """
        self.stages[0].sampler.check_inputs(sample_id)

    def compile(self) -> None:
        """Compile the networks of all stages."""
        for stage in self.stages:
            stage.sampler.compile()
        super().compile()

    def warm_up(self, ids: Sequence[int]) -> None:
        """Take steps of each kind in each stage; `ids` `[B]` as in `Sampler`.

        Raises:
            torch.OutOfMemoryError: as `Sampler`.
        """
        for stage in self.stages:
            stage.warming_up = True
        try:
            super().warm_up(numbers_of(ids))
        finally:
            for stage in self.stages:
                stage.warming_up = False

    @contextmanager
    def _reporting(self, on_step: OnStep | None) -> Iterator[None]:
        for stage in self.stages:
            stage.on_step = on_step
        try:
            yield
        finally:
            for stage in self.stages:
                stage.on_step = None
