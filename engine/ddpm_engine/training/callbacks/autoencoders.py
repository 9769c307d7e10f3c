"""What a run that trains an autoencoder does besides stepping."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddpm_engine.data.open import samples_at
from ddpm_engine.data.stream import ShardStream
from ddpm_engine.distributed import is_main, rank, world_size
from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import grid, save_png, to_uint8
from ddpm_engine.networks.autoencoder.kl import AutoencoderKL
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.files.layout import AUTOENCODER, NETWORK_CONFIG
from ddpm_engine.networks.files.weights import SAFETENSORS
from ddpm_engine.runtime import autocast
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run

logger = logging.getLogger(__name__)

MEASURED = 4096
"""Images, at most, that the spread of latents is measured over."""
_AT_A_TIME = 64
_DIGITS = 6
"""Significant digits of the scale."""


class Reconstructions(Callback):
    """Write `samples/step-….png` every `log.sample_every` steps: images above reconstructions.

    They are the first `log.sample_count` of the data, of which each rank reconstructs its share. A
    grid that cannot be written is reported and does not end training.
    """

    def on_step_end(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the run is saved, but its last grid could not be written.
        """
        if run.step % run.config.log.sample_every or run.interrupted:
            return
        run.watchdog.doing("reconstructing images", limited=False)
        with run.strategy.averaged() as model:
            originals, reconstructions = _reconstruct(run, cast(AutoencoderKL, model))
        if not is_main():
            return
        path = run.config.out / "samples" / f"step-{run.step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            both = above_each_other(to_uint8(originals), to_uint8(reconstructions))
            save_png(grid(both, columns=_columns(len(originals))), path)
        except OSError as error:
            if run.finished:
                raise UserError(
                    f"{path}, the last grid of reconstructions, cannot be written: {error}. The "
                    "run itself is saved"
                ) from None
            logger.error("could not write %s: %s", path, error)


class AutoencoderFolder(Callback):
    """Save the averaged autoencoder as diffusers does, in `vae`, when the run is finished.

    Its scale is one over the standard deviation of the latents of the training data, or of 4096
    samples of them.
    """

    def on_step_end(self, run: Run) -> None:
        """See `Callback`.

        Raises:
            UserError: the run is saved, but its autoencoder could not be written.
        """
        if run.finished:
            self._save(run, _averaged(run))

    def on_finished(self, run: Run) -> None:
        """See `Callback`: save it, unless it is there with these weights.

        Raises:
            UserError: it could not be written.
        """
        network = _averaged(run)
        missing = is_main() and not holds(run.config.out / AUTOENCODER, network)
        if run.ranks.sum(torch.tensor(float(missing), device=run.device)).item():
            self._save(run, network)

    def _save(self, run: Run, network: AutoencoderKL) -> None:
        folder = run.config.out / AUTOENCODER
        run.watchdog.doing("measuring the latents of the training data", limited=False)
        mean, deviation = spread(run, network)
        scale = float(f"{1 / max(deviation, 1e-6):.{_DIGITS}g}")
        if not is_main():
            return
        try:
            network.save(folder, scale)
        except OSError as error:
            raise UserError(
                f"the autoencoder cannot be written to {folder}: {error}. The run itself is saved: "
                "start it again when that is mended"
            ) from None
        logger.info(
            "the autoencoder is in %s: latents of mean %.3g and standard deviation %.3g, which its "
            "scale %g makes 1", folder, mean, deviation, scale,
        )  # fmt: skip


def spread(run: Run, network: AutoencoderKL) -> tuple[float, float]:
    """Measure the mean and the standard deviation of all latents of the training data.

    All ranks call this together, and get the same. Of each latent, its distribution counts.

    Args:
        run: for its data.
        network: in float32, on the run's device.
    """
    autoencoder = network.frozen(str(run.config.out))
    sums = torch.zeros(3, dtype=torch.float64)
    for positions in _shares(run, MEASURED):
        moments = autoencoder.moments(samples_at(run.dataset, positions).images).double()
        mean, logvar = moments.chunk(2, dim=1)
        second = mean.square() + logvar.exp()
        sums += torch.stack([second.new_tensor(mean.numel()), mean.sum(), second.sum()]).cpu()
    count, first, second_moment = run.ranks.sum(sums.to(run.device)).tolist()
    mean_of_all = first / count
    return mean_of_all, max(second_moment / count - mean_of_all**2, 0.0) ** 0.5


def holds(folder: Path, network: AutoencoderKL) -> bool:
    """Whether an autoencoder is saved in a folder, with the weights of a network."""
    if not (folder / NETWORK_CONFIG).exists():
        return False
    try:
        saved = load_file(folder / SAFETENSORS)
    except (OSError, SafetensorError):
        return False
    ours = network.state_dict()
    return saved.keys() == ours.keys() and all(
        torch.equal(saved[name], tensor.cpu()) for name, tensor in ours.items()
    )


def above_each_other(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Order images for a grid: a row of originals above one of their reconstructions, and so on.

    Args:
        originals: uint8 `[N, H, W, C]`.
        reconstructions: as `originals`.

    Returns:
        uint8 `[2 · rows · columns, H, W, C]`; a last row that is not full ends in white.
    """
    columns, shape = _columns(len(originals)), originals.shape[1:]
    rows = -(-len(originals) // columns)
    both = np.full((2, rows * columns, *shape), 255, np.uint8)
    both[0, : len(originals)], both[1, : len(originals)] = originals, reconstructions
    return both.reshape(2, rows, columns, *shape).swapaxes(0, 1).reshape(-1, *shape)


def _columns(count: int) -> int:
    return int(np.ceil(np.sqrt(2 * count)))


def _reconstruct(run: Run, model: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """The first images of the data and their reconstructions, `[N, C, H, W]` in [-1, 1] each."""
    count, device = run.config.log.sample_count, run.device
    # As many on each rank, since gathering needs that.
    share = -(-count // world_size())
    ids = torch.arange(share, device=device) * world_size() + rank()
    images = run.codec.encode(samples_at(run.dataset, ids.tolist()).images.to(device))
    with torch.no_grad(), autocast(run.config.training.precision, device):
        pieces = [model(piece)[0].float() for piece in images.to(_dtype(model)).split(_AT_A_TIME)]
    order = run.ranks.gather(ids).argsort()[:count]
    return run.ranks.gather(images)[order], run.ranks.gather(torch.cat(pieces))[order]


def _dtype(model: AutoencoderKL) -> torch.dtype:
    """Precision of what is not rounded to half: norms."""
    return cast(torch.dtype, model.encoder.conv_norm_out.weight.dtype)


def _averaged(run: Run) -> AutoencoderKL:
    """The averaged network in float32, whole on every rank; all of them call this together."""
    network = build_network(run.config.model, initialised=False)
    average = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in run.strategy.averages()["ema"].items()
    }
    network.load_state_dict({name: tensor.float() for name, tensor in average.items()})
    return cast(AutoencoderKL, network.to(run.device).eval().requires_grad_(False))


def _shares(run: Run, most: int) -> Iterator[list[int]]:
    """Positions of this rank among the first of the data, some at a time."""
    count = most if isinstance(run.dataset, ShardStream) else min(most, len(run.dataset))
    mine = range(rank(), count, world_size())
    for start in range(0, len(mine), _AT_A_TIME):
        yield list(mine[start : start + _AT_A_TIME])
