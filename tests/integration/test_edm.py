"""EDM from the command line: trained, stopped, continued, previewed, sampled from, exported."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig, dump_config
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.images.grid import to_uint8
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


@pytest.fixture
def edm(config: RunConfig) -> RunConfig:
    """Class-conditional, so that guidance has something to do."""
    return replace(
        config,
        model=replace(config.model, num_class_embeds=11),
        diffusion=DiffusionConfig(schedule="edm", prediction="edm", sigma_data=0.75),
        training=replace(config.training, steps=12),
        sampling=SamplingConfig(sampler="heun", steps=4, clip_x0=False),
        log=replace(config.log, every=1, sample_every=12, sample_count=4, sample_steps=3),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Filled by the first test that asks for a trained run."""
    return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def trained(edm: RunConfig, made: Path) -> Path:
    if not made.exists():
        Trainer(replace(edm, out=made)).fit()
    return made


def losses(run: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_trained_and_continued_to_the_bit(
    trained: Path, edm: RunConfig, script: Script, tmp_path: Path
) -> None:
    (tmp_path / "edm.json").write_text(dump_config(edm))
    for steps in (5, 12):
        script("train", "--config", tmp_path / "edm.json", "--training.steps", steps)
    assert losses(edm.out) == losses(trained)
    assert len(set(losses(trained))) == 12
    for part in ("model", "ema", "optimizer"):
        files = [
            next((run / "checkpoints" / "step-00000012" / part).glob("*.safetensors"))
            for run in (edm.out, trained)
        ]
        ours, theirs = map(load_file, files)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    preview = np.asarray(Image.open(edm.out / "samples" / "step-00000012.png"))
    assert preview.std() > 10  # not of one colour


def test_samples_are_those_of_the_library(trained: Path, script: Script, tmp_path: Path) -> None:
    script(
        "sample", "--checkpoint", trained, "--out", tmp_path / "samples", "--count", 3,
        "--class-label", 7, "--guidance-scale", 2,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "samples" / "manifest.json").read_text())
    assert (manifest["sampler"], manifest["steps"]) == ("heun", 4)
    pretrained = load_model(trained)
    assert not pretrained.sampling.clip_x0
    assert pretrained.schedule.sigma_data == 0.75
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


def test_an_export_is_read_again(trained: Path, script: Script, tmp_path: Path) -> None:
    script("export", "--checkpoint", trained, "--out", tmp_path / "export")
    ours, back = load_model(trained), load_model(tmp_path / "export")
    assert back.config.diffusion == ours.config.diffusion
    assert back.config.sampling.sampler == "euler"
    for name, tensor in ours.network.state_dict().items():
        assert torch.equal(back.network.state_dict()[name], tensor)


def test_a_run_does_not_change_its_noise_levels(trained: Path, edm: RunConfig) -> None:
    changed = replace(edm, out=trained, objective=replace(edm.objective, p_mean=0.0))
    with pytest.raises(UserError, match=r"`objective.p_mean` was -1.2 and is now 0.0"):
        Trainer(changed)
