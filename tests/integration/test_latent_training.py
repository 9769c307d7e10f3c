"""Training on the latents of an autoencoder, from shards to samples that are decoded."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tests.autoencoders import kl_folder
from tests.captioned import CHANNELS, pairs_of_digits, tiny_encoder
from tests.integration.test_resume import assert_same_run
from tests.recorder import AsOnAGpu, Recorded
from tests.tiny import TINY, TINY_DIT
from torch import Tensor

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.cli import visualize
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.open import open_dataset, samples_at
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.objectives.config import DistillationConfig, ObjectiveConfig
from ddpm_engine.objectives.inputs import TrainingInputs
from ddpm_engine.rules import validate
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.training.build_objective import build_objective
from ddpm_engine.training.teacher import student_config
from ddpm_engine.training.trainer import Trainer
from ddpm_kernels import Stream, gaussian_noise

pytest.importorskip("diffusers")

STEPS = 6
COUNT = 40
AUTOENCODER: dict[str, Any] = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 2, "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.7, "shift_factor": 0.1,
}  # fmt: skip
"""Of 2 pixels a latent."""
UNET = replace(TINY, sample_size=(4, 8), in_channels=2, out_channels=2, num_class_embeds=11)
DIT = replace(
    TINY_DIT, sample_size=(4, 8), in_channels=2, out_channels=2, text_channels=CHANNELS,
    num_class_embeds=11,
)  # fmt: skip


class Places(NamedTuple):
    """An autoencoder and a text encoder; the same images as they are, and as latents."""

    autoencoder: str
    text_encoder: str
    images: Path
    latents: Path


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("latents")
    place, text = kl_folder(folder / "autoencoder", **AUTOENCODER), tiny_encoder(folder / "text")
    source, size = pairs_of_digits(COUNT), (8, 16)
    write_shards(source, folder / "images", size=size, per_shard=25)
    write_shards(
        source, folder / "latents", size=size, per_shard=25,
        text_encoder=open_text_encoder(text), autoencoder=open_autoencoder(place), flips=True,
    )  # fmt: skip
    return Places(place, text, folder / "images", folder / "latents")


@pytest.fixture
def config(places: Places, tmp_path: Path) -> RunConfig:
    """A run on latents whose shards say what they are."""
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(path=places.latents, workers=0, horizontal_flip=True),
        model=UNET,
        diffusion=DiffusionConfig(timesteps=20),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(steps=STEPS, batch_size=8, ema_decay=0.5),
        log=LogConfig(
            every=1, checkpoint_every=3, sample_every=0, sample_steps=2, sample_count=4,
            tracker="none",
        ),
    )  # fmt: skip


def fit(config: RunConfig, *callbacks: Any) -> RunConfig:
    Trainer(config, callbacks).fit()
    return config


def state_of(out: Path) -> dict[str, Any]:
    checkpoint, _ = CheckpointStore(out / "checkpoints").newest()
    assert checkpoint is not None
    return checkpoint.state


def opened(path: Path, size: Any, channels: int, **changes: Any) -> Any:
    data = DataConfig(path=path, workers=0, **changes)
    return open_dataset(data, size=size, channels=channels, classes=None, seed=0)


@pytest.mark.parametrize("model", [UNET, DIT], ids=["unet", "dit"])
def test_a_resumed_or_replayed_run_is_the_run_that_never_stopped(
    model: Any, config: RunConfig, tmp_path: Path
) -> None:
    config = replace(config, model=model)
    whole = fit(replace(config, out=tmp_path / "whole"), AsOnAGpu())
    parts = replace(config, out=tmp_path / "parts")
    fit(replace(parts, training=replace(parts.training, steps=2)), AsOnAGpu())
    fit(parts, AsOnAGpu())
    assert_same_run(whole.out, parts.out, STEPS)
    recorded = Recorded()
    replayed = fit(replace(config, out=tmp_path / "replayed"), recorded)
    assert recorded.recorder.replays == STEPS
    assert_same_run(whole.out, replayed.out, STEPS)


def test_a_mirrored_sample_is_the_latent_of_the_mirrored_image(places: Places) -> None:
    positions = range(2 * COUNT)
    pixels = samples_at(opened(places.images, (8, 16), 1), positions)
    stored = samples_at(opened(places.latents, (4, 8), 2, horizontal_flip=True), positions)
    flips = TrainingInputs(3, horizontal_flip=True).prepare(pixels).flip
    prepared = TrainingInputs(3, horizontal_flip=True, latent_scale=0.7).prepare(stored)
    assert flips is not None
    assert 0 < flips.sum() < len(flips)
    assert prepared.flip is None
    mirrored = torch.where(flips[:, None, None, None], pixels.images.flip(-1), pixels.images)
    expected = open_autoencoder(places.autoencoder).moments(mirrored)
    torch.testing.assert_close(prepared.images.float(), expected, rtol=2e-3, atol=1e-3)
    plain = samples_at(opened(places.latents, (4, 8), 2), positions)
    assert torch.equal(plain.images, stored.images[:, 0])


class Noted:
    """A network that notes what it is given, and predicts x_0 to be what it is told."""

    def __init__(self, x0: Tensor) -> None:
        self.x0 = x0

    def __call__(self, z: Tensor, level: Tensor, conditioning: Any) -> Tensor:
        self.z, self.level = z, level
        return self.x0


@pytest.mark.parametrize("learned", [False, True])
def test_latents_are_drawn_by_position(learned: bool, config: RunConfig, places: Places) -> None:
    config = replace(
        config, objective=ObjectiveConfig(learned_variance=learned),
        diffusion=DiffusionConfig(timesteps=20, prediction="x0"),
    )  # fmt: skip
    dataset = opened(places.latents, (4, 8), 2)
    batch = samples_at(dataset, range(5, 5 + 2 * COUNT))
    space, schedule = dataset.latents, config.diffusion.build_schedule()
    data = replace(config.data, horizontal_flip=False)
    objective = build_objective(
        replace(config, data=data), schedule, dtype=torch.float64, latents=space
    )
    mean, logvar = batch.images.double().chunk(2, dim=1)
    seed, shape = torch.tensor(0), (2, 4, 8)
    draw, noise = (
        gaussian_noise(seed, batch.positions, shape, 0, stream).double()
        for stream in (Stream.LATENT, Stream.TRAINING_NOISE)
    )
    x0 = (mean + (logvar / 2).exp() * draw - space.shift) * space.scale
    network = Noted(torch.cat([x0, torch.full_like(x0, -1)], dim=1) if learned else x0)
    loss = objective(network, batch)
    a, s = (
        table[network.level][:, None, None, None]
        for table in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar)
    )
    torch.testing.assert_close(network.z, a * x0 + s * noise, rtol=0, atol=1e-6)
    if learned:
        assert bool(loss.isfinite().all())
        return
    assert loss.max() < 1e-10
    rows = torch.arange(len(loss)).flip(0)[:9]
    some = batch.map(lambda tensor: tensor[rows])
    again = Noted(x0[rows])
    objective(again, some)
    assert torch.equal(again.z, network.z[rows])
    # The other half of these positions is another epoch of the same images.
    first, second = (
        int(np.flatnonzero((batch.images == batch.images[0]).flatten(1).all(1))[k]) for k in (0, 1)
    )
    assert not torch.equal(x0[first], x0[second])


def test_a_checkpoint_says_what_decodes_its_samples(
    config: RunConfig, places: Places, tmp_path: Path
) -> None:
    data = replace(config.data, text_encoder=places.text_encoder)
    log = replace(config.log, sample_every=3)
    fit(replace(config, model=DIT, data=data, log=log))
    codec = open_autoencoder(places.autoencoder)
    assert state_of(config.out)["autoencoder"] == {
        "place": codec.place, "fingerprint": codec.fingerprint, "scale": 0.7, "shift": 0.1,
    }  # fmt: skip
    with Image.open(config.out / "samples" / "step-00000006.png") as grid:
        assert grid.mode == "L"
        assert min(grid.size) >= 2 * 8, "latents would be half as large"
    model = load_model(config.out)
    assert model.sampling.clip_x0 is False
    assert not model.config.clips_x0
    assert [image.size for image in model.sample(["one two"], seed=3, steps=2).images] == [(16, 8)]


def test_a_run_packs_the_latents_of_its_source(
    config: RunConfig, places: Places, tmp_path: Path
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for k in range(12):
        noise = np.random.default_rng(k).integers(0, 256, (8, 16), np.uint8)
        Image.fromarray(noise).save(source / f"{k}.png")
    data = replace(
        config.data, path=tmp_path / "shards", source=str(source), autoencoder=places.autoencoder
    )
    model = replace(UNET, num_class_embeds=None)
    fit(replace(config, data=data, model=model, training=replace(config.training, steps=2)))
    assert state_of(config.out)["autoencoder"]["place"] == places.autoencoder
    assert opened(tmp_path / "shards", (4, 8), 2).latents.flipped


def test_other_latents_are_refused(config: RunConfig, places: Places, tmp_path: Path) -> None:
    fit(replace(config, training=replace(config.training, steps=1)))
    other = kl_folder(tmp_path / "other", seed=1, **AUTOENCODER)
    named = replace(config, data=replace(config.data, autoencoder=other))
    with pytest.raises(UserError, match=r"`data\.autoencoder`.*other"):
        fit(named)
    with pytest.raises(UserError, match=r"latents in .* are 4×8 with 2 channels"):
        fit(
            replace(
                config, out=tmp_path / "wide", model=replace(UNET, in_channels=4, out_channels=4)
            )
        )
    images = replace(
        config, out=tmp_path / "images", model=replace(UNET, in_channels=1, out_channels=1),
        data=replace(config.data, path=places.images, autoencoder=places.autoencoder),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"`data\.autoencoder` is"):
        fit(images)
    write_shards(
        pairs_of_digits(COUNT), tmp_path / "shards", size=(8, 16),
        autoencoder=open_autoencoder(other), flips=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="trained on data with fingerprint"):
        fit(replace(config, data=replace(config.data, path=tmp_path / "shards")))


def test_an_autoencoder_that_has_moved_is_named_where_it_is_needed(
    config: RunConfig, places: Places
) -> None:
    moved = Path(places.autoencoder).with_name("moved")
    Path(places.autoencoder).rename(moved)
    try:
        fit(replace(config, training=replace(config.training, steps=1)))
        log = replace(config.log, sample_every=3)
        with pytest.raises(UserError, match=r"previews cannot be decoded.*`data\.autoencoder`"):
            fit(replace(config, log=log))
        fit(replace(config, log=log, data=replace(config.data, autoencoder=str(moved))))
    finally:
        moved.rename(places.autoencoder)
    assert state_of(config.out)["autoencoder"]["place"] == str(moved)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_model_of_latents_is_distilled(method: Any, config: RunConfig, places: Places) -> None:
    fit(config)
    plan = DistillationConfig(teacher=config.out, method=method, start_steps=4, steps=2)
    student = student_config(load_model(config.out).config, plan, config.out.with_name("student"))
    fit(student)
    assert state_of(student.out)["autoencoder"] == state_of(config.out)["autoencoder"]
    assert len(load_model(student.out).sample(2, seed=3).images) == 2
    others = replace(
        student,
        out=config.out.with_name("other"),
        data=replace(config.data, path=places.images),
        model=replace(UNET, in_channels=1, out_channels=1),
    )
    with pytest.raises(UserError, match="another network than the model fields describe"):
        fit(others)


@pytest.mark.parametrize("named", [True, False])
def test_what_is_of_pixels_is_refused(named: bool, config: RunConfig, places: Places) -> None:
    data = replace(config.data, autoencoder=places.autoencoder if named else None)
    config = replace(config, data=data)
    for changed, message in (
        (replace(config, sampling=SamplingConfig(clip_x0=True)), "which no bounds hold"),
        (replace(config, model=replace(UNET, low_resolution=(2, 4))), "are other latents"),
    ):
        with pytest.raises(UserError, match=message):
            (validate if named else fit)(changed)


def test_figures_show_images_also_of_an_autoencoder_that_has_moved(
    config: RunConfig, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(replace(config, training=replace(config.training, steps=1)))
    arguments = ["--checkpoint", str(config.out), "--out", str(tmp_path), "--steps", "2"]
    asked = ["--only", "reverse,forward,interpolation", "--timesteps", "1,9"]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments, *asked])
    moved = Path(places.autoencoder).with_name("moved")
    Path(places.autoencoder).rename(moved)
    try:
        with pytest.raises(SystemExit):
            visualize.main()
        sys.argv += ["--autoencoder", str(moved)]
        visualize.main()
    finally:
        moved.rename(places.autoencoder)
    for name in ("reverse.png", "reverse.gif", "forward.png", "interpolation.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5
