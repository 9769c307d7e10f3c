"""An autoencoder trained on two processes is that of one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tests.distributed.launching import FSDP, Job, difference, launch, losses
from tests.tiny import TINY_AUTOENCODER

from ddpm_engine.config import RunConfig
from ddpm_engine.networks.files.weights import SAFETENSORS

STEPS = 4


def test_ranks_train_one_autoencoder_and_write_it_once(config: RunConfig) -> None:
    config = replace(
        config,
        model=replace(TINY_AUTOENCODER, sample_size=16),
        training=replace(config.training, steps=STEPS, batch_size=12),
        log=replace(config.log, sample_every=STEPS, sample_count=5),
    )
    one, two, sharded = (replace(config, out=config.out.with_name(n)) for n in "123")
    launch([Job(one, float64=True)], 1)
    launch([Job(two, float64=True), Job(sharded, FSDP, True)], 2)
    scale, weights = _saved(one)
    grid = (one.out / "samples" / f"step-{STEPS:08d}.png").read_bytes()
    for other in (two, sharded):
        assert difference(losses(other.out), losses(one.out)) <= 1e-9
        assert (other.out / "samples" / f"step-{STEPS:08d}.png").read_bytes() == grid
        other_scale, other_weights = _saved(other)
        assert other_scale == pytest.approx(scale, rel=1e-5)
        assert weights.keys() == other_weights.keys()
        for name, tensor in weights.items():
            assert other_weights[name].allclose(tensor, rtol=1e-5, atol=1e-6), name


def _saved(run: RunConfig) -> tuple[float, dict]:
    folder = run.out / "vae"
    entries = json.loads((folder / "config.json").read_text())
    return entries["scaling_factor"], load_file(folder / SAFETENSORS)
