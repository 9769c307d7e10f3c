"""Networks that enlarge, as people use them: training, stopping, and sampling in a cascade."""

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
from torch import Tensor

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.diffusion.super_resolution import downsample
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.generation.sample_reader import open_samples
from ddpm_engine.images.grid import grid, to_uint8
from ddpm_engine.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS = ("--sampler", "ddim", "--steps", 4)
Sample = Callable[..., Path]


def enlarging(config: RunConfig) -> RunConfig:
    """The tiny run, 4×4 → 8×8, of classes, with one preview at the end."""
    return replace(
        config,
        model=replace(config.model, low_resolution=4, num_class_embeds=11),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
        log=replace(config.log, sample_every=40, sample_count=6, sample_steps=5),
    )


def tensors(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted((out / "checkpoints" / "step-00000040").rglob("*.safetensors")):
        found |= {f"{file.parent.name}.{name}": t for name, t in load_file(file).items()}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is trained without a stop. Filled by the first test that asks for it."""
    return tmp_path_factory.mktemp("enlarging") / "run"


@pytest.fixture
def run_directory(config: RunConfig, trained: Path) -> Path:
    if not trained.exists():
        Trainer(replace(enlarging(config), out=trained)).fit()
        AcceleratorState._reset_state(reset_partial_state=True)
    return trained


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 4×4 samples, as launch/sample.py leaves them: ids 0 to 5, of classes 3 and 1."""
    folder = tmp_path_factory.mktemp("small") / "samples"
    folder.mkdir()
    settings = {"seed": 0, "classes": [3, 1], "format": "png"}
    (folder / "manifest.json").write_text(json.dumps(settings))
    levels = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    for k, image in enumerate(levels):
        Image.fromarray(image).save(folder / f"{k:08d}.png")
    return folder


@pytest.fixture
def sample(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Run launch/sample.py in this process: `sample("name", *arguments)` → its folder."""

    def start(name: str, *arguments: object, checkpoint: Path = run_directory) -> Path:
        out, script = tmp_path / name, str(ROOT / "launch" / "sample.py")
        line = [script, "--checkpoint", checkpoint, "--out", out, *STEPS, *arguments]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            runpy.run_path(script, run_name="__main__")
        return out

    return start


def pixels(folder: Path) -> np.ndarray:
    samples = open_samples(folder)
    return samples.read(sorted(samples.ids())).astype(int)


def test_resumed_run_is_the_same_to_the_bit(config: RunConfig, run_directory: Path) -> None:
    config = enlarging(config)
    Trainer(replace(config, training=replace(config.training, steps=20))).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(config).fit()
    ours, theirs = tensors(config.out), tensors(run_directory)
    assert ours.keys() == theirs.keys()
    assert "ema.augmentation_embedding.linear_1.weight" in ours
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_preview_enlarges_the_first_images_of_the_data(run_directory: Path, shards: Path) -> None:
    stored = ShardDataset(shards, seed=0).__getitems__(range(6))
    images = torch.from_numpy(np.stack([sample.image for sample in stored])).permute(0, 3, 1, 2)
    pretrained = load_model(run_directory)
    labels = [sample.label for sample in stored]
    samples = pretrained.sample(
        6, seed=0, steps=5, variance="fixed_small", classes=tuple(labels),
        low_resolution=downsample(images, 4),
    ).tensor  # fmt: skip
    shown = np.asarray(Image.open(run_directory / "samples" / "step-00000040.png")).astype(int)
    assert np.abs(shown - np.asarray(grid(to_uint8(samples))).astype(int)).max() <= 1


def test_a_cascade_makes_sample_k_of_sample_k(sample: Sample, small: Path) -> None:
    whole = sample("whole", "--count", 6, "--low-resolution", small, "--augmentation", 50)
    settings = json.loads((whole / "manifest.json").read_text())
    assert settings["classes"] == [3, 1], "classes are those of the low-resolution samples"
    assert settings["augmentation"] == 50
    one = sample(
        "one", "--ids", "4", "--low-resolution", small, "--augmentation", 50, "--batch-size", 1
    )
    assert np.abs(pixels(one) - pixels(whole)[4:5]).max() <= 1
    # Made from the fourth low-resolution sample, and from nothing else of the set.
    files = sorted(small.glob("0*.png"))
    alone = sample(
        "alone", "--ids", "4", "--low-resolution", files[4], "--augmentation", 50,
        "--class-label", 3,
    )  # fmt: skip
    assert np.abs(pixels(alone) - pixels(one)).max() <= 1
    other = sample(
        "other", "--ids", "4", "--low-resolution", files[3], "--augmentation", 50,
        "--class-label", 3,
    )  # fmt: skip
    assert np.abs(pixels(other) - pixels(one)).max() > 1
    clean = sample("clean", "--ids", "4", "--low-resolution", small)
    assert np.abs(pixels(clean) - pixels(one)).max() > 1


def test_a_set_goes_on_when_the_low_resolution_samples_have_become_more(
    sample: Sample, small: Path
) -> None:
    sample("out", "--count", 2, "--low-resolution", small)
    assert len(pixels(sample("out", "--count", 4, "--low-resolution", small))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this network upscales images of 4×4; give some by --low-resolution"),
        (["--augmentation", 5], "--augmentation needs --low-resolution"),
        (["--low-resolution", "nowhere"], "there is no --low-resolution nowhere"),
        (["--low-resolution", "{small}", "--ids", "5,6"], "has no sample 6 (yet)"),
        (["--low-resolution", "{small}", "--augmentation", 1001], "must lie in [0, 1000]"),
    ],
)
def test_refusals(
    arguments: list[object],
    message: str,
    sample: Sample,
    small: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sample("out", "--count", 2, *(str(a).format(small=small) for a in arguments))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_samples_of_another_size_are_refused(
    sample: Sample, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = sample("large", "--count", 2, "--low-resolution", small)
    with pytest.raises(SystemExit):
        sample("out", "--count", 2, "--low-resolution", large)
    assert "are 8×8 with 1 channels; this network upscales 4×4" in capsys.readouterr().err


def test_it_cannot_be_exported(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`model\.low_resolution` is 4"):
        export_pipeline(load_model(run_directory), tmp_path / "exported")
    assert not list(tmp_path.glob("exported*"))


def test_figures_of_sampling_from_noise_are_refused(
    run_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(ROOT / "launch" / "visualize.py")
    line = [script, "--checkpoint", str(run_directory), "--out", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2
    assert "is a super-resolution model" in capsys.readouterr().err
