"""Objectives other than the simple one, from the first step to a sample."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.objectives.config import ObjectiveConfig
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.training.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "launch" / "sample.py"


def train(config: RunConfig, name: str, *stops: int) -> RunConfig:
    """Train in a directory of that name, stopping and starting again at these steps."""
    config = replace(config, out=config.out.with_name(name))
    for steps in stops:
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(replace(config, training=replace(config.training, steps=steps))).fit()
    return config


def tensors(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (config.out / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors"):
        found |= {f"{file.parent.name}.{name}": t for name, t in load_file(file).items()}
    return found


def test_importance_sampling_resumes_to_the_bit(config: RunConfig) -> None:
    config = replace(
        config,
        diffusion=DiffusionConfig(timesteps=5),
        objective=ObjectiveConfig(timestep_sampling="importance"),
        log=replace(config.log, sample_steps=5, keep_checkpoints=5),
    )
    straight = tensors(train(config, "straight", 30), 30)
    # One stop while timesteps are still uniform, one after.
    stopped = train(config, "stopped", 4, 20, 30)
    assert int(tensors(stopped, 4)["objective.counts"].min()) < 10
    assert int(tensors(stopped, 20)["objective.counts"].min()) >= 10
    resumed = tensors(stopped, 30)
    assert resumed.keys() == straight.keys()
    assert [name for name in straight if not torch.equal(resumed[name], straight[name])] == []
    assert int(straight["objective.counts"].sum()) == 30 * config.training.batch_size


def test_a_learned_variance_from_training_to_a_sample(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained with previews, stopped, continued, sampled from in every way, and its bound taken."""
    config = replace(
        config,
        model=replace(config.model, out_channels=2),
        objective=ObjectiveConfig(learned_variance=True),
        sampling=SamplingConfig(steps=4, variance="learned_range"),
        log=replace(config.log, sample_every=10, sample_steps=3, sample_count=4),
    )
    straight = tensors(train(config, "straight", 20), 20)
    config = train(config, "run", 10, 20)
    resumed = tensors(config, 20)
    assert [name for name in straight if not torch.equal(resumed[name], straight[name])] == []
    assert (config.out / "samples" / "step-00000020.png").exists()
    head = [weights["model.conv_out.weight"] for weights in (tensors(config, 10), resumed)]
    changed = (head[0] - head[1]).abs().amax((1, 2, 3))
    assert bool((changed > 0).all()), "mean and variance are both trained"

    folder = config.out.with_name("samples")
    line = [SCRIPT, "--checkpoint", config.out, "--out", folder, "--count", 3]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [str(word) for word in line])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert len(list(folder.glob("0*.png"))) == 3
    assert '"learned_range"' in (folder / "manifest.json").read_text()

    trained = load_model(config.out)
    ids = torch.arange(3)
    ways: list[dict[str, Any]] = [
        {"variance": "learned_range"},
        {"variance": "fixed_small"},
        {"sampler": "ddim"},
    ]
    samples = [trained.sample(ids, seed=0, steps=4, **options).tensor for options in ways]
    assert all(bool(batch.isfinite().all()) for batch in samples)
    assert not torch.equal(samples[0], samples[1])
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    schedule = replace(config.diffusion, timesteps=5, beta_end=0.5).build_schedule()
    terms = bits_per_dim(
        trained.network, schedule, images, torch.arange(2), variance="learned_range"
    )
    assert bool(terms.isfinite().all())


@pytest.mark.parametrize(
    "objective",
    [
        {"weighting": "min-snr"},
        {"weighting": "p2", "offset_noise": 0.1},
        {"weighting": "vlb", "timestep_sampling": "logit-normal"},
    ],
)
def test_an_objective_belongs_to_its_run(config: RunConfig, objective: dict[str, Any]) -> None:
    config = train(replace(config, objective=ObjectiveConfig(**objective)), "run", 2)
    assert tensors(config, 2)["model.conv_out.weight"].abs().max() > 0
    with pytest.raises(UserError, match=r"holds another run.*\n.*`objective.weighting` was"):
        train(replace(config, objective=ObjectiveConfig()), "run", 4)
