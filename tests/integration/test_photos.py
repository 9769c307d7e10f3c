"""Colour from end to end: a run on the photographs that scikit-learn ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.figures import run_figures as exhibit
from ddpm_engine.figures.run_figures import Exhibit
from ddpm_engine.presets import PRESETS
from ddpm_engine.training.trainer import Trainer


def test_a_run_on_photographs(tmp_path: Path) -> None:
    source = open_source("photos")
    few = replace(source, examples=source.examples[1000:1100])
    assert write_shards(few, tmp_path / "shards").samples == 100
    preset = PRESETS["photos"]()
    small = replace(preset.model, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    config = replace(
        preset,
        out=tmp_path / "run",
        data=replace(preset.data, path=tmp_path / "shards", workers=0),
        model=small,
        training=replace(preset.training, steps=2, batch_size=4),
        log=replace(preset.log, every=1, sample_every=0, tracker="none"),
    )
    Trainer(config).fit()
    trained = load_model(config.out)
    shown = Exhibit(trained, config.out, tmp_path)
    assert shown.real.shape == (64, 32, 32, 3)
    stored = {few.examples[i].image.tobytes() for i in range(100)}
    assert all(image.tobytes() in stored for image in shown.real)
    samples = trained.sample(2, steps=3, sampler="ddpm").tensor
    assert samples.shape == (2, 3, 32, 32)
    assert torch.isfinite(samples).all()
    # Noise differs between the channels of a pixel.
    assert not np.allclose(samples[:, 0], samples[:, 1], atol=0.01)
    (path,) = exhibit.forward(shown)
    assert path.stat().st_size > 1000
