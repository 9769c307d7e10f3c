"""The scripts as people call them, from shards to samples."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig, from_dict
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def done(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture
def trained(config: RunConfig) -> Path:
    Trainer(replace(config, training=replace(config.training, steps=3))).fit()
    return config.out


def test_train_from_the_command_line(config_file: Path, config: RunConfig, run: Run) -> None:
    more = [
        "--config", config_file, "--training.steps", "4", "--log.every", "2",
        "--log.sample-every", "4", "--log.sample-steps", "2", "--log.tracker", "tensorboard",
    ]  # fmt: skip
    output = done(run("launch/train.py", *more))
    line = next(line for line in output.splitlines() if line.startswith("step 4/4"))
    for word in ("loss", "grad", "lr", "images/s", "data wait", "seen 32", "eta"):
        assert word in line
    assert CheckpointStore(config.out / "checkpoints").steps() == [4]
    assert pixels(config.out / "samples" / "step-00000004.png").ndim == 2
    assert list((config.out / "tensorboard").iterdir())
    saved = from_dict(json.loads((config.out / "config.json").read_text()), "saved")
    assert (saved.training.steps, saved.model) == (4, config.model)
    # The saved configuration starts the same run.
    assert "already trained" in done(run("launch/train.py", "--config", config.out))


def test_print_config_shows_what_was_set(run: Run, tmp_path: Path) -> None:
    arguments = ["--preset", "cifar10", "--optimizer.learning-rate", "0.5", "--print-config"]
    printed = from_dict(json.loads(done(run("launch/train.py", *arguments))), "printed")
    assert printed.optimizer.learning_rate == 0.5
    assert printed.model.block_out_channels == (128, 256, 256, 256)
    assert list(tmp_path.iterdir()) == []


def test_the_default_run_makes_its_shards(run: Run, tmp_path: Path) -> None:
    arguments = [
        "--training.steps", "1", "--training.batch-size", "2", "--log.sample-every", "0",
        "--data.workers", "0",
    ]  # fmt: skip
    done(run("launch/train.py", *arguments))
    assert json.loads((tmp_path / "data/digits/manifest.json").read_text())["samples"] == 1797
    assert (tmp_path / "runs/digits/checkpoints/step-00000001").is_dir()


def test_any_sample_can_be_made_again(trained: Path, run: Run, tmp_path: Path) -> None:
    common = ["--checkpoint", trained, "--steps", "10", "--seed", "5"]
    done(run("launch/sample.py", *common, "--count", "6", "--out", tmp_path / "all"))
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert (manifest["seed"], manifest["steps"], manifest["sampler"]) == (5, 10, "ddpm")
    assert len(manifest["checkpoint"]) == 64
    assert (tmp_path / "all" / "grid.png").exists()
    done(run("launch/sample.py", *common, "--ids", "4,1", "--out", tmp_path / "some"))
    assert sorted(p.stem for p in (tmp_path / "some").glob("0*.png")) == ["00000001", "00000004"]
    for name in ("00000001.png", "00000004.png"):
        again, before = pixels(tmp_path / "some" / name), pixels(tmp_path / "all" / name)
        # Convolutions may sum in another order for another batch: at most one grey level.
        assert int(np.abs(again.astype(int) - before.astype(int)).max()) <= 1
    assert not np.array_equal(
        pixels(tmp_path / "all/00000001.png"), pixels(tmp_path / "all/00000004.png")
    )


def test_sampling_adds_to_a_set_and_never_mixes_two(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    common = ["--checkpoint", trained, "--steps", "2", "--out", tmp_path / "out"]
    done(run("launch/sample.py", *common, "--count", "2"))
    before = (tmp_path / "out" / "00000000.png").stat().st_mtime_ns
    assert "already" in done(run("launch/sample.py", *common, "--count", "2"))
    done(run("launch/sample.py", *common, "--count", "3"))
    assert (tmp_path / "out" / "00000000.png").stat().st_mtime_ns == before
    assert len(list((tmp_path / "out").glob("0*.png"))) == 3
    refused = run("launch/sample.py", *common, "--count", "3", "--seed", "1")
    assert refused.returncode == 2
    assert "seed was 0 and is now 1" in refused.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    refused = run("launch/sample.py", "--checkpoint", trained, "--out", tmp_path / "mine")
    assert refused.returncode == 2
    assert "notes.txt" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--class-label", "3"], "without classes"),
        (["--guidance-scale", "3"], "without classes"),
        (["--ids", "3,x"], "--ids is '3,x'"),
        (["--ids", "3,3"], "name each sample once"),
        (["--count", "0"], "--count is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "1001"], "--steps is 1001"),
        (["--stepz", "3"], "--steps"),
    ],
)
def test_sample_refuses(
    arguments: list[str], expected: str, trained: Path, run: Run, tmp_path: Path
) -> None:
    refused = run("launch/sample.py", "--checkpoint", trained, "--out", "out", *arguments)
    assert refused.returncode != 0
    assert expected in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_classes(config: RunConfig, run: Run, tmp_path: Path) -> None:
    config = replace(
        config,
        model=replace(config.model, num_class_embeds=11),
        training=replace(config.training, steps=12),
        optimizer=replace(config.optimizer, learning_rate=1e-2),
    )
    Trainer(config).fit()
    common = ["--checkpoint", config.out, "--steps", "5", "--count", "2"]
    for name, arguments in {
        "none": ["--class-labels", "none"],
        "three": ["--class-label", "3"],
        "null": ["--class-label", "10"],
    }.items():
        done(run("launch/sample.py", *common, *arguments, "--out", tmp_path / name))
    none, three, null = (pixels(tmp_path / d / "00000000.png") for d in ("none", "three", "null"))
    assert np.array_equal(none, null)
    assert not np.array_equal(none, three)
    refused = run("launch/sample.py", *common, "--class-label", "11", "--out", tmp_path / "x")
    assert refused.returncode == 2
    assert "classes are 0 to 9" in refused.stderr


def test_a_full_disk_while_sampling(trained: Path, run: Run, tmp_path: Path) -> None:
    # No file may grow: what a full disk looks like. A PNG of 8×8 pixels has some 100 bytes.
    code = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
sys.argv.insert(0, "sample.py")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
    script = Path(__file__).parents[2] / "launch" / "sample.py"
    common = ["--checkpoint", trained, "--steps", "2", "--count", "2", "--out", tmp_path / "out"]
    full = run(script, *common, code=code)
    assert full.returncode == 2, full.stderr
    assert "out failed" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((tmp_path / "out").iterdir()) == []
    done(run("launch/sample.py", *common))
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2


def test_an_export_makes_the_samples_of_its_run(trained: Path, run: Run, tmp_path: Path) -> None:
    export = ["--checkpoint", trained, "--out", tmp_path / "export"]
    done(run("launch/export.py", *export))
    done(run("launch/export.py", *export))  # replaces itself
    for name, checkpoint in {"run": trained, "export": tmp_path / "export"}.items():
        common = ["--steps", "3", "--count", "2", "--out", tmp_path / f"{name}-samples"]
        done(run("launch/sample.py", "--checkpoint", checkpoint, *common))
    first, second = (tmp_path / f"{name}-samples" / "00000001.png" for name in ("run", "export"))
    assert np.array_equal(pixels(first), pixels(second))
    settings = json.loads((second.parent / "manifest.json").read_text())
    weights = tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    assert settings["checkpoint"] == sha256_of(weights)
    assert settings["checkpoint_step"] is None

    refused = run("launch/export.py", "--checkpoint", trained, "--out", trained)
    assert refused.returncode == 2
    assert "is not an export" in refused.stderr
    assert "Traceback" not in refused.stderr
