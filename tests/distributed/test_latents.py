"""A run on latents on two processes is the run of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.autoencoders import kl_folder
from tests.captioned import pairs_of_digits
from tests.distributed.launching import Job, difference, launch, losses
from tests.tiny import TINY

from ddpm_engine.config import RunConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.networks.autoencoder.folders import open_autoencoder

pytest.importorskip("diffusers")

STEPS = 6


@pytest.fixture
def latent(config: RunConfig, tmp_path: Path) -> RunConfig:
    """A run with labels and flips, whose previews are decoded."""
    place = kl_folder(tmp_path / "autoencoder", in_channels=1, out_channels=1)
    write_shards(
        pairs_of_digits(60), tmp_path / "shards", size=(16, 32), per_shard=25,
        autoencoder=open_autoencoder(place), flips=True,
    )  # fmt: skip
    return replace(
        config,
        data=DataConfig(path=tmp_path / "shards", workers=1, horizontal_flip=True),
        model=replace(
            TINY, sample_size=(4, 8), in_channels=4, out_channels=4, num_class_embeds=11,
            dropout=0.1,
        ),
        training=replace(config.training, steps=STEPS, batch_size=12),
        log=replace(config.log, sample_every=STEPS, sample_steps=2, sample_count=5),
    )  # fmt: skip


def test_ranks_are_equal_and_go_on_from_one_another(latent: RunConfig) -> None:
    one, two, part = (replace(latent, out=latent.out.with_name(name)) for name in "123")
    half = replace(part, training=replace(part.training, steps=STEPS // 2))
    launch([Job(one, float64=True), Job(half, float64=True)], 1)
    launch([Job(two, float64=True), Job(part, float64=True)], 2)
    for other in (two, part):
        assert difference(losses(other.out), losses(one.out)) <= 1e-9
    grids = [(run.out / "samples" / "step-00000006.png").read_bytes() for run in (one, two)]
    assert len(grids[0]) > 500
    assert grids[0] == grids[1]
