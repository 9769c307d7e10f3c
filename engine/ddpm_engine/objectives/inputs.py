"""What every objective does alike: mirror images, drop and build the conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_engine.data.config import Diffused, VectorSource
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.super_resolution import NoiseConditioningAugmentation, downsample
from ddpm_engine.networks.conditioning import Conditioning, ConditioningSpec
from ddpm_engine.networks.text.encoder import EncodedText
from ddpm_kernels import training_draws
from ddpm_kernels.tiling import as_scalar


@dataclass(frozen=True, eq=False)
class PreparedBatch:
    """A batch on the network's device, with all but noise and noise levels decided."""

    images: Tensor
    """`[B, C, H, W]` as stored: uint8, or float in [-1, 1]; embeddings are images of one pixel,
    float32 `[B, D, 1, 1]`; latents are their moments, float16 `[B, 2C, H, W]`."""
    positions: Tensor
    """int64 `[B]`, which everything random about the samples follows from."""
    integers: Tensor | None
    """int64 `[B]`, uniform: what noise levels are chosen by; None: none were asked for."""
    flip: Tensor | None
    """bool `[B]`: whether a sample is mirrored left to right; None: none is, or the moments are
    those of the mirrored image already."""
    conditioning: Conditioning
    """What the network is given besides the noisy images."""


class TrainingInputs:
    """Prepares batches; every random choice is a function of the seed and a sample's position.

    Args:
        seed: of training.
        spec: the conditions that the network was built for.
        device: of the network.
        horizontal_flip: whether each image is mirrored with probability one half.
        condition_dropout: probability, 0 to 1, of replacing a sample's label, text and vector by
            the null conditions.
        augmentation_levels: number of noise-conditioning augmentation levels; each low-resolution
            image gets one, drawn uniformly from 0 (no noise) on.
        vector: what the vector that a network is conditioned on comes from: see `DataConfig`.
        diffuse: what is diffused: see `DataConfig`.
        null_text: embeddings that stand for no text, of one row; None: zeros.
        latent_scale: what latents are multiplied by, whose moments batches hold; None: batches hold
            images.
        latent_shift: what is subtracted from latents before.
    """

    def __init__(
        self,
        seed: int,
        spec: ConditioningSpec | None = None,
        device: torch.device | str = "cpu",
        horizontal_flip: bool = False,
        condition_dropout: float = 0.0,
        augmentation_levels: int = 1,
        vector: VectorSource = "text",
        diffuse: Diffused = "images",
        null_text: EncodedText | None = None,
        latent_scale: float | None = None,
        latent_shift: float = 0.0,
    ) -> None:
        self.spec = spec or ConditioningSpec()
        self.device = torch.device(device)
        self.seed = as_scalar(seed, self.device)
        self.latent_scale = latent_scale
        self.latent_shift = latent_shift
        self.horizontal_flip = horizontal_flip
        self.condition_dropout = condition_dropout
        self.augmentation_levels = augmentation_levels
        self.vector = vector
        self.diffuse = diffuse
        self.null_text = None
        if null_text is not None:
            self.null_text = EncodedText(*(tensor.to(self.device) for tensor in null_text))
        # All that is needed of the host is made here, not in a step.
        self._augmentation = None
        if self.spec.low_resolution is not None:
            self._augmentation = NoiseConditioningAugmentation(self.device)

    def prepare(self, batch: Batch, integers: int | None = None) -> PreparedBatch:
        """Move a batch to the device and decide, there, what is random about its samples.

        Args:
            batch: on the device, or to be copied there.
            integers: number of equally likely integers that noise levels are chosen by, up to 2³²;
                None: none are drawn.

        Raises:
            ValueError: the network is conditioned on something that the batch does not have.
        """
        batch = self._diffused(batch.to(self.device, non_blocking=True))
        beside = self.spec.text is not None or self.spec.vector is not None
        draws = training_draws(
            self.seed,
            batch.positions,
            integers=integers,
            flip=self.horizontal_flip,
            labels=self._labels(batch),
            label_dropout=self.condition_dropout,
            null_class=self.spec.null_class or 0,
            augmentation_levels=None if self._augmentation is None else self.augmentation_levels,
            dropout_key=True,
            dropped=beside and self.condition_dropout > 0,
        )
        low_resolution, level = None, draws.augmentation_levels
        if self._augmentation is not None and level is not None:
            assert self.spec.low_resolution is not None
            low_resolution = self._augmentation(
                downsample(batch.images, self.spec.low_resolution), _size(batch.images), level,
                self.seed, batch.positions, draws.flip,
            )  # fmt: skip
        conditioning = replace(
            described(batch, self.spec, self.vector),
            labels=draws.labels,
            low_resolution=low_resolution,
            augmentation_level=level,
            dropout_key=draws.dropout_key,
        )
        if draws.dropped is not None:
            conditioning = self._dropped(conditioning, draws.dropped)
        images, flip = batch.images, draws.flip
        if self.latent_scale is not None and flip is not None:
            images, flip = _mirrored_or_not(images, flip), None
        return PreparedBatch(images, batch.positions, draws.integers, flip, conditioning)

    def _dropped(self, conditioning: Conditioning, rows: Tensor) -> Conditioning:
        """Replace the conditions of some samples, bool `[B]`, by null ones."""
        given, null = conditioning.drop(rows, self.spec), self.null_text
        if null is None or given.text is None or given.text_mask is None:
            return given
        length = given.text.shape[1]
        return replace(
            given,
            text=torch.where(rows[:, None, None], null.tokens[:, :length], given.text),
            text_mask=torch.where(rows[:, None], null.mask[:, :length], given.text_mask),
        )

    def _diffused(self, batch: Batch) -> Batch:
        """Put what is diffused in the place of the images."""
        if self.diffuse == "images":
            return batch
        if batch.embeddings is None:
            raise ValueError("embeddings are diffused, and this batch has none")
        return replace(batch, images=batch.embeddings[:, :, None, None])

    def _labels(self, batch: Batch) -> Tensor | None:
        """Return int64 `[B]`; None: the network is unconditional."""
        if self.spec.null_class is None:
            return None
        if batch.labels is None:
            raise ValueError("a class-conditional network needs labels, and this batch has none")
        return batch.labels


def described(batch: Batch, spec: ConditioningSpec, vector: VectorSource = "text") -> Conditioning:
    """Return the text and the vector of a batch, of which none is dropped, float32.

    Args:
        batch: with embeddings of its captions, unless the network takes none.
        spec: of the network.
        vector: what its vector comes from: see `DataConfig`.

    Raises:
        ValueError: the network is conditioned on one that the batch does not have.
    """
    text = mask = pooled = None
    if spec.text is not None:
        if batch.text is None or batch.text_mask is None:
            raise ValueError(
                "a network conditioned on text needs embeddings of captions, and this batch has "
                "none"
            )
        text, mask = batch.text.float(), batch.text_mask
    if spec.vector is not None:
        given = batch.pooled_text if vector == "text" else batch.embeddings
        if given is None:
            of = "captions" if vector == "text" else "images"
            raise ValueError(
                f"a network conditioned on a vector needs embeddings of {of}, and this batch has "
                "none"
            )
        pooled = given.float()
    return Conditioning(text=text, text_mask=mask, vector=pooled)


def _mirrored_or_not(moments: Tensor, flip: Tensor) -> Tensor:
    """Choose the moments of images or of mirrored ones: the mirrored latents would be others.

    Args:
        moments: `[B, 2, 2C, h, w]`, the second those of the mirrored image.
        flip: bool `[B]`.

    Returns:
        `[B, 2C, h, w]`.
    """
    return torch.where(flip[:, None, None, None], moments[:, 1], moments[:, 0])


def _size(images: Tensor) -> tuple[int, int]:
    """Return `(H, W)` of images `[B, C, H, W]`."""
    return images.shape[2], images.shape[3]
