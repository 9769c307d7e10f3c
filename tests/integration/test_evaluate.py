"""Evaluation as people start it: alone, by several processes, killed and gone on with."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.config import LogConfig, OptimizerConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.evaluation.feature_networks import feature_network
from ddpm_engine.evaluation.features_store import open_real_features
from ddpm_engine.evaluation.fid import frechet_distance, moments
from ddpm_engine.evaluation.inception import InceptionNetwork
from ddpm_engine.evaluation.sources import RealImages
from ddpm_engine.generation.sample_formats import TarShards
from ddpm_engine.images.codec import encode
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.networks.unet.config import UNetConfig
from ddpm_engine.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "evaluate.py"
Evaluate = Callable[..., dict[str, Any]]

METRICS = "fid,kid,is,precision-recall,accuracy"
ASKED = (
    "--metrics", METRICS, "--features", "digits", "--count", 60, "--piece", 16,
    "--sampler", "ddim", "--steps", 6, "--batch-size", 8,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional network, trained just enough that its output is not zero."""
    config = RunConfig(
        out=tmp_path_factory.mktemp("trained") / "run",
        data=DataConfig(path=shards, workers=0),
        diffusion=DiffusionConfig(timesteps=40),
        model=UNetConfig(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            num_class_embeds=11,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        training=TrainingConfig(steps=40, batch_size=16, ema_decay=0.9),
        log=LogConfig(
            every=50, checkpoint_every=50, sample_every=0, sample_steps=10, tracker="none"
        ),
    )
    Trainer(config).fit()
    return config.out


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests here, as by all evaluations of a person."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluate(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Run the script in this process: `evaluate("name", *arguments)` → its report."""

    def start(name: str, *arguments: object) -> dict[str, Any]:
        out = tmp_path / name
        line = [SCRIPT, "--out", out, "--cache", cache, *arguments]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return report(out)

    return start


def report(out: Path) -> dict[str, Any]:
    (path,) = out.rglob("result-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def same_figures(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of the same samples in other batches, up to rounding."""
    for name, figures in found["metrics"].items():
        for key, value in figures.items():
            known = expected["metrics"][name][key]
            if key != "reference_sha256":
                assert known == pytest.approx(value, rel=1e-9)


def processes(trained: Path, out: Path, cache: Path, ranks: int) -> list[Any]:
    """Start the script as the ranks of one run, without a launcher."""
    line = [
        sys.executable, SCRIPT, "--checkpoint", trained, "--out", out, "--cache", cache, *ASKED,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
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


def test_the_figures_are_those_of_the_samples(
    trained: Path, shards: Path, cache: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    found = evaluate("out", "--checkpoint", trained, *ASKED)
    # The same by hand, from the files that are left.
    files = TarShards(tmp_path / "out" / "pictures" / "shards", "png")
    found_by_id: dict[int, np.ndarray] = {}
    for path in sorted(files.folder.iterdir()):
        found_by_id.update(files.read(path))
    assert sorted(found_by_id) == list(range(60))
    samples = np.stack([found_by_id[k] for k in range(60)])
    real = RealImages(open_shards(shards), (8, 8, 1)).read(range(100))
    classifier = digit_classifier(8, cache)
    metrics = found["metrics"]
    assert list(metrics) == METRICS.split(",")
    distance = frechet_distance(
        moments([classifier.features(samples)]), moments([classifier.features(real)])
    )
    assert metrics["fid"]["distance"] == pytest.approx(distance, rel=1e-6)
    # Classes come in turn, as they do where nothing is said of a class-conditional network.
    right = classifier.classify(samples) == np.arange(60) % 10
    assert metrics["accuracy"]["share"] == right.mean()
    assert metrics["kid"]["blocks"] == 10
    assert metrics["precision-recall"]["count"] == 60
    # Everything that is needed to measure it again.
    assert found["pictures"]["count"] == 60
    assert found["pictures"]["sampler"] == "ddim"
    assert found["pictures"]["steps"] == 6
    assert found["pictures"]["checkpoint_step"] == 40
    assert found["pictures"]["weights"] == "ema"
    assert found["pictures"]["ema_decay"] == 0.9
    assert found["reference"]["fingerprint"] == open_shards(shards).manifest.fingerprint
    assert found["features"]["hash"] == classifier.hash
    assert "torch" in found["versions"]
    (table,) = (tmp_path / "out").glob("result-*.md")
    heads, _, values = table.read_text().splitlines()
    assert heads.count("|") == values.count("|")
    assert "ddim, 6 steps, seed 0" in values
    assert "EMA 0.9" in values
    assert (tmp_path / "out" / "pictures" / "grid.png").exists()


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed_and_report_the_same_bytes(
    trained: Path, cache: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    evaluate("whole", "--checkpoint", trained, *ASKED)
    (expected,) = (tmp_path / "whole").glob("result-*.json")
    # A cache of their own, with features of the real images missing.
    own = tmp_path / "cache"
    own.mkdir()
    for kept in cache.glob("digits-*.npz"):
        shutil.copy(kept, own)
    out = tmp_path / "out"
    (process,) = processes(trained, out, own, ranks=1)
    deadline = time.monotonic() + 120
    while not list(out.rglob("0*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    earlier = {path: path.stat().st_mtime_ns for path in out.rglob("0*.*")}
    assert earlier
    started = processes(trained, out, own, ranks=2)
    said = "".join(process.communicate(timeout=240)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert "| Fréchet distance |" in said
    assert (out / expected.name).read_bytes() == expected.read_bytes()
    # What the killed process had finished was kept.
    assert all(path.stat().st_mtime_ns == before for path, before in earlier.items())


def test_a_folder_of_images_has_the_figures_of_the_samples(
    trained: Path, shards: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    samples = evaluate("samples", "--checkpoint", trained, *ASKED)
    folder = ("--data", shards, "--metrics", METRICS, "--features", "digits")
    # As launch/sample.py leaves them, and as files of any name.
    again = evaluate("again", "--samples", tmp_path / "samples" / "pictures", *folder)
    same_figures(again, samples)
    assert again["pictures"]["sampler"] == "ddim"
    plain = tmp_path / "plain"
    plain.mkdir()
    files = TarShards(tmp_path / "samples" / "pictures" / "shards", "png")
    for path in files.folder.iterdir():
        for k, image in files.read(path).items():
            (plain / f"image-{k:03d}.png").write_bytes(encode(image, "png"))
    folder = ("--data", shards, "--metrics", "fid,kid", "--features", "digits")
    bare = evaluate("bare", "--samples", plain, *folder)
    same_figures(bare, samples)
    # A set of shards is a folder of images, too: of itself at no distance.
    real = evaluate("real", "--samples", shards, *folder)
    assert real["metrics"]["fid"]["distance"] == pytest.approx(0, abs=1e-9)
    assert real["pictures"]["count"] == 100
    # Some of them, and another measure of the same, which joins what is known.
    evaluate("some", "--samples", plain, *folder, "--count", 40, "--metrics", "fid")
    some = evaluate("some", "--samples", plain, *folder, "--count", 40, "--metrics", "is")
    assert list(some["metrics"]) == ["fid", "is"]
    assert some["metrics"]["fid"]["distance"] != bare["metrics"]["fid"]["distance"]


def test_real_images_are_looked_at_once(
    trained: Path, shards: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    asked = (*ASKED, "--checkpoint", trained, "--data", moved, "--metrics", "fid")
    whole = evaluate("whole", *asked)
    part = evaluate("part", *asked, "--reference-count", 50)
    assert (part["reference"]["count"], part["reference"]["of"]) == (50, 100)
    assert part["metrics"]["fid"] != whole["metrics"]["fid"]
    # Their features are known by the fingerprint of the data: the shards themselves are not read.
    for shard in moved.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    again = evaluate("again", *asked)
    assert again["metrics"] == whole["metrics"]


def test_a_damaged_real_image_stops_it(
    trained: Path, shards: Path, evaluate: Evaluate, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    shard = damaged / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[int(open_shards(shards).indexes[1][5]["offset"]) + 40] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        evaluate(
            "out", *ASKED, "--checkpoint", trained, "--data", damaged, "--cache", tmp_path / "new"
        )
    said = capsys.readouterr().err
    assert "checksum differs" in said
    assert "verify the set" in said


def test_real_images_that_another_evaluation_is_at_are_waited_for(
    trained: Path, shards: Path, cache: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    own = tmp_path / "cache"
    real = RealImages(open_shards(shards), (8, 8, 1))
    network = feature_network("digits", 8, cache=cache)
    claimed, tell = os.pipe()
    other = os.fork()
    if other == 0:
        # It claims the first piece, and ends a second later without having done anything.
        with open_real_features(own, real, network).reserve(range(16)):
            os.write(tell, b".")
            time.sleep(1)
            os._exit(0)
    os.read(claimed, 1)
    for kept in cache.glob("digits-*.npz"):
        shutil.copy(kept, own)
    evaluate("out", "--checkpoint", trained, *ASKED, "--metrics", "fid", "--cache", own)
    assert os.waitpid(other, 0)[1] == 0
    assert open_real_features(own, real, network).ids() == set(range(100))


def test_colour_images_by_inceptions_features(evaluate: Evaluate, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("real", "samples"):
        (tmp_path / folder).mkdir()
        for k in range(4):
            image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            (tmp_path / folder / f"{k}.png").write_bytes(encode(image, "png"))
    write_shards(open_source(str(tmp_path / "real")), tmp_path / "shards")
    torch.manual_seed(0)
    torch.save(InceptionNetwork().state_dict(), tmp_path / "weights.pth")
    asked = (
        "--data", tmp_path / "shards", "--inception-weights", tmp_path / "weights.pth",
        "--metrics", "precision-recall",
    )  # fmt: skip
    found = evaluate("out", "--samples", tmp_path / "samples", *asked)
    assert found["features"]["name"] == "inception"
    assert found["features"]["hash"] == sha256_of(tmp_path / "weights.pth")
    assert found["metrics"]["precision-recall"]["count"] == 4
    assert found["pictures"]["shape"] == [12, 12, 3]


def test_the_bound_of_real_images(
    trained: Path, shards: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    asked = ("--checkpoint", trained, "--metrics", "nll", "--count", 6, "--batch-size", 3)
    found = evaluate("out", *asked)["metrics"]["nll"]
    (folder,) = (tmp_path / "out").iterdir()
    # By hand, the whole batch at once.
    pretrained = load_model(trained)
    real = RealImages(open_shards(shards), (8, 8, 1), 6)
    ids = real.index_in_set(range(6))
    assert ids.tolist() == [0, 16, 33, 50, 66, 83]
    terms = bits_per_dim(
        pretrained.network,
        pretrained.schedule,
        torch.from_numpy(real.read(range(6))).permute(0, 3, 1, 2),
        torch.from_numpy(ids),
        variance="fixed_large",
        conditioning=Conditioning(torch.tensor([real.label_of(k) for k in range(6)])),
    )
    assert found["bits_per_dim"] == pytest.approx(float(terms.sum(1).mean()), rel=1e-6)
    assert found["images"] == 6
    parts = found["decoder"] + found["denoising"] + found["prior"]
    assert parts == pytest.approx(found["bits_per_dim"])
    rows = (folder / "terms.csv").read_text().splitlines()
    assert len(rows) == 1 + 41
    assert float(rows[1].split(",")[2]) == pytest.approx(found["decoder"], rel=1e-8)
    assert (folder / "terms.png").exists()
    # What a killed process had not finished is all that is done again, to the same bytes.
    (path,) = folder.glob("result-*.json")
    first, last = sorted((folder / "shards").iterdir())
    before, kept = path.read_bytes(), first.stat().st_mtime_ns
    path.unlink()
    last.unlink()
    evaluate("out", *asked)
    assert path.read_bytes() == before
    assert first.stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "either --checkpoint"),
        (["--checkpoint", "{run}", "--samples", "x"], "either --checkpoint"),
        (["--samples", "nowhere", "--data", "{data}"], "no folder --samples nowhere"),
        (["--samples", ".", "--data", "{data}"], "holds no images"),
        (["--samples", "x", "--seed", 3], "exist already"),
        (["--samples", "x", "--metrics", "nll"], "nll is a metric of a network"),
        (["--checkpoint", "{run}", "--metrics", "fid,lpips"], "'lpips'; there are fid, kid"),
        (["--checkpoint", "{run}", "--metrics", "accuracy"], "accuracy needs --features digits"),
        (["--checkpoint", "{run}", "--count", 0], "--count is 0"),
        (["--checkpoint", "{run}", "--data", "x-{000..009}.tar"], "is a stream"),
        (["--checkpoint", "{run}", "--data", "nowhere"], "no folder of shards at nowhere"),
        (["--checkpoint", "{run}", "--inception-weights", "nowhere"], "weights nowhere"),
        (["--checkpoint", "{run}", "--metrics", "nll", "--variance", "learned_range"],
         "network has 1 outputs"),
        (["--checkpoint", "{run}", "--guidance-interval", 1, 2], "needs --guidance-scale"),
        (["--checkpoint", "{run}", "--class-labels", "1,x"], "--class-labels is '1,x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(
    arguments: list[object], expected: str, trained: Path, shards: Path, evaluate: Evaluate,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [
        str(w).replace("{run}", str(trained)).replace("{data}", str(shards)) for w in arguments
    ]
    with pytest.raises(SystemExit, match="2"):
        evaluate("out", *words)
    assert expected in " ".join(capsys.readouterr().err.split())
