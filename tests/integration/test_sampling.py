"""Sampling as people call it: every option, many samples, many processes, and sudden ends."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from tests.tiny import TINY_GREY

from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.errors import UserError
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.work_sharing import WorkShare, chunks, fill_missing
from ddpm_engine.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "sample.py"
Sample = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional network, trained just enough that its output is not zero."""
    config = RunConfig(
        out=tmp_path_factory.mktemp("trained") / "run",
        data=DataConfig(path=shards, workers=0),
        model=replace(TINY_GREY, num_class_embeds=11),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        training=TrainingConfig(steps=40, batch_size=16, ema_decay=0.9),
        log=LogConfig(every=50, checkpoint_every=50, sample_every=0, tracker="none"),
    )
    Trainer(config).fit()
    return config.out


@pytest.fixture
def sample(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """Run the script in this process: `sample("name", *arguments)` → its folder."""

    def start(name: str, *arguments: object) -> Path:
        out = tmp_path / name
        line = [SCRIPT, "--checkpoint", trained, "--out", out, *arguments]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return out

    return start


DDIM = ("--sampler", "ddim", "--steps", 8, "--count", 4)


def pixels(folder: Path) -> np.ndarray:
    """All images of a folder of PNGs in order: int16 `[N, H, W]`."""
    files = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(np.int16)


def difference(a: Path, b: Path) -> int:
    return int(np.abs(pixels(a) - pixels(b)).max())


def tar_pixels(folder: Path) -> dict[int, np.ndarray]:
    """The images in a folder of shards by id; each id must be there once."""
    found: dict[int, np.ndarray] = {}
    for path in sorted((folder / "shards").glob("*.tar")):
        for entry in webdataset.WebDataset(str(path), shardshuffle=False):
            k = int(entry["__key__"])
            assert k not in found
            found[k] = np.asarray(Image.open(io.BytesIO(entry["png"]))).astype(np.int16)
    return found


def processes(trained: Path, out: Path, *arguments: object, ranks: int) -> list[Any]:
    """Start the script as the ranks of one run, without a launcher."""
    line = [sys.executable, SCRIPT, "--checkpoint", trained, "--out", out, *arguments]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            [str(word) for word in line],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


# Options


@pytest.mark.parametrize(
    "sampler",
    ["ddpm", "ddim", "dpm++1", "dpm++2m", "dpm++3m", "dpm++2m_sde", "unipc", "unipc3", "euler",
     "heun"],
)  # fmt: skip
def test_every_sampler_samples(sampler: str, sample: Sample) -> None:
    out = sample("out", "--sampler", sampler, "--steps", 4, "--count", 2)
    assert pixels(out).std() > 5
    assert json.loads((out / "manifest.json").read_text())["sampler"] == sampler


def test_listed_timesteps_are_those_of_the_spacing(sample: Sample) -> None:
    spaced = sample("spaced", "--sampler", "ddim", "--steps", 4, "--count", 2)
    listed = sample("listed", "--sampler", "ddim", "--timesteps", "999,749,499,249", "--count", 2)
    other = sample("other", "--sampler", "ddim", "--timesteps", "999,600,100,0", "--count", 2)
    assert difference(spaced, listed) == 0
    assert difference(spaced, other) > 0
    leading = sample("leading", "--sampler", "ddim", "--steps", 4, "--count", 2, "--spacing",
                   "leading")  # fmt: skip
    assert difference(spaced, leading) > 0


def test_noise_options(sample: Sample) -> None:
    plain = sample("plain", *DDIM)
    assert difference(plain, sample("eta", *DDIM, "--eta", 0.8)) > 0
    ddpm = ("--steps", 8, "--count", 4, "--sampler", "ddpm", "--variance")
    assert (
        difference(sample("small", *ddpm, "fixed_small"), sample("large", *ddpm, "fixed_large")) > 0
    )
    assert difference(plain, sample("seed", *DDIM, "--seed", 1)) > 0
    assert difference(plain, sample("weights", *DDIM, "--weights", "model")) > 0


def test_classes_one_by_one_and_in_turn(sample: Sample) -> None:
    every = sample("all", "--sampler", "ddim", "--steps", 8, "--count", 12, "--class-labels", "all")
    listed = sample("list", *DDIM, "--class-labels", "3,1")
    three, one = sample("3", *DDIM, "--class-label", 3), sample("1", *DDIM, "--class-label", 1)
    # Sample 1 is of class 1 in both; so is 3 of class 3 in `all`, and of 1 in the list.
    assert np.abs(pixels(every)[[1]] - pixels(one)[[1]]).max() <= 1
    assert np.abs(pixels(every)[[3]] - pixels(three)[[3]]).max() <= 1
    assert np.abs(pixels(listed)[[0, 2]] - pixels(three)[[0, 2]]).max() <= 1
    assert np.abs(pixels(listed)[[1, 3]] - pixels(one)[[1, 3]]).max() <= 1
    assert difference(three, one) > 1
    grid = np.asarray(
        Image.open(sample("rows", *DDIM, "--count", 8, "--class-labels", "3,1") / "grid.png")
    )
    assert grid.shape == ((2 * 9 + 1) * 8, (4 * 9 + 1) * 8)  # two rows of four, eightfold
    # The default: every class in turn, from noise; no class, if not from noise.
    assert difference(sample("unsaid", *DDIM, "--count", 12), every) == 0
    no_class = (*DDIM, "--class-labels", "none")
    assert difference(sample("none", *no_class), sample("null", *DDIM, "--class-label", 10)) == 0
    images = ("--images", three, "--strength", 1)
    assert difference(sample("i", *DDIM, *images), sample("in", *no_class, *images)) == 0
    assert (
        difference(sample("i0", *DDIM, *images, "--class-label", 0), sample("j", *DDIM, *images))
        > 0
    )


def test_guidance_options(sample: Sample) -> None:
    plain = sample("plain", *DDIM, "--class-label", 3)
    guided = ("--class-label", 3, "--guidance-scale", 5, *DDIM)
    strong = sample("strong", *guided)
    assert difference(plain, strong) > 1
    assert difference(strong, sample("two", *guided, "--two-passes")) <= 1
    assert difference(strong, sample("rescaled", *guided, "--guidance-rescale", 0.9)) > 1
    assert difference(strong, sample("limited", *guided, "--guidance-interval", 0.5, 5)) > 1
    none = sample("none", *DDIM, "--class-label", 3, "--guidance-scale", 1)
    assert difference(plain, none) <= 1


def test_threshold_and_cache(sample: Sample) -> None:
    plain = sample("plain", *DDIM)
    assert difference(plain, sample("every", *DDIM, "--cache-interval", 1)) == 0
    assert difference(plain, sample("third", *DDIM, "--cache-interval", 3)) > 0
    wild = ("--class-label", 3, "--guidance-scale", 9, *DDIM)
    assert difference(sample("w", *wild), sample("wt", *wild, "--threshold", 0.8)) > 0


def test_kept_features_are_never_of_the_batch_before(sample: Sample) -> None:
    changing = (
        "--sampler", "ddim", "--steps", 10, "--class-label", 3, "--guidance-scale", 3,
        "--guidance-interval", 2, 1000, "--cache-interval", 4, "--batch-size", 1,
    )  # fmt: skip
    both = sample("both", *changing, "--ids", "0,1")
    alone = sample("alone", *changing, "--ids", "1")
    assert np.array_equal(pixels(both)[1], pixels(alone)[0])


def test_image_to_image_keeps_what_little_noise_leaves(sample: Sample, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    # Larger than the network, in colour, and of two kinds: cut, resized, made grey.
    coarse = np.zeros((2, 32, 48, 3), np.uint8)
    coarse[0, :16], coarse[1, :, 24:] = 255, 255
    for number, image in enumerate(coarse):
        Image.fromarray(image).save(images / f"{number}.png")
    slight = sample("slight", *DDIM, "--images", images, "--strength", 0.125)
    strong = sample("strong", *DDIM, "--images", images, "--strength", 1)
    half = sample("half", *DDIM, "--images", images)
    # Sample k begins with image k modulo 2.
    begun = np.zeros((4, 8, 8))
    begun[0::2, :4], begun[1::2, :, 4:] = 255, 255

    def correlation(folder: Path) -> float:
        return float(np.corrcoef(pixels(folder).ravel(), begun.ravel())[0, 1])

    assert correlation(slight) > 0.9
    assert correlation(slight) > correlation(half) > correlation(strong)
    alone = sample("alone", *DDIM, "--images", images / "0.png", "--strength", 0.125)
    assert np.abs(pixels(alone)[0] - pixels(slight)[0]).max() <= 1
    assert json.loads((half / "manifest.json").read_text())["strength"] == 0.5


def test_inpainting_keeps_known_pixels(sample: Sample, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = ("--images", tmp_path / "image.png", "--mask", tmp_path / "mask.png")
    painted = sample("painted", *DDIM, *files)
    again = sample("again", *DDIM, *files, "--draws", 3)
    near = sample("near", *DDIM, *files, "--strength", 0.25)
    for folder in (painted, again, near):
        assert np.abs(pixels(folder)[:, :, :4] - image[:, :4]).max() <= 1
        assert np.abs(pixels(folder)[:, :, 4:] - image[:, 4:]).max() > 10
    assert difference(painted, again) > 1
    assert difference(painted, near) > 1


def test_interpolation_leads_from_one_sample_to_the_other(sample: Sample) -> None:
    solver = ("--sampler", "ddim", "--steps", 8, "--class-label", 3)
    ends = sample("ends", *solver, "--ids", "9,4")
    path = sample("path", *solver, "--interpolate", "4,9", "--count", 5)
    assert np.abs(pixels(path)[[0, -1]] - pixels(ends)).max() <= 1
    assert np.abs(pixels(path)[2] - pixels(ends)).max() > 1


@pytest.mark.slow
def test_compiled_is_eager(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch._inductor")
    eager = sample("eager", *DDIM)
    compiled = sample("compiled", *DDIM, "--compile")
    assert difference(eager, compiled) <= 1
    said = capsys.readouterr().out
    assert "compiling the network for batches of 4" in said
    assert "compiled in" in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--guidance-rescale", 0.5], "--guidance-rescale needs --guidance-scale"),
        (["--guidance-interval", 1, 2], "--guidance-interval needs --guidance-scale"),
        (["--two-passes"], "--two-passes needs --guidance-scale"),
        (["--guidance-scale", 3, "--class-labels", "none"], "the samples are of no class"),
        (["--class-label", 3, "--class-labels", "1,2"], "--class-label and --class-labels"),
        (["--class-labels", "1,x"], "--class-labels is '1,x'"),
        (["--class-labels", "1,11"], "classes are 0 to 9"),
        (["--strength", 0.5], "--strength needs --images"),
        (["--mask", "m.png"], "--mask needs --images"),
        (["--images", "nowhere"], "no --images nowhere"),
        (["--draws", 2], "--draws needs --mask"),
        (["--timesteps", "9,8", "--steps", 2], "--timesteps and --steps"),
        (["--timesteps", "8,9"], "list them downwards"),
        (["--sampler", "ddim", "--variance", "fixed_small"], "--variance does nothing"),
        (["--sampler", "ddpm", "--eta", 0.5], "--eta does nothing"),
        (["--sampler", "heun", "--spacing", "leading"], "--spacing does nothing"),
        (["--sampler", "ddim", "--eta", 2], "--eta is 2"),
        (["--interpolate", "1,2", "--sampler", "ddpm", "--steps", 3], "must add no noise"),
        (["--interpolate", "1,2", "--ids", "3"], "--interpolate and --ids"),
        (["--interpolate", "1", "--sampler", "ddim"], "--interpolate is '1'"),
        (["--interpolate", "1,2", "--sampler", "ddim", "--count", 1], "at least 2 samples"),
        (["--per-shard", 8], "--per-shard needs --format"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--cache-interval", 0], "--cache-interval is 0"),
        (["--threshold", 2], "threshold is 2"),
        (["--precision", "fp16"], "needs a GPU"),
    ],
)
def test_flags_that_do_not_go_together(
    arguments: list[object], expected: str, sample: Sample, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit, match="2"):
        sample("out", *arguments)
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_masks_that_say_nothing(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    with pytest.raises(SystemExit):
        sample("out", "--images", tmp_path / "white.png", "--mask", tmp_path / "white.png")
    assert "white all over" in capsys.readouterr().err


# Shards

SHARDS = ("--sampler", "ddim", "--steps", 2, "--class-labels", "all", "--batch-size", 5)


def test_shards_of_every_kind_hold_the_same_samples(sample: Sample) -> None:
    many = (*SHARDS, "--count", 20, "--per-shard", 8)
    single = sample("single", *SHARDS, "--count", 20)
    tar = sample("tar", *many, "--format", "tar")
    names = ["00000000-00000007.tar", "00000008-00000015.tar", "00000016-00000019.tar"]
    assert sorted(os.listdir(tar / "shards")) == names
    assert (tar / "grid.png").exists()
    found = tar_pixels(tar)
    assert list(found) == list(range(20))
    assert np.abs(np.stack(list(found.values())) - pixels(single)).max() <= 1
    npy = sample("npy", *many, "--format", "tar-npy")
    for path in sorted((npy / "shards").glob("*.tar")):
        for entry in webdataset.WebDataset(str(path), shardshuffle=False).decode():
            k = int(entry["__key__"])
            assert np.array_equal(entry["npy"][..., 0], found[k])
            assert entry["cls"] == k % 10
            assert entry["json"] == {"id": k, "seed": 0, "label": k % 10}
    npz = sample("npz", *many, "--format", "npz")
    with np.load(npz / "shards" / "00000008-00000015.npz", allow_pickle=False) as archive:
        assert archive["ids"].tolist() == list(range(8, 16))
        assert archive["labels"].tolist() == [8, 9, 0, 1, 2, 3, 4, 5]
        assert np.array_equal(archive["images"][3, ..., 0], found[11])


def test_shards_are_training_data(sample: Sample) -> None:
    out = sample("tar", *SHARDS, "--count", 20, "--per-shard", 8, "--format", "tar")
    assert index_shards(out / "shards").samples == 20
    dataset = ShardDataset(out / "shards", 0, 8, 1)
    assert sorted(int(sample.label) for sample in dataset.__getitems__(range(20))) == sorted(
        k % 10 for k in range(20)
    )
    # Indexed or not, it is still the set of samples, and more can be added to it.
    sample("tar", *SHARDS, "--count", 22, "--per-shard", 8, "--format", "tar")
    assert list(tar_pixels(out)) == list(range(22))


def test_a_set_grows_and_refuses_other_settings(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*SHARDS, "--per-shard", 8, "--format", "tar")
    out = sample("out", *common, "--count", 12)
    first = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "shards").iterdir()}
    sample("out", *common, "--count", 30, "--batch-size", 3, "--per-shard", 6)
    for name, (content, mtime) in first.items():
        path = out / "shards" / name
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, mtime)
    assert list(tar_pixels(out)) == list(range(30))
    assert "30 samples" in capsys.readouterr().out
    sample("out", *common, "--count", 30)
    assert "already" in capsys.readouterr().out
    for flag, value in {
        "seed": 1, "threshold": 0.9, "format": "npz", "eta": 0.1, "class-labels": "1,2"
    }.items():  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            sample("out", *common, "--count", 31, f"--{flag}", value)
        name = flag.replace("class-labels", "classes")
        assert f"{name} was" in capsys.readouterr().err
    assert list(tar_pixels(out)) == list(range(30))


def test_a_grid_that_is_missing_is_made(sample: Sample) -> None:
    out = sample("out", *SHARDS, "--count", 6, "--format", "npz")
    before = (out / "grid.png").read_bytes()
    (out / "grid.png").unlink()
    sample("out", *SHARDS, "--count", 6, "--format", "npz")
    assert (out / "grid.png").read_bytes() == before


# Many processes, and sudden ends


def test_ranks_divide_the_samples_and_agree_with_one(
    trained: Path, sample: Sample, tmp_path: Path
) -> None:
    common = (*SHARDS, "--count", 22, "--per-shard", 4, "--format", "tar")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch: list[object] = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--main_process_port", port, SCRIPT, "--checkpoint", trained, "--out", tmp_path / "two",
        *common,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}",
    }
    done = subprocess.run(
        [str(word) for word in launch], env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Whoever ends last says so, once.
    assert done.stdout.count("22 samples in") == 1
    one = sample("one", *common)
    for path in sorted((one / "shards").iterdir()):
        # The batches are the same, whoever samples them: not even rounding differs.
        assert path.read_bytes() == (tmp_path / "two" / "shards" / path.name).read_bytes()
    assert (one / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()
    assert sorted(os.listdir(one / "shards")) == sorted(os.listdir(tmp_path / "two" / "shards"))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["tar", "png"])
def test_killed_ranks_are_followed_by_another_number(
    format: str, trained: Path, sample: Sample, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = ("--sampler", "ddim", "--steps", 40, "--count", 64, "--format", format)
    per_shard = ("--per-shard", 4) if format == "tar" else ()
    folder = out / "shards" if format == "tar" else out
    started = processes(trained, out, *common, "--batch-size", 4, *per_shard, ranks=2)
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob(f"0*.{format}"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        for process in started:
            process.communicate()
    assert all(process.returncode == -signal.SIGKILL for process in started)
    earlier = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob(f"0*.{format}")}
    assert len(earlier) >= 3
    # What a process that is killed while it writes leaves behind.
    half = "00000060-00000063.tar.tmp" if format == "tar" else "00000063.png.tmp"
    (folder / half).write_bytes(b"half")
    sample("out", *common, "--batch-size", 16)
    for path, before in earlier.items():
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not list(out.rglob("*.tmp"))
    whole = sample("whole", *common, "--batch-size", 4, *per_shard)
    if format == "tar":
        found, expected = tar_pixels(out), tar_pixels(whole)
        assert sorted(found) == list(range(64))
        assert max(int(np.abs(found[k] - expected[k]).max()) for k in found) <= 1
    else:
        assert difference(out, whole) <= 1


def test_nobody_waits_for_a_process_that_hangs(
    trained: Path, tmp_path: Path, sample: Sample
) -> None:
    out = tmp_path / "out"
    common = ("--sampler", "ddim", "--steps", 40, "--count", 64, "--format", "tar",
              "--per-shard", 4, "--batch-size", 4)  # fmt: skip
    (hanging,) = processes(trained, out, *common, ranks=1)
    try:
        deadline = time.monotonic() + 120
        while not list(out.rglob("0*.tar")) and time.monotonic() < deadline:
            time.sleep(0.02)
        hanging.send_signal(signal.SIGSTOP)
        sample("out", *common)
        there = set(tar_pixels(out))
        # All but the shard, at most, that the stopped process has claimed.
        assert 60 <= len(there) <= 64
        hanging.send_signal(signal.SIGCONT)
        said, _ = hanging.communicate(timeout=120)
        assert hanging.returncode == 0, said
    finally:
        hanging.kill()
    assert sorted(tar_pixels(out)) == list(range(64))
    assert (out / "grid.png").exists()


# Pieces of it


def test_ids_are_cut_where_shards_end_and_where_one_is_left_out() -> None:
    assert chunks([0, 1, 2, 3, 4, 5, 9], 4, aligned=True) == [[0, 1, 2, 3], [4, 5], [9]]
    assert chunks([2, 3, 4, 5], 4, aligned=True) == [[2, 3], [4, 5]]
    assert chunks([2, 3, 9, 11, 12], 2, aligned=False) == [[2, 3], [9, 11], [12]]


def test_without_locks_there_is_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def black(ids: Any) -> np.ndarray:
        return np.zeros((len(ids), 8, 8, 1), np.uint8)

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    samples = SampleDir(tmp_path / "out", {"seed": 0})
    with pytest.raises(UserError, match="without file locks"):
        fill_missing(samples, range(4), black, share=WorkShare(0, 2))
    assert fill_missing(samples, range(4), black)
    assert samples.ids() == {0, 1, 2, 3}


def test_samples_without_a_manifest_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "00000000.png").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"holds other things \(00000000.png\)"):
        SampleDir(tmp_path, {"seed": 0})
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest of samples"):
        SampleDir(tmp_path, {"seed": 0})
