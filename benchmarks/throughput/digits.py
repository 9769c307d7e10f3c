"""What the benchmarks of quality share: generated digits, kept on disk, against the real ones.

Distances are in the features of the small digit classifier, which compare with each other only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import CLASSES, Digits, digit_classifier, real_digits
from ddpm_engine.evaluation.feature_networks import DigitFeatures
from ddpm_engine.evaluation.metrics import Features, compute
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.work_sharing import fill_missing
from ddpm_engine.samplers.sampler import Sampler


class DigitMetrics:
    """Metrics of generated digits against the real ones.

    Args:
        network: the feature network.
        digits: the real digits, of the same size.
    """

    def __init__(self, network: DigitFeatures, digits: Digits) -> None:
        self.network, self.digits = network, digits

    @classmethod
    def of_size(cls, size: int, cache: Path | None = None) -> DigitMetrics:
        """Compare digits of `size` × `size` pixels; `cache` keeps the classifier."""
        return cls(DigitFeatures(digit_classifier(size, cache)), real_digits(size))

    @cached_property
    def real(self) -> Features:
        """Features of the real digits."""
        return self.features(self.digits.images)

    def features(
        self, images: NDArray[np.uint8], labels: Sequence[int | None] | None = None
    ) -> Features:
        """Featurise uint8 `[N, H, W, 1]`, conditioned on these classes."""
        return Features.of(self.network(images), self.network.features, labels)

    def compute(
        self,
        images: NDArray[np.uint8],
        metrics: Collection[str] = ("fid",),
        labels: Sequence[int | None] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Compute metrics of uint8 `[N, H, W, 1]`, as `evaluation.metrics.compute`."""
        return compute(self.features(images, labels), self.real, metrics)

    def distance(self, images: NDArray[np.uint8]) -> float:
        """Fréchet distance of uint8 `[N, H, W, 1]` to the real digits."""
        return float(self.compute(images)["fid"]["distance"])


def in_turn(count: int) -> list[int]:
    """Classes of samples 0 … count − 1 of a class-conditional model: 0, 1, …, 9 in turn."""
    return [k % CLASSES for k in range(count)]


def load(checkpoint: Path, device: torch.device) -> LoadedModel:
    """Load a run, compiled on a GPU; on a CPU eager code is faster."""
    model = load_model(checkpoint, device)
    if device.type != "cpu":
        model.network.compile_blocks()
    return model


def load_distilled(checkpoints: Sequence[Path], device: torch.device) -> dict[str, LoadedModel]:
    """Load distilled runs by method and number of steps, such as `progressive 4`.

    Raises:
        UserError: a checkpoint cannot be read, or was not distilled.
    """
    found = {}
    for checkpoint in checkpoints:
        student = load(checkpoint, device)
        config = student.config.distillation
        if config.teacher is None:
            raise UserError(
                f"`distilled` has {checkpoint}, which was not distilled", field="distilled"
            )
        found[f"{config.method} {student.sampling.steps}"] = student
    return found


def kept_samples(
    model: LoadedModel, folder: Path, count: int, batch_size: int = 250, **options: Any
) -> NDArray[np.uint8]:
    """Return samples 0 … count − 1 of a model, generated once and kept in `folder`.

    Args:
        model: generates them.
        folder: holds a folder for each model and set of options.
        count: number of samples.
        batch_size: samples at a time; also what is lost on interruption.
        options: as `DiffusionModel.request` takes them.

    Returns:
        uint8 `[count, H, W, C]`.
    """
    sampler = Sampler(model, model.request(**options))
    settings = {**sampler.settings(), "checkpoint": model.hash}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    store = SampleDir(folder / digest[:16], settings, "npz", sampler.label_of)
    fill_missing(
        store, range(count), lambda ids: sampler.images(ids, batch_size=len(ids)),
        batch_size=batch_size, chunk_size=batch_size, wait=True,
    )  # fmt: skip
    return store.read(range(count))
