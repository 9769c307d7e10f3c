"""Training an autoencoder: it learns, resumes to the bit, and leaves a folder of diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import MakeShards
from tests.integration.conftest import Run
from tests.integration.test_resume import assert_same_run, loss_log, tensors
from tests.tiny import TINY_AUTOENCODER

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.cli.train_autoencoder import parse
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig, dump_config
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.open import samples_at
from ddpm_engine.errors import UserError
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.training.trainer import Trainer

STEPS = 40
MODEL = replace(TINY_AUTOENCODER, sample_size=8)


def config_at(out: Path, shards: Path) -> RunConfig:
    return RunConfig(
        out=out,
        data=DataConfig(path=shards, workers=0, horizontal_flip=True),
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        training=TrainingConfig(steps=STEPS, batch_size=8, ema_decay=0.9),
        log=LogConfig(
            every=1, checkpoint_every=10, sample_every=20, sample_count=6, tracker="none"
        ),
    )


@pytest.fixture(scope="module")
def trained(make_shards: MakeShards, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_at(tmp_path_factory.mktemp("autoencoder") / "run", make_shards(100))
    Trainer(config).fit()
    return config


def test_it_learns_and_shows_what_it_has_learnt(trained: RunConfig) -> None:
    losses = [loss for _, loss, _, _ in loss_log(trained.out)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    grids = sorted((trained.out / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000020.png", "step-00000040.png"]
    with Image.open(grids[0]) as image:
        # Four columns; two rows of originals, each above its reconstructions.
        assert image.size == (8 * (4 * 9 + 1), 8 * (4 * 9 + 1))


def test_the_folder_holds_the_averaged_network_at_the_scale_of_the_data(trained: RunConfig) -> None:
    import diffusers

    folder = trained.out / "vae"
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    averaged = {
        name.removeprefix("ema."): tensor
        for name, tensor in tensors(trained.out, STEPS).items()
        if name.startswith("ema.")
    }
    assert theirs.state_dict().keys() == averaged.keys()
    assert all(torch.equal(theirs.state_dict()[name], averaged[name]) for name in averaged)
    ours = open_autoencoder(str(trained.out))  # a run stands for its folder
    assert ours.fingerprint == open_autoencoder(str(folder)).fingerprint
    assert (ours.channels, ours.factor, ours.shift) == (2, 2, 0.0)
    data = Trainer(replace(trained, out=trained.out.with_name("again"))).run.dataset
    with torch.no_grad():
        images = samples_at(data, range(100)).images / 127.5 - 1
        drawn = torch.stack([theirs.encode(images).latent_dist.sample() for _ in range(50)])
    assert ours.scale == theirs.config.scaling_factor
    assert float(drawn.std()) * ours.scale == pytest.approx(1, abs=0.02)


def test_a_run_resumes_to_the_bit(trained: RunConfig, tmp_path: Path) -> None:
    first = replace(
        trained, out=tmp_path / "run", training=replace(trained.training, steps=STEPS // 2)
    )
    Trainer(first).fit()
    half = (first.out / "vae" / "config.json").read_text()
    Trainer(replace(trained, out=first.out)).fit()
    assert_same_run(first.out, trained.out, STEPS)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        resumed, straight = (run.out / "vae" / name for run in (first, trained))
        assert resumed.read_bytes() == straight.read_bytes()
    assert (first.out / "vae" / "config.json").read_text() != half


def test_a_finished_run_writes_its_folder_again_if_it_is_gone(
    trained: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(trained.out, tmp_path / "copy")
    copy = replace(trained, out=tmp_path / "copy")
    file = copy.out / "vae" / "diffusion_pytorch_model.safetensors"
    before = load_file(file)
    file.unlink()
    Trainer(copy).fit()
    after = load_file(file)
    assert all(torch.equal(after[name], before[name]) for name in before)
    written = file.stat().st_mtime_ns
    Trainer(copy).fit()
    assert file.stat().st_mtime_ns == written


def test_another_weight_is_another_run(trained: RunConfig) -> None:
    other = replace(trained, autoencoding=replace(trained.autoencoding, kl_weight=1.0))
    with pytest.raises(UserError, match=r"another run:\n.*`autoencoding\.kl_weight`"):
        Trainer(other)


def test_an_autoencoder_samples_nothing(trained: RunConfig) -> None:
    with pytest.raises(UserError, match="is the run of an autoencoder"):
        load_model(trained.out)


def test_the_command_line_continues_a_run_and_refuses_those_of_diffusion(
    trained: RunConfig, run: Run, tmp_path: Path, config: RunConfig
) -> None:
    shutil.copytree(trained.out, tmp_path / "copy")
    done = run(
        "launch/train_autoencoder.py", "--config", tmp_path / "copy", "--training.steps", "42"
    )
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert [row[0] for row in loss_log(tmp_path / "copy")][-1] == 42
    entries = json.loads((tmp_path / "copy" / "vae" / "config.json").read_text())
    assert entries["_class_name"] == "AutoencoderKL"
    refused = run("launch/train.py", "--config", tmp_path / "copy")
    assert refused.returncode == 2
    assert "train_autoencoder.py" in refused.stderr
    (tmp_path / "unet.json").write_text(dump_config(config))
    with pytest.raises(UserError, match="no autoencoder"):
        parse(["--config", str(tmp_path / "unet.json")])


def test_flags_of_a_preset(tmp_path: Path) -> None:
    _, run = parse(["--preset", "photos-autoencoder", "--autoencoding.kl-weight", "0.5"])
    assert run.autoencoding.kl_weight == 0.5
    assert run.model.in_channels == 3
    _, elsewhere = parse(["--data.path", str(tmp_path)])
    assert elsewhere.data.source is None
