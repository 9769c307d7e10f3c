"""Networks that know no timesteps from the command line, of EDM and of flow matching.

Trained, stopped, continued, previewed, sampled from, evaluated, exported.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig, dump_config
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.ode_likelihood import ode_bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.images.grid import to_uint8
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.training.trainer import Trainer

LAUNCH = Path(__file__).parents[2] / "launch"
Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Run a script of launch/ in this process."""

    def start(name: str, *arguments: object) -> None:
        path = LAUNCH / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(word) for word in (path, *arguments)])
        runpy.run_path(str(path), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)

    return start


PROCESSES = {
    "edm": DiffusionConfig(schedule="edm", prediction="edm", sigma_data=0.75),
    "flow": DiffusionConfig(schedule="flow", prediction="flow", shift=2.0),
}


@pytest.fixture(params=PROCESSES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def continuous(config: RunConfig, kind: str) -> RunConfig:
    """Class-conditional, so that guidance has something to do."""
    return replace(
        config,
        model=replace(config.model, num_class_embeds=11),
        diffusion=PROCESSES[kind],
        training=replace(config.training, steps=12),
        sampling=SamplingConfig(sampler="heun", steps=4, clip_x0=False),
        log=replace(config.log, every=1, sample_every=12, sample_count=4, sample_steps=3),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first tests that ask for trained runs."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def trained(continuous: RunConfig, made: Path, kind: str) -> Path:
    if not (made / kind).exists():
        Trainer(replace(continuous, out=made / kind)).fit()
    return made / kind


def losses(run: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_trained_and_continued_to_the_bit(
    trained: Path, continuous: RunConfig, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "continuous.json").write_text(dump_config(continuous))
    for steps in (5, 12):
        script("train", "--config", tmp_path / "continuous.json", "--training.steps", steps)
    assert losses(continuous.out) == losses(trained)
    assert len(set(losses(trained))) == 12
    for part in ("model", "ema", "optimizer"):
        files = [
            next((run / "checkpoints" / "step-00000012" / part).glob("*.safetensors"))
            for run in (continuous.out, trained)
        ]
        ours, theirs = map(load_file, files)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    preview = np.asarray(Image.open(continuous.out / "samples" / "step-00000012.png"))
    assert preview.std() > 10  # not of one colour


def test_samples_are_those_of_the_library(
    trained: Path, script: Script, tmp_path: Path, kind: str
) -> None:
    script(
        "sample", "--checkpoint", trained, "--out", tmp_path / "samples", "--count", 3,
        "--class-label", 7, "--guidance-scale", 2,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert (manifest["sampler"], manifest["steps"]) == ("heun", 4)
    pretrained = load_model(trained)
    assert not pretrained.sampling.clip_x0
    assert pretrained.config.diffusion == PROCESSES[kind]
    expected = pretrained.sample(3, sampler="heun", steps=4, classes=(7,), guidance=2.0)
    for k, image in enumerate(to_uint8(expected.tensor)):
        file = np.asarray(Image.open(tmp_path / "samples" / f"{k:08d}.png"))
        assert np.abs(file.astype(int) - image[..., 0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        ("--sampler", "dpm++2m", "--steps", 5),
        ("--sampler", "ddpm", "--steps", 5, "--variance", "fixed_small", "--threshold", 0.99),
        ("--interpolate", "3,8"),
        ("--sampler", "ddim", "--eta", 0.5, "--timesteps", "999,600,300,0"),
        ("--cache-interval", 2),
    ],
    ids=str,
)
def test_options_of_sampling(
    options: tuple[object, ...], trained: Path, script: Script, tmp_path: Path
) -> None:
    common = ("--checkpoint", trained, "--out", tmp_path / "samples", "--count", 3)
    script("sample", *common, *options)
    grid = np.asarray(Image.open(tmp_path / "samples" / "grid.png"))
    assert grid.std() > 5


def test_a_network_is_distilled(trained: Path, script: Script, tmp_path: Path) -> None:
    script(
        "distill", "--teacher", trained, "--out", tmp_path / "fast", "--steps", 2,
        "--start-steps", 4, "--training.steps", 4, "--log.sample-every", 0,
    )  # fmt: skip
    assert len(losses(tmp_path / "fast")) == 4
    fast = load_model(tmp_path / "fast")
    assert fast.config.diffusion == load_model(trained).config.diffusion
    assert bool(fast.sample(2).tensor.isfinite().all())


def test_an_export_is_read_again(trained: Path, script: Script, tmp_path: Path, kind: str) -> None:
    script("export", "--checkpoint", trained, "--out", tmp_path / "export")
    ours, back = load_model(trained), load_model(tmp_path / "export")
    assert back.config.diffusion == ours.config.diffusion
    # Of EDM diffusers has no Heun.
    assert back.config.sampling.sampler == {"edm": "euler", "flow": "heun"}[kind]
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], tensor)


def test_both_likelihoods_are_evaluated(trained: Path, script: Script, tmp_path: Path) -> None:
    script(
        "evaluate", "--checkpoint", trained, "--metrics", "nll-ode", "--ode-steps", 4,
        "--count", 6, "--batch-size", 4, "--out", tmp_path / "evaluation",
    )  # fmt: skip
    (file,) = (tmp_path / "evaluation").glob("nll-*/result-*.json")
    report = json.loads(file.read_text())
    found = report["metrics"]["nll-ode"]
    assert (found["images"], report["model"]["ode_steps"]) == (6, 4)
    pretrained = load_model(trained)
    real = RealImages(open_shards(str(pretrained.config.data.path)), (8, 8, 1), 6)
    bits = ode_bits_per_dim(
        pretrained.network, pretrained.schedule,
        torch.from_numpy(real.read(range(6))).permute(0, 3, 1, 2),
        torch.from_numpy(real.index_in_set(range(6))), prediction=pretrained.prediction, steps=4,
        conditioning=Conditioning(torch.tensor([real.label_of(k) for k in range(6)])), clip=False,
    )  # fmt: skip
    assert found["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-5)
    assert "NLL by ODE" in file.with_suffix(".md").read_text()


def test_a_run_does_not_change_its_noise_levels(
    trained: Path, continuous: RunConfig, kind: str
) -> None:
    changes: dict[str, tuple[str, Any, Any]] = {
        "edm": ("p_mean", 0.0, -1.2), "flow": ("timestep_sampling", "logit-normal", "uniform")
    }  # fmt: skip
    field, value, was = changes[kind]
    objective = replace(continuous.objective, **{field: value})
    with pytest.raises(UserError, match=rf"`objective.{field}` was {was} and is now {value}"):
        Trainer(replace(continuous, out=trained, objective=objective))
