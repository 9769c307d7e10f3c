"""Likelihoods of real images, by whatever method, computed by several processes and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.data.classes import match_classes
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.features_store import FeatureStore
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.work_sharing import WorkShare, fill_missing
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.objectives.base import Network
from ddpm_engine.runtime import without_tf32


@dataclass(frozen=True, eq=False)
class GivenImages:
    """A batch of real images, as likelihoods are computed of them."""

    images: Tensor
    """uint8 `[B, C, H, W]`."""
    ids: Tensor
    """int64 `[B]`, their indices in the whole set."""
    conditioning: Conditioning


@dataclass(frozen=True, eq=False)
class Measured:
    """What was computed of every image, and where it is kept."""

    folder: Path
    store: FeatureStore
    rows: NDArray[np.float64]
    """`[N, K]`."""
    inputs: dict[str, Any]
    real: RealImages

    def report(self, metrics: dict[str, Any]) -> Path:
        """Write the report of these metrics, JSON values; returns its path."""
        locations = {"data": str(self.real.shards.storage)}
        return write_report(self.folder, self.inputs, metrics, locations)


def measured_on_real_images(
    model: LoadedModel,
    real: RealImages,
    out: Path,
    measure: Callable[[Network, GivenImages], Tensor],
    *,
    kind: dict[str, Any],
    evaluations: int,
    seed: int,
    batch_size: int,
    share: WorkShare,
    show_progress: bool,
) -> Measured | None:
    """Compute something of every image, kept in a folder `nll-HASH` of `out`.

    Args:
        model: the network, on its device.
        real: the images, of the network's shape.
        out: folder of the evaluation, created if missing.
        measure: returns float64 `[B]` or `[B, K]` of a batch, by a network that counts progress.
        kind: JSON values: what is computed, beside the model, the seed and the images.
        evaluations: of the network for an image.
        seed: of the noise.
        batch_size: images at a time, and what a process that is killed loses.
        share: this process among those that share the work.
        show_progress: whether to print progress.

    Returns:
        What was computed; None: other processes are still working, and the last of them reports.

    Raises:
        UserError: classes that the model does not have, images that cannot be read, a full disk.
    """
    classes = _classes(model, real)
    inputs = _inputs(model, kind, real, seed, classes)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    folder = out / f"nll-{digest[:8]}"
    store = FeatureStore(folder, inputs)
    ids = range(len(real))
    device = next(model.network.parameters()).device

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = model.network(x, t, conditioning)
        progress.step(len(x))
        return output

    @without_tf32()
    def rows_of(batch: Sequence[int]) -> NDArray[np.float64]:
        images = torch.from_numpy(real.read(batch)).permute(0, 3, 1, 2)
        found = measure(
            network,
            GivenImages(
                images.to(device),
                torch.from_numpy(real.index_in_set(batch)).to(device),
                Conditioning(_labels(model, real, classes, batch, device)),
            ),
        )
        return np.asarray(found.reshape(len(batch), -1).cpu().numpy())

    with Progress(
        len(real), lambda: len(store.ids().intersection(ids)), evaluations,
        active=show_progress, unit="images",
    ) as progress:  # fmt: skip
        if not fill_missing(
            store, ids, rows_of, batch_size=batch_size, chunk_size=batch_size, share=share,
            progress=progress,
        ):  # fmt: skip
            return None
    return Measured(folder, store, store.read(ids).astype(np.float64), inputs, real)


def check_likelihood(model: LoadedModel, metric: str) -> None:
    """Check that a network has a likelihood of images.

    Raises:
        UserError: a network that was distilled, and knows a few noise levels only, or one that
            samples latents.
    """
    if model.codec.clip_range is None:
        raise UserError(
            f"`metrics` has {metric}, which is the likelihood of pixels, but this network samples "
            f"latents; leave {metric} out",
            field="metrics",
        )
    if model.config.distillation.teacher is not None:
        raise UserError(
            f"`metrics` has {metric}, which looks at all timesteps, but this network was "
            f"distilled and knows only the {model.config.sampling.steps} steps it samples with; "
            f"leave {metric} out",
            field="metrics",
        )


def mean_and_error(values: NDArray[np.float64]) -> dict[str, Any]:
    """Return the mean of `values` `[N]` in bits per dimension, its error and N: JSON values."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {
        "bits_per_dim": float(values.mean()),
        "error": None if error is None else float(error),
        "images": len(values),
    }


def _inputs(
    model: LoadedModel, kind: dict[str, Any], real: RealImages, seed: int, classes: list[int]
) -> dict[str, Any]:
    config = model.config
    # Left out where they change nothing: earlier versions knew no others.
    renumbered = {} if classes == list(range(len(classes))) else {"classes": classes}
    return {
        "model": {
            "checkpoint": model.hash,
            "checkpoint_step": model.step,
            "weights": model.weights,
            "ema_decay": config.training.ema_decay if model.weights == "ema" else None,
            "prediction": config.diffusion.prediction,
            **kind,
            "timesteps": model.schedule.timesteps,
            "clip": model.sampling.clip_x0,
        },
        "seed": seed,
        "reference": {
            "fingerprint": real.shards.manifest.fingerprint,
            "count": len(real),
            "of": real.total,
            "shape": list(real.shape),
            "rule": real.rule,
            **renumbered,
        },
    }


def _classes(model: LoadedModel, real: RealImages) -> list[int]:
    """Return the model's class for each label of the images; empty if one of them has none."""
    null, names = model.network.conditioning.null_class, real.shards.manifest.classes
    if null is None or names is None:
        return []
    return match_classes(model.classes, null, names, str(real.shards.storage))


def _labels(
    model: LoadedModel,
    real: RealImages,
    classes: list[int],
    ids: Sequence[int],
    device: torch.device,
) -> Tensor | None:
    """Return the classes of images, or the null class, for a class-conditional network."""
    null = model.network.conditioning.null_class
    if null is None:
        return None
    labels = [real.label_of(k) for k in ids]
    return torch.tensor(
        [null if label is None else classes[label] for label in labels], device=device
    )
