"""The variational bound of real images, and its terms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.config import Variance
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.likelihoods import (
    GivenImages,
    check_likelihood,
    mean_and_error,
    measured_on_real_images,
)
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.objectives.base import Network


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

    def terms(network: Network, given: GivenImages) -> Tensor:
        return bits_per_dim(
            network,
            model.schedule,
            given.images,
            given.ids,
            seed=seed,
            prediction=model.config.diffusion.prediction,
            variance=variance,
            conditioning=given.conditioning,
            clip=bool(model.sampling.clip_x0),
        )

    found = measured_on_real_images(
        model, real, out, terms,
        kind={"variance": variance}, evaluations=model.schedule.timesteps, seed=seed,
        batch_size=batch_size, share=share, show_progress=show_progress,
    )  # fmt: skip
    if found is None:
        return None
    with found.store.writing(), atomic_write(found.folder / "terms.csv") as file:
        file.write(_table(found.rows).encode())
    return Bound(found.report({"nll": summary(found.rows)}), found.rows)


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
    check_likelihood(model, "nll")


def summary(terms: NDArray[np.float64]) -> dict[str, Any]:
    """Return the parts of the bound in bits per dimension: JSON values.

    Args:
        terms: `[N, T + 1]`, as `bits_per_dim` returns them.
    """
    mean = terms.mean(0)
    return {
        **mean_and_error(terms.sum(1)),
        "decoder": float(mean[0]),
        "denoising": float(mean[1:-1].sum()),
        "prior": float(mean[-1]),
    }


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
