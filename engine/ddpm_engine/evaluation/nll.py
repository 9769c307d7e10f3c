"""The variational bound of real images, computed by several processes, and its terms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.data.classes import match_classes
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.features_store import FeatureStore
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.evaluation.sources import RULE, RealImages
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.work_sharing import WorkShare, fill_missing
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.runtime import without_tf32


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of all images."""

    report: Path
    """The report; its folder also holds the terms over t, `terms.csv`."""
    terms: NDArray[np.float64]
    """`[N, T + 1]` in bits per dimension, as `bits_per_dim` returns them."""


def bound_of_real_images(
    model: LoadedModel,
    real: RealImages,
    out: Path,
    *,
    variance: Variance | None = None,
    seed: int = 0,
    batch_size: int = 64,
    share: WorkShare = WorkShare(),  # noqa: B008
    show_progress: bool = False,
) -> Bound | None:
    """Compute the bound in bits per dimension: T network evaluations per image.

    Every term of every image is kept in the folder `nll-HASH` of `out`, beside the report.

    Args:
        model: the network, on its device.
        real: the images, of the network's shape.
        out: folder of the evaluation, created if missing.
        variance: of the reverse steps; None: the run's sampling variance.
        seed: of the noise.
        batch_size: images at a time, and what a process that is killed loses.
        share: this process among those that share the work.
        show_progress: whether to print progress.

    Returns:
        The bound; None: other processes are still working, and the last of them reports.

    Raises:
        UserError: a learned variance of a network that has none, a parameterization that
            `bits_per_dim` does not take, a distilled network, classes that it does not have,
            images that cannot be read, or a full disk.
    """
    variance = variance or model.config.sampling.variance
    check_bound(model, variance)
    classes = _classes(model, real)
    inputs = _inputs(model, variance, real, seed, classes)
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
    def terms(batch: Sequence[int]) -> NDArray[np.float64]:
        images = torch.from_numpy(real.read(batch)).permute(0, 3, 1, 2)
        found = bits_per_dim(
            network,
            model.schedule,
            images.to(device),
            torch.from_numpy(real.index_in_set(batch)).to(device),
            seed=seed,
            prediction=model.config.diffusion.prediction,
            variance=variance,
            conditioning=Conditioning(_labels(model, real, classes, batch, device)),
            clip=bool(model.sampling.clip_x0),
        )
        return np.asarray(found.cpu().numpy())

    with Progress(
        len(real), lambda: len(store.ids().intersection(ids)), model.schedule.timesteps,
        active=show_progress, unit="images",
    ) as progress:  # fmt: skip
        if not fill_missing(
            store, ids, terms, batch_size=batch_size, chunk_size=batch_size, share=share,
            progress=progress,
        ):  # fmt: skip
            return None
    rows = store.read(ids).astype(np.float64)
    with store.writing(), atomic_write(folder / "terms.csv") as file:
        file.write(_table(rows).encode())
    locations = {"data": str(real.shards.storage)}
    return Bound(write_report(folder, inputs, {"nll": summary(rows)}, locations), rows)


def check_bound(model: LoadedModel, variance: Variance | None = None) -> None:
    """Check that a model's bound can be computed; arguments as in `bound_of_real_images`.

    Raises:
        UserError: a learned variance of a network that has none, or a distilled network.
    """
    variance = variance or model.config.sampling.variance
    shape = model.config.model
    if variance == "learned_range" and shape.out_channels < 2 * shape.in_channels:
        raise UserError(
            f"`variance` is learned_range, but the network has {shape.out_channels} outputs, none "
            "of them for it; choose fixed_small or fixed_large",
            field="variance",
        )
    if model.config.distillation.teacher is not None:
        raise UserError(
            "`metrics` has nll, which is a bound over all timesteps, but this network was "
            f"distilled and knows only the {model.config.sampling.steps} steps it samples with; "
            "leave nll out",
            field="metrics",
        )


def summary(terms: NDArray[np.float64]) -> dict[str, Any]:
    """Return the parts of the bound in bits per dimension: JSON values.

    Args:
        terms: `[N, T + 1]`, as `bits_per_dim` returns them.
    """
    totals, mean = terms.sum(1), terms.mean(0)
    error = totals.std(ddof=1) / len(totals) ** 0.5 if len(totals) > 1 else None
    return {
        "bits_per_dim": float(totals.mean()),
        "error": None if error is None else float(error),
        "decoder": float(mean[0]),
        "denoising": float(mean[1:-1].sum()),
        "prior": float(mean[-1]),
        "images": len(totals),
    }


def _inputs(
    model: LoadedModel, variance: Variance, real: RealImages, seed: int, classes: list[int]
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
            "variance": variance,
            "timesteps": model.schedule.timesteps,
            "clip": model.sampling.clip_x0,
        },
        "seed": seed,
        "reference": {
            "fingerprint": real.shards.manifest.fingerprint,
            "count": len(real),
            "of": real.total,
            "shape": list(real.shape),
            "rule": RULE,
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


def _table(terms: NDArray[np.float64]) -> str:
    """Return mean and standard error of each term over images, as CSV."""
    mean = terms.mean(0)
    error = terms.std(0, ddof=1) / len(terms) ** 0.5 if len(terms) > 1 else np.zeros_like(mean)
    last = len(mean) - 1
    names = ["decoder", *(["denoising"] * (last - 1)), "prior"]
    lines = [
        f"{name},{t},{value:.9g},{spread:.3g}"
        for t, (name, value, spread) in enumerate(zip(names, mean, error, strict=True))
    ]
    return "\n".join(["term,t,bits_per_dim,standard_error", *lines]) + "\n"
