"""The variational bound of real images, by any number of processes, and what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.features_store import FeatureSet
from ddpm_engine.evaluation.metrics import Division
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.evaluation.sources import RULE, RealImages
from ddpm_engine.generation.progress import Progress
from ddpm_engine.generation.work_sharing import fill
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.plots.curves import bound_figure

_REPORT = 1 << 48


def likelihood_of_real(
    pretrained: LoadedModel,
    weights: str | None,
    real: RealImages,
    out: Path,
    *,
    variance: Variance | None = None,
    seed: int = 0,
    batch_size: int = 64,
    division: Division = Division(),  # noqa: B008
    show: bool = False,
) -> Path | None:
    """Bits per dimension of real images: T network evaluations of each.

    Every term of every image is kept as it is found, in a folder `nll-HASH` of `out`, where the
    report, the terms over t (`terms.csv`) and their plot (`terms.png`) go, too.

    Args:
        pretrained: the network, on its device.
        weights: which of a run's, `ema` or `model`; None for another library's model.
        real: the images, of the network's shape.
        out: folder of the evaluation, made if missing.
        variance: of the reverse steps; None: that which the run samples with.
        seed: of the noise.
        batch_size: images at a time, and what a process that is killed loses.
        division: of the work among processes.
        show: whether to show progress.

    Returns:
        The report's path; None: other processes are still at it, and the last of them reports.

    Raises:
        UserError: a network that learned no variance if that is asked for, or is of another kind
            than `bits_per_dim` takes, or was distilled; images that cannot be had; no room.
    """
    variance = variance or pretrained.config.sampling.variance
    model = pretrained.config.model
    if variance == "learned_range" and model.out_channels < 2 * model.in_channels:
        raise UserError(
            f"variance is learned_range, but the network has {model.out_channels} outputs, none of "
            "them for it; choose --variance fixed_small or fixed_large"
        )
    if pretrained.config.distillation.teacher is not None:
        raise UserError(
            "nll is the bound of all timesteps, and this network was distilled: it knows those of "
            f"its {pretrained.config.sampling.steps} steps; leave nll out of --metrics"
        )
    asked = _asked(pretrained, weights, variance, real, seed)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    folder = out / f"nll-{digest[:8]}"
    found = FeatureSet(folder, asked)
    ids = range(len(real))
    timesteps = pretrained.schedule.timesteps
    progress = Progress(
        len(real), lambda: len(found.ids().intersection(ids)), timesteps, active=show
    )

    def network(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = pretrained.model(x, t, conditioning)
        progress.step(len(x))
        return output

    def terms(some: Sequence[int]) -> NDArray[np.float64]:
        device = next(pretrained.model.parameters()).device
        images = torch.from_numpy(real.read(some)).permute(0, 3, 1, 2)
        return np.asarray(
            bits_per_dim(
                network,
                pretrained.schedule,
                images.to(device),
                torch.from_numpy(real.place_in_set(some)).to(device),
                seed=seed,
                prediction=pretrained.config.diffusion.prediction,
                variance=variance,
                conditioning=Conditioning(_labels(pretrained, real, some, device)),
                clip=pretrained.clip,
            )
            .cpu()
            .numpy()
        )

    fill(
        found, ids, terms, on_written=progress.written, batch_size=batch_size,
        per_shard=batch_size, rank=division.rank, ranks=division.ranks,
    )  # fmt: skip
    progress.close()
    if not found.ids().issuperset(ids):
        return None
    with found.claim([_REPORT]) as granted:
        if not granted:
            return None
        rows = found.read(ids).astype(np.float64)
        with found.writing():
            bound_figure(rows, folder / "terms.png")
            with atomic_write(folder / "terms.csv") as file:
                file.write(_table(rows).encode())
        locations = {"data": str(real.shards.storage)}
        return write_report(folder, asked, {"nll": summary(rows)}, locations)


def summary(terms: NDArray[np.float64]) -> dict[str, Any]:
    """What the bound is made of, in bits per dimension, JSON values.

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


def _asked(
    pretrained: LoadedModel, weights: str | None, variance: Variance, real: RealImages, seed: int
) -> dict[str, Any]:
    config = pretrained.config
    return {
        "model": {
            "checkpoint": pretrained.hash,
            "checkpoint_step": pretrained.step,
            "weights": weights,
            "ema_decay": config.training.ema_decay if weights == "ema" else None,
            "prediction": config.diffusion.prediction,
            "variance": variance,
            "timesteps": pretrained.schedule.timesteps,
            "clip": pretrained.clip,
        },
        "seed": seed,
        "reference": {
            "fingerprint": real.shards.manifest.fingerprint,
            "count": len(real),
            "of": real.total,
            "shape": list(real.shape),
            "rule": RULE,
        },
    }


def _labels(
    pretrained: LoadedModel, real: RealImages, ids: Sequence[int], device: torch.device
) -> Tensor | None:
    """The classes of images, for a network that has any; the null class where they have none."""
    null = pretrained.model.conditioning.null_class
    if null is None:
        return None
    labels = [real.label_of(k) for k in ids]
    return torch.tensor([null if label is None else label for label in labels], device=device)


def _table(terms: NDArray[np.float64]) -> str:
    """Mean and standard error of each term over images, as CSV."""
    mean = terms.mean(0)
    error = terms.std(0, ddof=1) / len(terms) ** 0.5 if len(terms) > 1 else np.zeros_like(mean)
    last = len(mean) - 1
    names = ["decoder", *(["denoising"] * (last - 1)), "prior"]
    lines = [
        f"{name},{t},{value:.9g},{spread:.3g}"
        for t, (name, value, spread) in enumerate(zip(names, mean, error, strict=True))
    ]
    return "\n".join(["term,t,bits_per_dim,standard_error", *lines]) + "\n"
