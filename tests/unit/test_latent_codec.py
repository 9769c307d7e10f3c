"""Models of latents: samples are decoded where people look, by the autoencoder of the training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.autoencoders import kl_folder, tiny_folder
from tests.tiny import TINY

from ddpm_engine.checkpoints import lazy_codec
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.checkpoints.recorded_config import record
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.nll import check_bound
from ddpm_engine.evaluation.sources import generated_source
from ddpm_engine.figures import run_figures
from ddpm_engine.generation.generate import generate, request_from_files
from ddpm_engine.images.latent_codec import LatentCodec
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.networks.build import build_network
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.model import DiffusionModel
from ddpm_engine.samplers.sampler import Sampler

pytest.importorskip("diffusers")

LATENT = replace(TINY, in_channels=4, out_channels=4)
"""Latents of 8×8, which an autoencoder of 4 pixels a latent decodes to 32×32."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    return kl_folder(tmp_path_factory.mktemp("autoencoder"), shift_factor=0.1)


def recorded(place: str) -> dict[str, Any]:
    opened = open_autoencoder(place)
    return {
        "place": place,
        "fingerprint": opened.fingerprint,
        "scale": opened.scale,
        "shift": opened.shift,
    }


def save(out: Path, autoencoder: Any = None, model: Any = LATENT) -> Path:
    """Save a checkpoint of a run on latents."""
    config = RunConfig(
        model=model, out=out, diffusion=DiffusionConfig(timesteps=20),
        sampling=SamplingConfig(steps=2),
    )  # fmt: skip
    torch.manual_seed(0)
    weights = build_network(model).state_dict()
    state = {"config": record(config), "autoencoder": autoencoder}
    CheckpointStore(out / "checkpoints").save(1, {"ema": weights}, state)
    return out


@pytest.fixture
def model(place: str, tmp_path: Path) -> LoadedModel:
    return load_model(save(tmp_path / "run", recorded(place)))


class Constant:
    """A network that is certain of its x_0."""

    sample_shape = (4, 8, 8)

    def __init__(self, x0: torch.Tensor) -> None:
        self.x0 = x0

    def __call__(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.x0.expand_as(x)


def constant(x0: torch.Tensor, codec: Any) -> DiffusionModel:
    schedule = DiffusionConfig(timesteps=20).build_schedule()
    return DiffusionModel(Constant(x0), schedule, "x0", SamplingConfig(steps=3), codec)


def test_samples_are_decoded_without_clipping(place: str) -> None:
    autoencoder = open_autoencoder(place)
    x0 = 3 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    model = constant(x0, LatentCodec(autoencoder))
    assert model.sampling.clip_x0 is False
    assert model.image_shape == (3, 32, 32)
    sampler = Sampler(model, model.request(sampler="ddim"))
    z = x0 / autoencoder.scale + autoencoder.shift
    expected = autoencoder.decode(z[None]).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    images = sampler.images(range(3))
    assert images.shape == (3, 32, 32, 3)
    assert abs(images.astype(int) - expected.astype(int)).max() <= 1
    again = sampler.start_images([0, 1])
    assert abs(np.asarray(again).astype(int) - expected.astype(int)).max() <= 1


def test_images_are_kept_where_a_mask_says_so(place: str) -> None:
    codec = LatentCodec(open_autoencoder(place))
    model = constant(torch.zeros(4, 8, 8), codec)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :18] = True  # two columns of pixels of the fifth column of latents
    x = Sampler(model, model.request(sampler="ddim", images=images, mask=mask)).sample([0])
    known = codec.from_images(images)
    torch.testing.assert_close(x[..., :4], known[..., :4])
    torch.testing.assert_close(x[..., 4:], torch.zeros(1, 4, 8, 4), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"`mask` is torch\.bool of shape"):
        Sampler(model, model.request(images=images, mask=mask[..., :8]))
    with pytest.raises(UserError, match="`images` has shape"):
        Sampler(model, model.request(images=images[..., :16], strength=0.5)).sample([0])


def test_images_to_begin_with_are_encoded(place: str) -> None:
    codec = LatentCodec(open_autoencoder(place))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    levels = ((images + 1) * 127.5).round().byte()
    expected = codec.encode(levels)
    assert torch.equal(codec.from_images(images), expected)
    stored = codec.autoencoder.moments(levels)
    assert torch.equal(codec.encode(stored), expected), "of moments that are stored"
    half = codec.encode(stored.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-3, atol=1e-4)


def test_bounds_of_pixels_are_refused(model: LoadedModel) -> None:
    assert model.sampling.clip_x0 is False
    assert Sampler(model, model.request()).sampling.clip_x0 is False
    with pytest.raises(UserError, match="latents, which dynamic thresholding") as caught:
        Sampler(model, model.request(threshold=0.995))
    assert caught.value.field == "threshold"
    with pytest.raises(UserError, match="likelihood of pixels, but this network samples latents"):
        check_bound(model, None)


def test_the_autoencoder_is_opened_when_samples_are_decoded(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def count(place: str, *args: Any, **options: Any) -> Any:
        opened.append(place)
        return open_autoencoder(place, *args, **options)

    monkeypatch.setattr(lazy_codec, "open_autoencoder", count)
    model = load_model(save(tmp_path / "run", recorded(place)))
    samples = model.sample(3, seed=1, progress=False)
    assert opened == []
    assert [image.size for image in samples.images] == [(32, 32)] * 3
    assert model.image_shape == (3, 32, 32)
    assert opened == [place]


def test_samples_in_a_folder(model: LoadedModel, tmp_path: Path) -> None:
    request = model.request(seed=1)
    for batch_size in (2, "auto"):
        out = tmp_path / f"samples {batch_size}"
        assert generate(model, request, range(5), out, batch_size=batch_size)
        for k, expected in enumerate(model.sample(5, seed=1, progress=False).images):
            with Image.open(next(out.rglob(f"*{k:04}.png"))) as image:
                assert image.size == (32, 32)
                difference = np.asarray(image, int) - np.asarray(expected, int)
            assert abs(difference).max() <= 1


def test_from_an_image_in_a_file(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    request = request_from_files(model, images=file, strength=0.5)
    assert generate(model, request, range(2), tmp_path / "samples")
    source, _ = generated_source(model, model.request(), 2, out=tmp_path / "evaluation")
    assert source.shape == (32, 32, 3)


def test_nothing_is_claimed_for_samples_that_cannot_be_decoded(place: str, tmp_path: Path) -> None:
    moved = shutil.copytree(place, tmp_path / "autoencoder")
    model = load_model(save(tmp_path / "run", recorded(str(moved))))
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="the model's autoencoder cannot be opened"):
        generate(model, model.request(), range(2), tmp_path / "samples", batch_size=2)
    assert not list((tmp_path / "samples").rglob("*.png"))


@pytest.mark.parametrize("name", ["reverse", "interpolation", "denoising", "forward"])
def test_figures(
    name: str, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhibit = run_figures.Exhibit(model, tmp_path, tmp_path, photo=torch.zeros(3, 32, 32))
    exhibit.__dict__["real"] = np.zeros((4, 32, 32, 3), np.uint8)
    for path in run_figures.FIGURES[name](exhibit):
        assert path.exists()
    with pytest.raises(run_figures.Inapplicable, match="samples are latents"):
        run_figures.bound(exhibit)


def test_an_autoencoder_that_has_moved_is_named(place: str, tmp_path: Path) -> None:
    first = str(shutil.copytree(place, tmp_path / "first"))
    run = save(tmp_path / "run", recorded(first))
    moved = str(shutil.move(first, tmp_path / "moved"))
    with pytest.raises(UserError, match="If it has moved, give its place as `autoencoder`") as hit:
        _ = load_model(run).sample(1, progress=False).images
    assert hit.value.field == "autoencoder"
    assert len(load_model(run, autoencoder=moved).sample(1, progress=False).images) == 1


def test_a_relative_place_counts_from_where_the_run_was_started(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place, "autoencoder")
    save(Path("run"), recorded("autoencoder"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_model("../run").image_shape == (3, 32, 32)


def test_another_autoencoder_is_refused(place: str, tmp_path: Path) -> None:
    run = save(tmp_path / "run", recorded(place))
    other = kl_folder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="trained with another, of fingerprint") as caught:
        _ = load_model(run, autoencoder=other).image_shape
    assert caught.value.field == "autoencoder"
    wider = recorded(tiny_folder(tmp_path / "wider", latent_channels=8))
    with pytest.raises(UserError, match="latents of 8 channels, and the network samples 4"):
        _ = load_model(save(tmp_path / "other run", wider)).image_shape


def test_the_recorded_scale_holds(place: str, tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "run", recorded(place) | {"scale": 0.5, "shift": 0}))
    levels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    means = open_autoencoder(place).moments(levels)[:, :4]
    torch.testing.assert_close(model.codec.encode(levels), means * 0.5)


@pytest.mark.parametrize(
    "damaged",
    [
        {"place": "a"},
        "a",
        {"place": "a", "fingerprint": "b", "scale": "1", "shift": 0.0},
        {"place": "a", "fingerprint": "b", "scale": 0.0, "shift": 0.0},
        {"place": "a", "fingerprint": "b", "scale": 1.0, "shift": float("nan")},
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, damaged: Any) -> None:
    with pytest.raises(UserError, match="as its autoencoder"):
        load_model(save(tmp_path / "run", damaged))


def test_a_model_of_pixels_takes_no_autoencoder(tmp_path: Path) -> None:
    run = save(tmp_path / "run")
    model = load_model(run)
    assert model.sampling.clip_x0 is True
    assert model.image_shape == model.shape
    with pytest.raises(UserError, match="not trained on latents; leave it out") as caught:
        load_model(run, autoencoder="somewhere")
    assert caught.value.field == "autoencoder"
