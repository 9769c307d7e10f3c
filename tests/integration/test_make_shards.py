"""The command as a user runs it: what `tests/data` covers of packing is not repeated here."""

from __future__ import annotations

import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.autoencoders import kl_folder
from tests.data.captioned import MeanEmbedder, WordEncoder
from tests.data.sets import PIXELS, contents, flip

from ddpm_engine.cli import make_shards
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.images.codec import encode

SCRIPT = Path(__file__).parents[2] / "launch" / "make_shards.py"


class Result:
    """Exit status and output of a command."""

    def __init__(self, status: object, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


class Terminal:
    """Runs the script in this process: importing torch takes seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str | Path | int) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return Result(exit_.value.code, *self._capsys.readouterr())

    def refused(self, *arguments: str | Path | int) -> str:
        """Run a command with an error in its input: one line, no traceback, status 2."""
        result = self(*arguments)
        assert result.status == 2
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        return result.err


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, image in enumerate(PIXELS[:6]):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "png"))
    return folder


def start(*arguments: str | Path, limit: int | None = None) -> subprocess.Popen[str]:
    """Run the script in a process of its own, which cannot write files longer than `limit`."""

    def limit_file_size() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=limit_file_size,
    )


def test_pack_verify_and_pack_the_same_again(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    result = script(images, "--out", tmp_path / "one", "--per-shard", "4")
    manifest = open_shards(tmp_path / "one").manifest
    assert result.status == 0
    assert result.err == ""
    assert result.out == (
        "classes: 0 class0, 1 class1\n"
        f"6 samples in 2 shards, {manifest.bytes} bytes, fingerprint {manifest.fingerprint}, "
        f"in {tmp_path / 'one'}\n"
    )
    assert manifest.classes == ("class0", "class1")
    assert script("verify", tmp_path / "one").out.endswith("sound\n")
    script(images, "--out", tmp_path / "two", "--per-shard", "4")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_every_option_is_used(script: Terminal, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    options = ("--size", "4", "--channels", "1", "--format", "npy", "--processes", "1")
    assert script(images, "--out", out, *options).status == 0
    manifest = open_shards(out).manifest
    assert (manifest.height, manifest.width, manifest.channels) == (4, 4, 1)
    assert set(open_shards(out).indexes[0]["extension"]) == {b"npy"}


def test_height_and_width_are_given_together(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    assert script(images, "--out", tmp_path / "set", "--size", 4, 8).status == 0
    manifest = open_shards(tmp_path / "set").manifest
    assert (manifest.height, manifest.width) == (4, 8)
    assert "--size" in script(images, "--out", tmp_path / "none", "--size", 4, 0).err


def test_captions_and_embeddings_are_packed_and_reported(
    script: Terminal, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_shards, "open_text_encoder", lambda place: WordEncoder(int(place)))
    monkeypatch.setattr(make_shards, "image_embedder", lambda name, size: MeanEmbedder())
    out, packed = tmp_path / "set", tmp_path / "packed"
    assert "6 of 6 images" in script.refused(images, "--out", out, "--captions")
    for image in images.rglob("*.png"):
        image.with_suffix(".txt").write_text(f"image {image.stem}")
    result = script(images, "--out", out, "--captions")
    assert result.status == 0
    assert "captions without embeddings\n" in result.out
    assert script("verify", out).status == 0
    options = ("--text-encoder", "5", "--image-features", "digits", "--processes", "1")
    result = script(images, "--out", packed, *options)
    assert "captions embedded by words of 5 channels: 5 channels, the longest of 2" in result.out
    assert "images embedded by means: 4 channels" in result.out
    assert script("verify", packed).status == 0
    assert "no captions" in script.refused("digits", "--out", tmp_path / "none", "--captions")


def test_latents_are_packed_and_reported(script: Terminal, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    place, out = kl_folder(tmp_path / "vae"), tmp_path / "set"
    options = (images, "--out", out, "--autoencoder", place, "--processes", "1")
    assert "--channels is 1, but" in script.refused(*options, "--channels", "1")
    assert "multiples of 4" in script.refused(*options, "--size", "6")
    assert "without an autoencoder" in script.refused(images, "--out", out, "--flips")
    if not torch.cuda.is_available():
        assert "no GPU is found" in script.refused(*options, "--device", "cuda")
    result = script(*options, "--flips")
    assert result.status == 0
    latents = f"latents by {place}: 4 channels of 2×2, of images of 8×8 and mirrored ones"
    assert latents in result.out
    assert script("verify", out).status == 0


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("size", [8193, 100_000, 1 << 63])
def test_sizes_beyond_what_can_be_read_again_are_refused(
    script: Terminal, tmp_path: Path, size: int, processes: str
) -> None:
    np.savez(tmp_path / "few.npz", images=PIXELS[:2])
    options = ("--per-shard", "1", "--processes", processes, "--size", size)
    error = script.refused(tmp_path / "few.npz", "--out", tmp_path / "set", *options)
    assert f"--size is {size}" in error
    assert not (tmp_path / "set").exists()


def test_more_processes_than_shards_and_more_images_than_a_shard_holds_are_no_harm(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    assert script(images, "--out", out, "--per-shard", 1 << 62, "--processes", 1024).status == 0
    assert open_shards(out).manifest.samples == 6


def test_a_set_inside_the_folder_of_its_images(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    out = images / "shards"
    first = script(images, "--out", out)
    assert first.status == 0
    assert "finished set" in script.refused(images, "--out", out)
    (out / "manifest.json").unlink()
    for path in out.iterdir():
        path.unlink()
    assert script(images, "--out", out).out == first.out


def test_all_damaged_images_are_named_in_one_line(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    for name in ("class0/0.png", "class1/1.png"):
        (images / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    error = script.refused(images, "--out", tmp_path / "set", "--per-shard", "1")
    assert "cannot read 2 images" in error
    assert "class0/0.png" in error
    assert "class1/1.png" in error


def test_errors_name_files_and_flags(script: Terminal, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert str(tmp_path / "nowhere") in script.refused(tmp_path / "nowhere", "--out", out)
    stray = images / "class0" / "old.gif"
    stray.write_bytes(b"GIF89a")
    assert f"{stray} is not an image" in script.refused(images, "--out", out)
    stray.unlink()
    assert not out.exists()
    (images / "class1" / "z.png").write_bytes(encode(PIXELS[0][:, :4], "png"))
    assert "'class1/z' is 8×4; give --size" in script.refused(images, "--out", out)
    (images / "class1" / "z.png").write_bytes(encode(PIXELS[0][..., :1], "png"))
    assert "'class1/z' has 1; give --channels" in script.refused(images, "--out", out)
    # Whatever was refused, the corrected command works.
    assert script(images, "--out", out, "--channels", "3").status == 0
    thesis = tmp_path / "used" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for place in (thesis.parent, thesis, thesis / "set"):
        assert str(place) in script.refused(images, "--out", place)
    assert contents(thesis.parent) == {"thesis.tex": b"years of work"}


def test_unknown_flags_and_missing_arguments_are_explained(script: Terminal, images: Path) -> None:
    for arguments, named in (
        ((images, "--out", "set", "--sise", "4"), "--sise"),
        ((images,), "--out"),
    ):
        result = script(*arguments)
        assert result.status == 2
        assert named in result.out + result.err
    assert script("--help").status == 0


def test_index_and_verify_name_what_is_wrong(
    script: Terminal, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    script(images, "--out", out)
    entry = open_shards(out).indexes[0][4]
    flip(out / "shard-000000.tar", int(entry["offset"]) + 30)
    result = script("verify", out)
    assert result.status == 1
    name = entry["key"].decode()
    assert f"shard-000000.tar: sample '{name}': checksum differs" in result.out
    assert "indexed already" in script.refused("index", out)
    assert str(tmp_path / "nowhere") in script.refused("verify", tmp_path / "nowhere")
    for path in (out / "manifest.json", out / "shard-000000.index.npy"):
        path.unlink()
    assert "6 samples in 1 shards" in script("index", out).out


def test_a_full_disk_leaves_nothing_half_written(script: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = start("digits", "--out", out, "--per-shard", "900", limit=200_000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    # Two shards, packed side by side: either may be the first that does not fit.
    assert re.match(f"error: cannot use {out}/shard-00000[01].tar: File too large", err)
    assert "Traceback" not in err
    assert sorted(contents(out)) == [".packing"]
    assert script("digits", "--out", out).status == 0


@pytest.mark.parametrize("latents", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_is_simply_run_again(latents: bool, script: Terminal, tmp_path: Path) -> None:
    out, options = tmp_path / "set", ["--per-shard", "20"]
    if latents:
        place = kl_folder(tmp_path / "vae", in_channels=1, out_channels=1)
        options += ["--autoencoder", place, "--flips"]
    process = start("digits", "--out", out, *options)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.tar"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert ".packing" in contents(out)
    assert "manifest.json" not in contents(out)
    assert "unfinished" in script.refused("index", out)
    assert script("digits", "--out", out, *options).status == 0
    script("digits", "--out", tmp_path / "fresh", *options, "--processes", "1")
    assert contents(out) == contents(tmp_path / "fresh")
