"""Generating from folders of images as people have them."""

from __future__ import annotations

from pathlib import Path
from shutil import copy

import numpy as np
import pytest
from tests.integration.conftest import Run
from tests.tiny import TINY_GREY

from ddpm_engine.config import LogConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.images.grid import save_png
from ddpm_engine.training.trainer import Trainer


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = RunConfig(
        out=tmp_path_factory.mktemp("trained") / "run",
        data=DataConfig(path=shards, workers=0),
        model=TINY_GREY,
        training=TrainingConfig(steps=2, batch_size=4),
        log=LogConfig(every=50, checkpoint_every=50, sample_every=0, tracker="none"),
    )
    Trainer(config).fit()
    return config.out


def test_samples_of_samples_and_back_into_their_folder(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    drawn, copied = tmp_path / "drawn", tmp_path / "copied"
    sample = ("launch/sample.py", "--checkpoint", trained, "--sampler", "ddim", "--steps", "2")
    assert run(*sample, "--count", "3", "--out", drawn).returncode == 0
    copied.mkdir()
    for file in (*drawn.glob("0*.png"), drawn / "grid.png"):
        copy(file, copied)
    (drawn / "._00000000.png").touch()
    begin = (*sample, "--strength", "0.5", "--count")
    for images, out in ((drawn, tmp_path / "a"), (copied, tmp_path / "b"), (copied, copied / "c")):
        for count in ("2", "4"):  # the folder that was begun is continued
            done = run(*begin, count, "--images", images, "--out", out)
            assert (done.returncode, done.stderr) == (0, "")
    first, *others = (tmp_path / "a", tmp_path / "b", copied / "c")
    for name in ("manifest.json", *(f"{k:08d}.png" for k in range(4))):
        assert all((out / name).read_bytes() == (first / name).read_bytes() for out in others)


def test_damaged_images_are_named_before_the_folder_is_claimed(
    run: Run, trained: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(4):
        save_png(np.full((8, 8, 1), number, np.uint8), images / f"{number}.png")
    for number in (1, 3):
        (images / f"{number}.png").write_bytes(b"no image")
    sample = (
        "launch/sample.py", "--checkpoint", trained, "--sampler", "ddim", "--steps", "2",
        "--strength", "0.5", "--images", images, "--count", "4", "--out", out,
    )  # fmt: skip
    done = run(*sample)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(str(images / f"{number}.png") in done.stderr for number in (1, 3))
    assert not out.exists()
    for number in (1, 3):
        (images / f"{number}.png").unlink()
    assert run(*sample).returncode == 0
