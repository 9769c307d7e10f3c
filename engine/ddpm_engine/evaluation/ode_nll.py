"""The likelihood of real images by the probability-flow ODE, computed by several processes."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.ode_likelihood import ode_bits_per_dim
from ddpm_engine.evaluation.likelihoods import (
    GivenImages,
    check_likelihood,
    mean_and_error,
    measured_on_real_images,
)
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.generation.work_sharing import WorkShare
from ddpm_engine.objectives.base import Network


def ode_likelihood_of_real_images(
    model: LoadedModel,
    real: RealImages,
    out: Path,
    *,
    steps: int = 100,
    seed: int = 0,
    batch_size: int = 64,
    share: WorkShare = WorkShare(),  # noqa: B008
    show_progress: bool = False,
) -> Path | None:
    """Compute bits per dimension by the ODE: 2 · steps evaluations, with derivatives, an image.

    Every image's is kept in the folder `nll-HASH` of `out`, beside the report.

    Args:
        model: the network, on its device.
        real: the images, of the network's shape.
        out: folder of the evaluation, created if missing.
        steps: of the solver.
        seed: of the places in bins and of the random signs.
        batch_size: images at a time, and what a process that is killed loses.
        share: this process among those that share the work.
        show_progress: whether to print progress.

    Returns:
        The report; None: other processes are still working, and the last of them reports.

    Raises:
        UserError: a distilled network, classes that it does not have, images that cannot be read,
            or a full disk.
    """
    check_likelihood(model, "nll-ode")

    def bits(network: Network, given: GivenImages) -> Tensor:
        return ode_bits_per_dim(
            network,
            model.schedule,
            given.images,
            given.ids,
            seed=seed,
            prediction=model.config.diffusion.prediction,
            steps=steps,
            conditioning=given.conditioning,
            clip=bool(model.sampling.clip_x0),
        )

    found = measured_on_real_images(
        model, real, out, bits,
        kind={"ode_steps": steps}, evaluations=2 * steps, seed=seed, batch_size=batch_size,
        share=share, show_progress=show_progress,
    )  # fmt: skip
    return None if found is None else found.report({"nll-ode": mean_and_error(found.rows[:, 0])})
