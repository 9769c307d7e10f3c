"""Figures: files of the right kind, with what they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny import TINY_GREY
from torch import Tensor

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.errors import UserError
from ddpm_engine.figures import run_figures as exhibit
from ddpm_engine.figures.interpolation import denoising_figure, interpolation_figure
from ddpm_engine.figures.run_figures import Exhibit
from ddpm_engine.figures.trajectory import forward_figure, shown_timesteps, watch
from ddpm_engine.images.grid import save_gif, to_uint8
from ddpm_engine.networks.conditioning import ConditioningSpec
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.plots.curves import bound_figure, quality_figure, schedules_figure
from ddpm_engine.plots.image_rows import moving_strip, strip
from ddpm_engine.presets import PRESETS
from ddpm_engine.samplers.sampler import Sampler

STEPS = 20


@pytest.fixture(scope="module")
def trained() -> LoadedModel:
    """An untrained network of digits of 8×8."""
    torch.manual_seed(0)
    diffusion = DiffusionConfig(timesteps=STEPS, beta_end=0.5)
    digits = PRESETS["digits"]()
    sampling = replace(digits.sampling, steps=4)
    config = replace(digits, model=TINY_GREY, diffusion=diffusion, sampling=sampling)
    model = UNet(TINY_GREY).eval().requires_grad_(False)
    return LoadedModel.from_config(model, config, "0" * 64)


def frames_of(path: Path) -> np.ndarray:
    """Every frame of a file: uint8 `[N, H, W, 3]`."""
    frames = []
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def contains(image: np.ndarray, level: int) -> bool:
    """Whether a grey level fills a good part of an image."""
    return bool((np.abs(image.astype(int) - level) <= 1).all(-1).mean() > 0.01)


def test_a_strip_holds_its_images(tmp_path: Path) -> None:
    levels = [30, 60, 90, 120, 150, 180]
    images = np.stack([np.full((4, 4, 1), level, np.uint8) for level in levels])
    strip([("a", images[:3]), ("b", images[3:])], ["1", "2", "3"], "above", tmp_path / "x.png")
    (image,) = frames_of(tmp_path / "x.png")
    assert all(contains(image, level) for level in levels)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_equal_figures_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        schedules_figure({"linear": NoiseSchedule.linear(50)}, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_moving_strip_has_a_frame_for_each(tmp_path: Path) -> None:
    rows = [[("x", np.full((2, 4, 4, 1), level, np.uint8))] for level in (40, 120, 200)]
    moving_strip(rows, ["t = 3", "t = 2", "t = 1"], tmp_path / "x.gif", milliseconds=50)
    frames = frames_of(tmp_path / "x.gif")
    assert len(frames) == 3
    for image, level in zip(frames, (40, 120, 200), strict=True):
        middle = image[image.shape[0] // 2, image.shape[1] // 3]
        assert abs(int(middle[0]) - level) <= 4  # of 64 colours


def test_gifs_loop_and_hold_the_last_frame(tmp_path: Path) -> None:
    frames = [np.full((5, 7, 3), level, np.uint8) for level in (0, 100, 255)]
    save_gif(frames, tmp_path / "x.gif", milliseconds=50)
    with Image.open(tmp_path / "x.gif") as image:
        assert image.size == (7, 5)
        assert image.info["loop"] == 0
        durations = []
        for number in range(3):
            image.seek(number)
            durations.append(image.info["duration"])
    assert durations == [50, 50, 600]


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_trajectories_are_plotted_from_end_to_end(timesteps: int) -> None:
    looked = shown_timesteps(timesteps)
    assert (looked[0], looked[-1]) == (0, timesteps - 1)
    assert looked == sorted(set(looked))
    assert len(looked) <= 10


def test_the_forward_figure_refuses_what_the_schedule_has_not(tmp_path: Path) -> None:
    images = np.zeros((1, 4, 4, 1), np.uint8)
    with pytest.raises(UserError, match="timestep 11 is to be shown, but the schedule has 1 to 10"):
        forward_figure(NoiseSchedule.linear(10), images, [0, 10], 0, tmp_path / "x.png")


def test_watching_does_not_change_the_samples(trained: LoadedModel) -> None:
    request = trained.request(seed=1, sampler="ddim", steps=10)
    kept = watch(trained, request, [3, 4], moments=4)
    assert [step.index for step in kept] == [0, 3, 6, 9]
    samples = Sampler(trained, request).sample([3, 4])
    assert torch.allclose(kept[-1].x, samples, atol=1e-5)
    assert not torch.equal(kept[0].x, kept[1].x)


def test_the_ends_of_an_interpolation_are_the_two_samples(
    trained: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[np.ndarray] = []
    monkeypatch.setattr(
        "ddpm_engine.figures.interpolation.strip", lambda given, *_: rows.append(given[0][1])
    )
    interpolation_figure(trained, seed=2, ends=(7, 5), path=tmp_path / "x.png")
    ends = trained.sample([7, 5], seed=2, sampler="ddim", steps=STEPS)
    levels = to_uint8(ends.tensor).astype(int)
    assert np.abs(rows[0][[0, -1]].astype(int) - levels).max() <= 1


def test_denoising_little_noise_leaves_the_image(
    trained: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, np.ndarray] = {}
    monkeypatch.setattr(
        "ddpm_engine.figures.interpolation.strip", lambda given, *_: rows.update(given)
    )
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)

    class Exact(torch.nn.Module):
        """Knows the image, and so the noise in it."""

        sample_shape = (1, 8, 8)
        conditioning = ConditioningSpec()

        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, timesteps: Tensor, conditioning: object = None) -> Tensor:
            tables = trained.schedule.sqrt_alpha_bar, trained.schedule.sqrt_one_minus_alpha_bar
            a, s = (table[timesteps].float().reshape(-1, 1, 1, 1) for table in tables)
            return (x - a * image) / s

    knowing = replace(trained, network=Exact())
    denoising_figure(knowing, image, seed=0, path=tmp_path / "x.png")
    original = to_uint8(image[None]).astype(int)
    noisy, estimate, sampled = (row.astype(int) for row in rows.values())
    assert np.abs(estimate - original).max() <= 1
    assert np.abs(sampled - original).max() <= 1
    errors = np.abs(noisy - original).mean((1, 2, 3))
    assert errors[0] == 0
    assert errors[1] < errors[4] < errors[-1]


@pytest.mark.parametrize("name", ["digits-edm", "digits-flow"])
def test_figures_of_networks_that_know_no_timesteps(
    trained: LoadedModel, name: str, tmp_path: Path
) -> None:
    preset = PRESETS[name]()
    diffusion = replace(preset.diffusion, timesteps=STEPS)
    sampling = replace(preset.sampling, steps=3)
    config = replace(preset, model=trained.config.model, diffusion=diffusion, sampling=sampling)
    model = LoadedModel.from_config(trained.network, config, "0" * 64)
    exhibited = Exhibit(model, tmp_path, tmp_path, photo=torch.zeros(1, 8, 8))
    for figure in ("reverse", "schedules", "interpolation", "denoising"):
        assert all(frames_of(path).std() > 5 for path in exhibit.FIGURES[figure](exhibited))


def test_curves_are_plotted(tmp_path: Path) -> None:
    linear = NoiseSchedule.linear(100)
    named = {"linear": linear, "zero": linear.rescaled_to_zero_terminal_snr()}
    schedules_figure(named, tmp_path / "schedules.png")
    quality_figure({"ddpm": {5: 3.0, 10: 1.0}, "ddim": {5: 2.0}}, 0.5, 64, tmp_path / "quality.png")
    bound_figure(np.random.default_rng(0).uniform(0.1, 1, (4, 101)), tmp_path / "bound.png")
    bound_figure(np.ones((1, 101)), tmp_path / "one.png")
    assert all(frames_of(path).std() > 5 for path in tmp_path.iterdir())


def test_quality_is_measured_against_digits_that_were_left_out(
    trained: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, object] = {}

    def keep(distances: object, floor: float, count: int, path: Path) -> None:
        found.update(distances=distances, floor=floor, count=count)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(exhibit, "quality_figure", keep)
    monkeypatch.setattr(exhibit, "QUALITY_STEPS", (2,))
    exhibit.quality(Exhibit(trained, tmp_path, tmp_path, count=40))
    assert found["count"] == 40
    distances = found["distances"]
    assert isinstance(distances, dict)
    assert set(distances) == set(exhibit.QUALITY_SAMPLERS)
    floor = found["floor"]
    assert isinstance(floor, float)
    # An untrained network generates no digits.
    assert all(line[2] > 3 * floor > 0 for line in distances.values())
    other = replace(trained.config, data=replace(trained.config.data, source="photos"))
    with pytest.raises(exhibit.Inapplicable):
        exhibit.quality(Exhibit(replace(trained, config=other), tmp_path, tmp_path))
