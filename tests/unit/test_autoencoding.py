"""Training of autoencoders: shape, objective and rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tests.tiny import TINY_AUTOENCODER, TINY_GREY
from torch import Tensor

from ddpm_engine.autoencoder_presets import AUTOENCODERS
from ddpm_engine.config import RunConfig, from_dict, to_dict
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.dataset import Batch
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.networks.autoencoder.kl import AutoencoderKL
from ddpm_engine.networks.build import build_network
from ddpm_engine.objectives.autoencoding import AutoencodingObjective
from ddpm_engine.objectives.config import AutoencodingConfig
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.rules import problems, validate
from ddpm_engine.training.callbacks.autoencoders import above_each_other
from ddpm_kernels import Stream, gaussian_noise

RUN = RunConfig(model=TINY_AUTOENCODER)


def batch_of(count: int, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, 1, 8, 16), dtype=torch.uint8, generator=generator)
    return Batch(images, None, torch.arange(first, first + count))


def objective(flip: bool = False, **options: Any) -> AutoencodingObjective:
    inputs = TrainingInputs(3, horizontal_flip=flip)
    values = {"kl_weight": 0.1, **options}
    return AutoencodingObjective(inputs, TINY_AUTOENCODER.latent_shape, **values)


@pytest.fixture(scope="module")
def network() -> AutoencoderKL:
    torch.manual_seed(0)
    built = build_network(TINY_AUTOENCODER)
    assert isinstance(built, AutoencoderKL)
    return built


def test_it_is_the_network_of_diffusers(network: AutoencoderKL) -> None:
    theirs = diffusers.AutoencoderKL(**TINY_AUTOENCODER.arguments())
    theirs.load_state_dict(network.state_dict())  # the same names
    x = torch.rand(2, 1, 8, 16) * 2 - 1
    with torch.no_grad():
        reconstruction, (mean, logvar) = network(x)
        encoded = theirs.encode(x).latent_dist
        assert torch.equal(mean, encoded.mean)
        assert torch.equal(logvar, encoded.logvar)
        assert torch.equal(reconstruction, theirs.decode(encoded.mean).sample)


def test_the_loss_is_the_error_and_the_divergence(network: AutoencoderKL) -> None:
    batch = batch_of(3, first=5)
    with torch.no_grad():
        loss = objective()(network, batch)
        shape = TINY_AUTOENCODER.latent_shape
        noise = gaussian_noise(3, batch.positions, shape, 0, Stream.LATENT)
        x = batch.images / 127.5 - 1
        reconstruction, (mean, logvar) = network(x, noise)
        normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        divergence = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    expected = (reconstruction - x).abs().mean((1, 2, 3)) + 0.1 * divergence.mean((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_depends_on_the_position_and_not_on_the_batch(network: AutoencoderKL) -> None:
    batch, compute = batch_of(4), objective(flip=True)
    rows = [Batch(batch.images[k : k + 1], None, batch.positions[k : k + 1]) for k in range(4)]
    with torch.no_grad():
        together = compute(network, batch)
        alone = torch.cat([compute(network, row) for row in rows])
        later = compute(network, replace(batch, positions=batch.positions + 4))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, later, rtol=1e-3)


def test_images_are_mirrored_where_they_are_to_be() -> None:
    seen: list[Tensor] = []

    def identity(x: Tensor, noise: Tensor) -> Any:
        seen.append(x)
        return x, (torch.zeros_like(noise), torch.zeros_like(noise))

    batch = batch_of(32)
    loss = objective(flip=True)(identity, batch)
    assert torch.equal(loss, torch.zeros(32))  # compared with what was given
    images = batch.images / 127.5 - 1
    mirrored = (seen[0] == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(seen[0] == images).flatten(1).all(1))
    assert 4 < int(mirrored.sum()) < 28


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sample_size": (8, 9)}, "sample_size"),
        ({"norm_num_groups": 3}, "norm_num_groups"),
        ({"in_channels": 2}, "in_channels"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"latent_channels": 0}, "latent_channels"),
    ],
)
def test_shapes_that_cannot_be_built(changes: dict[str, Any], field: str) -> None:
    found = list(replace(TINY_AUTOENCODER, **changes).problems())
    assert [problem.field for problem in found] == [field]


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (replace(RUN, diffusion=DiffusionConfig(prediction="v")), "diffusion"),
        (replace(RUN, data=DataConfig(text_encoder="somewhere")), "data.text_encoder"),
        (RunConfig(model=TINY_GREY, autoencoding=AutoencodingConfig(1.0)), "autoencoding"),
    ],
)
def test_what_does_nothing_is_refused(run: RunConfig, field: str) -> None:
    assert [problem.field for problem in problems(run)] == [field]


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_presets_are_valid_and_are_read_again(name: str) -> None:
    preset = AUTOENCODERS[name]()
    validate(preset)
    assert from_dict(to_dict(preset), name) == preset


def test_rows_of_originals_stand_above_rows_of_reconstructions() -> None:
    originals = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    rows = above_each_other(originals, originals + 100).reshape(-1, 4)  # ceil(sqrt(10)) columns
    expected = [[0, 1, 2, 3], [100, 101, 102, 103], [4, 255, 255, 255], [104, 255, 255, 255]]
    assert rows.tolist() == expected
