"""launch/visualize.py, in this process: what it writes, and what it refuses."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.figures.run_figures import FIGURES
from ddpm_engine.training.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "launch" / "visualize.py"


def visualize(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def trained(config: RunConfig) -> Path:
    diffusion = replace(config.diffusion, timesteps=20, beta_end=0.5)
    training = replace(config.training, steps=3)
    log = replace(config.log, sample_steps=20)
    Trainer(replace(config, diffusion=diffusion, training=training, log=log)).fit()
    return config.out


def test_every_figure_of_a_run(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photo, samples = tmp_path / "photo.jpg", tmp_path / "samples"
    samples.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(photo)
    for number in range(4):
        Image.fromarray(noise[:8, :8, 0] // (number + 1)).save(samples / f"{number:08d}.png")
    visualize(
        monkeypatch, "--checkpoint", trained, "--samples", samples, "--photo", photo,
        "--steps", "5", "--timesteps", "1,9", "--out", tmp_path / "figures",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "no quality: " in output  # this run was made of shards, and not by the name of digits
    figures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in figures] == [
        "bound.png", "denoising.png", "forward.png", "interpolation.png", "loss.png",
        "real-and-drawn.png", "reverse.gif", "reverse.png", "schedules.png",
    ]  # fmt: skip
    assert all(str(path) in output for path in figures)
    for path in figures:
        image = np.asarray(Image.open(path).convert("RGB"))
        assert image.shape[0] > 100
        assert image.std() > 5  # it is not blank


def test_a_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddpm_engine.cli.visualize.STEPS", 3)
    visualize(monkeypatch, "--toy", "moons", "--out", tmp_path / "figures")
    output = capsys.readouterr().out.split()
    assert output == [str(tmp_path / "figures" / name) for name in (
        "moons.png", "moons.gif", "moons-straight-lines.png",
    )]  # fmt: skip
    assert Image.open(output[0]).width > 1000
    assert Image.open(output[1]).n_frames > 20  # type: ignore[attr-defined]
    assert Image.open(output[2]).width > 1000


REFUSED = [
    (["--only", "reverse,bounds"], "--only names 'bounds'; there are real-and-drawn, forward"),
    (["--only", "quality"], "quality against steps is plotted only for runs on the digits"),
    (["--only", "forward", "--timesteps", "1,21"], "timestep 21 is to be shown"),
    (["--only", "forward", "--timesteps", "a"], "--timesteps is 'a'"),
    (["--only", "denoising", "--photo", "none.jpg"], "there is no --photo none.jpg"),
    (["--only", "real-and-drawn", "--samples", "."], "--samples . holds no images"),
    (["--count", "1"], "--count is 1"),
    (["--toy", "moons"], "either --checkpoint RUN or --toy NAME"),
]


def test_what_is_refused(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, expected in REFUSED:
        with pytest.raises(SystemExit) as refused:
            visualize(monkeypatch, "--checkpoint", trained, "--out", "out", *arguments)
        assert refused.value.code == 2
        assert expected in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))


def test_figures_that_fail_leave_the_others(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(_: object) -> list[Path]:
        raise UserError("not finite: sample 4 of seed 0")

    monkeypatch.setitem(FIGURES, "reverse", fails)
    figures = tmp_path / "figures"
    with pytest.raises(SystemExit, match="2"):
        visualize(monkeypatch, "--checkpoint", trained, "--only", "reverse,loss", "--out", figures)
    assert capsys.readouterr().err == "error: not finite: sample 4 of seed 0\n"
    assert [path.name for path in figures.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"step": 1, "loss": 1.5}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 1}\n', ""),
        ('{"step": 1, "loss": null}\n', "has no losses yet"),
        ('{"step": 1, "loss": 1.5}\n{"step"', "line 2 of "),
        ("[]\n", "line 1 of "),
    ],
)
def test_losses_that_are_missing_or_damaged(
    lines: str, said: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (trained / "metrics.jsonl").write_text(lines)
    words = ("--checkpoint", trained, "--only", "loss", "--out", tmp_path / "figures")
    if said:
        with pytest.raises(SystemExit, match="2"):
            visualize(monkeypatch, *words)
        assert said in capsys.readouterr().err
    else:
        visualize(monkeypatch, *words)
        assert (tmp_path / "figures" / "loss.png").exists()
