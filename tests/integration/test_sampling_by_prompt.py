"""The command that samples by prompt: from one model, a cascade, a prior and its decoder."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tests.captioned import CHANNELS, FEATURES, Means, pairs_of_digits, tiny_encoder
from tests.tiny import TINY_GREY

import ddpm_engine
from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.generation.sample_reader import open_samples
from ddpm_engine.networks.prior.config import PriorConfig
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.training.trainer import Trainer

Run = Callable[..., "CompletedProcess[str]"]
PROMPTS = ["one two", "nine then three", "digit four then digit two"]
SAMPLING = SamplingConfig(sampler="ddpm", steps=3)
TEXT = replace(
    TINY_GREY, sample_size=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    encoder_hid_dim=CHANNELS, cross_attention_dim=8, vector_channels=CHANNELS,
)  # fmt: skip


class Runs(NamedTuple):
    """Trained models, and their text encoder."""

    encoder: str
    text: Path
    base: Path
    upscaler: Path
    prior: Path
    decoder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("by_prompt")
    place = tiny_encoder(folder / "encoder")
    encoder = open_text_encoder(place)
    for name, size in (("large", (8, 16)), ("small", (4, 8))):
        write_shards(
            pairs_of_digits(24), folder / name, size=size, per_shard=12, text_encoder=encoder,
            image_embedder=Means(),
        )  # fmt: skip

    def train(name: str, model: Any, path: str = "large", **data: Any) -> Path:
        sampling = replace(SAMPLING, clip_x0=False if name == "prior" else None)
        config = RunConfig(
            out=folder / name,
            data=DataConfig(path=folder / path, workers=0, **data),
            model=model,
            sampling=sampling,
            diffusion=DiffusionConfig(timesteps=20),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
            training=TrainingConfig(steps=3, batch_size=4, ema_decay=0.5, condition_dropout=0.3),
            log=LogConfig(
                every=1, checkpoint_every=3, sample_every=0, sample_steps=2, tracker="none"
            ),
        )
        Trainer(config).fit()
        return config.out

    prior = PriorConfig(
        in_channels=FEATURES, out_channels=FEATURES, num_layers=1, num_attention_heads=2,
        attention_head_dim=8, text_channels=CHANNELS,
    )  # fmt: skip
    decoder = replace(TINY_GREY, sample_size=(8, 16), vector_channels=FEATURES)
    return Runs(
        place,
        train("text", TEXT),
        train("base", replace(TEXT, sample_size=(4, 8)), "small"),
        train("upscaler", replace(TEXT, low_resolution=(4, 8))),
        train("prior", prior, diffuse="embeddings"),
        train("decoder", decoder, vector="image"),
    )


@pytest.fixture
def sample(run: Run, tmp_path: Path) -> Callable[..., Path]:
    """Run the script; return the folder of the samples."""

    def start(name: str, *arguments: Any, refused: str | None = None) -> Path:
        done = run("launch/sample.py", "--out", name, *map(str, arguments))
        assert done.returncode == (0 if refused is None else 2), done.stderr
        assert refused is None or refused in done.stderr, done.stderr
        return tmp_path / name

    return start


def prompt_flags(prompts: list[str]) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def pixels(folder: Path, count: int) -> np.ndarray:
    return open_samples(folder).read(range(count))


def test_prompts_from_the_command_line_and_a_file_are_the_same_samples(
    sample: Callable[..., Path], runs: Runs, tmp_path: Path
) -> None:
    guided = ("--guidance-scale", 3, "--threshold", 0.95, "--negative-prompt", "digit", "--seed", 3)
    listed = sample("listed", "--checkpoint", runs.text, *prompt_flags(PROMPTS), *guided)
    assert open_samples(listed).ids() == {0, 1, 2}
    (tmp_path / "prompts.txt").write_bytes("\ufeff{}\r\n\n{}\n{}".format(*PROMPTS).encode())
    file = ("--checkpoint", runs.text, "--prompts", tmp_path / "prompts.txt", *guided)
    read = sample("read", *file, "--count", 5, "--batch-size", 2)
    assert np.array_equal(pixels(read, 3), pixels(listed, 3))
    manifest = json.loads((read / "manifest.json").read_text())
    assert manifest["prompts"] == PROMPTS
    assert manifest["negative_prompt"] == "digit"
    # The same from Python.
    model = load_model(runs.text)
    images = model.sample(
        PROMPTS, seed=3, guidance=3.0, threshold=0.95, negative_prompt="digit", progress=False
    ).images
    differences = pixels(listed, 3)[..., 0].astype(int) - np.stack([np.asarray(i) for i in images])
    assert abs(differences).max() <= 1


def test_samples_are_a_captioned_folder(sample: Callable[..., Path], runs: Runs) -> None:
    folder = sample("out", "--checkpoint", runs.text, *prompt_flags(PROMPTS), "--count", 4)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": f"{k:08d}.png", "text": PROMPTS[k % 3]} for k in range(4)
    ]
    # More samples, more lines; and training takes them.
    sample("out", "--checkpoint", runs.text, *prompt_flags(PROMPTS), "--count", 6)
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 6
    examples = open_source(str(folder)).examples
    assert len(examples) == 6


@pytest.mark.parametrize("format", ["tar", "npz"])
def test_shards_of_samples_hold_their_prompts(
    format: str, sample: Callable[..., Path], runs: Runs
) -> None:
    folder = sample(
        "out", "--checkpoint", runs.text, *prompt_flags(PROMPTS), "--format", format, "--steps", 1
    )
    (shard,) = (folder / "shards").glob(f"*.{format}")
    if format == "tar":
        with tarfile.open(shard) as tar:
            names = sorted(tar.getnames())
            texts = [tar.extractfile(f"{k:08d}.txt") for k in range(3)]
            assert [text.read().decode() for text in texts if text is not None] == PROMPTS
            image = tar.extractfile("00000000.png")
            assert image is not None
            assert Image.open(io.BytesIO(image.read())).size == (16, 8)
        assert len(names) == 9
    else:
        assert np.load(shard)["prompts"].tolist() == PROMPTS
    assert pixels(folder, 3).shape == (3, 8, 16, 1)


def test_a_cascade_is_the_two_models_one_after_the_other(
    sample: Callable[..., Path], runs: Runs
) -> None:
    text = (*prompt_flags(PROMPTS), "--guidance-scale", 2, "--seed", 3)
    chain = sample(
        "chain", "--cascade", runs.base, runs.upscaler, *text, "--augmentation", 100,
        "--stage-steps", "3,2",
    )  # fmt: skip
    small = sample("small", "--checkpoint", runs.base, *text)
    seed = json.loads((chain / "manifest.json").read_text())["stages"][0]["seed"]
    assert seed == 3
    from_python = ddpm_engine.Cascade([runs.base, runs.upscaler], "cpu")
    sampler = from_python.sampler(
        [{}, {"steps": 2}], prompts=PROMPTS, guidance=2.0, seed=3, augmentation_level=100
    )
    by_hand = sample(
        "large", "--checkpoint", runs.upscaler, *text[:-1], sampler.request.seed,
        "--low-resolution", small, "--augmentation", 100, "--steps", 2,
    )  # fmt: skip
    assert pixels(chain, 3).shape == (3, 8, 16, 1)
    assert np.array_equal(pixels(chain, 3), pixels(by_hand, 3))
    assert np.array_equal(sampler.images(range(3)), pixels(chain, 3))
    # An interrupted run is resumed by the same command.
    (chain / "00000001.png").unlink()
    sample(
        "chain", "--cascade", runs.base, runs.upscaler, *text, "--augmentation", 100,
        "--stage-steps", "3,2",
    )  # fmt: skip
    assert np.array_equal(pixels(chain, 3), pixels(by_hand, 3))


def test_a_prior_samples_what_its_decoder_is_conditioned_on(
    sample: Callable[..., Path], runs: Runs
) -> None:
    text = (*prompt_flags(PROMPTS), "--seed", 3)
    folder = sample("out", "--prior", runs.prior, "--checkpoint", runs.decoder, *text)
    expected = ddpm_engine.Cascade([runs.prior, runs.decoder], "cpu").sample(
        PROMPTS, seed=3, progress=False
    )
    images = np.stack([np.asarray(image) for image in expected.images])
    assert np.array_equal(pixels(folder, 3)[..., 0], images)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == PROMPTS
    other = sample(
        "other", "--prior", runs.prior, "--checkpoint", runs.decoder, *text,
        "--stage-guidance-scales", "4,2",
    )  # fmt: skip
    assert not np.array_equal(pixels(other, 3)[..., 0], images)


def test_an_encoder_that_has_moved_is_named(
    sample: Callable[..., Path], runs: Runs, tmp_path: Path
) -> None:
    shutil.copytree(runs.encoder, tmp_path / "moved")
    given = ("--checkpoint", runs.text, "--prompt", "one two")
    here = sample("here", *given)
    there = sample("there", *given, "--text-encoder", tmp_path / "moved")
    assert np.array_equal(pixels(here, 1), pixels(there, 1))
    tiny_encoder(tmp_path / "other", seed=1)
    sample("wrong", *given, "--text-encoder", tmp_path / "other", refused="trained with another")
    sample(
        "chain", "--cascade", runs.base, runs.upscaler, "--prompt", "one", "--text-encoder",
        tmp_path / "moved",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "text", "--prompts", "nowhere.txt"), "--prompts nowhere.txt cannot be"),
        (("--checkpoint", "text", "--prompt", "a", "--prompts", "b"), "--prompt and --prompts do"),
        (("--checkpoint", "text", "--guidance-scale", "2"), "give --prompts"),
        (
            ("--checkpoint", "text", "--prompt", "a", "--negative-prompt", "b"),
            "--negative-prompt n",
        ),
        (("--checkpoint", "decoder", "--prompt", "a"), "image embeddings, which a prior makes"),
        (("--checkpoint", "prior", "--prompt", "a"), "is a prior, which generates image embedd"),
        (("--cascade", "base"), "--cascade names one model"),
        ((), "give one of --checkpoint and --cascade"),
        (
            ("--checkpoint", "text", "--cascade", "base", "upscaler"),
            "--checkpoint and --cascade",
        ),
        (("--cascade", "upscaler", "base", "--prompt", "a"), "conditioned neither on"),
        (("--cascade", "text", "upscaler", "--prompt", "a"), "model 2 upscales 4×8"),
        (("--cascade", "base", "upscaler", "--class-label", "3"), "no model of the cascade has"),
        (("--checkpoint", "text", "--stage-steps", "3,2"), "--stage-steps needs --cascade or --pr"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    arguments: tuple[str, ...], message: str, sample: Callable[..., Path], runs: Runs
) -> None:
    places = {name: str(path) for name, path in runs._asdict().items()}
    sample("out", *(places.get(word, word) for word in arguments), refused=message)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"one\ncaf\xe9\n", "is not UTF-8"), (b" \n\n", "holds no prompts")],
)
def test_a_file_without_prompts_is_refused(
    content: bytes, message: str, sample: Callable[..., Path], runs: Runs, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    sample("out", "--checkpoint", runs.text, "--prompts", tmp_path / "prompts.txt", refused=message)
