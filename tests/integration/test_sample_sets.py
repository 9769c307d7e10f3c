"""Sets of samples as people treat them: grown, moved into, damaged, and measured all the same."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_engine import threads
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation import run as evaluation
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.evaluation.feature_networks import DigitFeatures
from ddpm_engine.evaluation.features_store import FeatureStore
from ddpm_engine.evaluation.run import evaluate
from ddpm_engine.evaluation.sources import RealImages, folder_source
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import Format, ids_in
from ddpm_engine.generation.sample_reader import open_images
from ddpm_engine.generation.work_sharing import RangeChunks, chunks, fill_missing

SCRIPT = Path(__file__).parents[2] / "launch" / "evaluate.py"
FORMATS: tuple[Format, ...] = ("png", "tar", "tar-npy", "npz")
Evaluate = Callable[..., str]


def make_set(folder: Path, count: int, format: Format = "png") -> Path:
    """Noise as samples, in shards of 10."""

    def noise(ids: object) -> np.ndarray:
        numbers = list(ids)  # type: ignore[call-overload]
        shape = (8, 8, 1)
        return np.stack(
            [np.random.default_rng(k).integers(0, 256, shape, np.uint8) for k in numbers]
        )

    fill_missing(SampleDir(folder, {"seed": 0}, format), range(count), noise, chunk_size=10)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of real features and of the classifier, shared by all tests here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluated(
    shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Evaluate:  # fmt: skip
    """Run the script on a set: what it said, and `status` left with."""

    def start(samples: str | Path, *arguments: object, status: int = 0) -> str:
        line = [
            SCRIPT, "--samples", samples, "--data", shards, "--features", "digits", "--cache",
            cache, "--metrics", "fid", *arguments,
        ]  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            try:
                runpy.run_path(str(SCRIPT), run_name="__main__")
                left: object = 0
            except SystemExit as ended:
                left = ended.code
        output = capsys.readouterr()
        assert left == status, output.err
        assert status == 0 or output.err.count("\n") == 1
        return output.err if status else output.out

    return start


def counts(out: Path) -> list[int]:
    reports = out.glob("result-*.json")
    return sorted(json.loads(report.read_text())["pictures"]["count"] for report in reports)


@pytest.mark.parametrize("given", [False, True])
def test_a_set_that_has_grown_is_evaluated_anew(
    given: bool, evaluated: Evaluate, tmp_path: Path
) -> None:
    samples, out = make_set(tmp_path / "set", 12), tmp_path / "set-evaluation"
    arguments = ("--out", out) if given else ()
    first = evaluated(samples, *arguments)
    make_set(samples, 15)
    second = evaluated(samples, *arguments)
    assert counts(out) == [12, 15]
    assert first != second
    assert evaluated(samples, *arguments) == second


@pytest.mark.parametrize("name", [".", "..", "../set", "./", "inner/.."])
def test_a_folder_without_a_name_of_its_own(
    name: str, evaluated: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_set(tmp_path / "set", 12)
    (samples / "inner").mkdir()
    monkeypatch.chdir(samples / "inner" if name == ".." else samples)
    evaluated(name)
    assert counts(tmp_path / "set-evaluation") == [12]
    assert sorted(os.listdir(tmp_path)) == ["set", "set-evaluation"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "exchanged"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_is_named(
    format: Format, damage: str, evaluated: Evaluate, tmp_path: Path
) -> None:
    samples = make_set(tmp_path / "set", 30, format)
    folder = samples if format == "png" else samples / "shards"
    files = sorted(path for path in folder.iterdir() if ids_in(path.name))
    content = bytearray(files[1].read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        third = len(content) // 3
        content[third : third + 60] = bytes(byte ^ 0x5A for byte in content[third : third + 60])
    elif damage == "empty":
        content.clear()
    elif format == "png":
        content = bytearray(b"not an image")
    else:  # a sound file of other samples
        content = bytearray(files[0].read_bytes())
    files[1].write_bytes(content)
    said = evaluated(samples, status=2)
    assert str(files[1]) in said
    assert "repair or move it" in said


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfe\x00not text", "is not JSON"),
        (b"[" * 100_000, "levels"),
        (b'{"format": 5}', "its format is 5"),
        (b'{"format": "features"}', "its format is 'features'"),
        (b'{"format": "png", "classes": 3}', "its classes are no numbers"),
        (b'{"format": "png", "classes": ["a"]}', "its classes are no numbers"),
        (b'{"shards": 3}', "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_meant(
    content: bytes, named: str, evaluated: Evaluate, tmp_path: Path
) -> None:
    samples = make_set(tmp_path / "set", 12)
    (samples / "manifest.json").write_bytes(content)
    said = evaluated(samples, status=2)
    assert f"{samples / 'manifest.json'}" in said
    assert named in said
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"3", b'"text"', b'{"name": "app"}'])
def test_a_manifest_of_something_else_among_images(
    content: bytes, evaluated: Evaluate, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        Image.new("L", (8, 8), 20 * number).save(folder / f"{number}.png")
    (folder / "manifest.json").write_bytes(content)
    evaluated(folder)
    assert counts(tmp_path / "images-evaluation") == [12]


def test_a_manifest_in_utf_16(evaluated: Evaluate, tmp_path: Path) -> None:
    samples = make_set(tmp_path / "set", 12)
    text = (samples / "manifest.json").read_text()
    (samples / "manifest.json").write_bytes(text.encode("utf-16"))
    evaluated(samples)
    assert len(open_images(samples).ids()) == 12
    make_set(samples, 13)


def test_names_that_stand_for_more_samples_than_a_file_holds(tmp_path: Path) -> None:
    samples = make_set(tmp_path / "set", 12, "npz")
    (samples / "shards" / "00000000-99999999999999999.npz").write_bytes(b"")
    assert open_images(samples).ids() == set(range(12))


# --- Metrics that fail


def test_the_other_metrics_are_reported_if_one_fails(
    shards: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_set(tmp_path / "set", 30)
    whole = evaluation.compute_one

    def fails(metric: str, *arguments: object) -> dict[str, object]:
        if metric == "kid":
            raise MemoryError("out of memory")
        return whole(metric, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "compute_one", fails)
    network = DigitFeatures(digit_classifier(8, cache))
    real = RealImages(open_shards(shards), (8, 8, 1))
    with pytest.raises(UserError, match="kid: out of memory; the other metrics are in") as failed:
        evaluate(
            folder_source(samples), real, network, ["fid", "kid", "is"], tmp_path / "out",
            cache,
        )  # fmt: skip
    (report,) = (tmp_path / "out").glob("result-*.json")
    assert str(report) in str(failed.value)
    assert list(json.loads(report.read_text())["metrics"]) == ["fid", "is"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(
    value: float, shards: Path, cache: Path, tmp_path: Path
) -> None:
    class Diverges(DigitFeatures):
        def __call__(self, images: np.ndarray) -> np.ndarray:
            found = np.array(super().__call__(images))
            found[images[:, 0, 0, 0] > 200, 5] = value
            return found

    samples = make_set(tmp_path / "set", 30)
    real = RealImages(open_shards(shards), (8, 8, 1))
    network = Diverges(digit_classifier(8, cache))
    with pytest.raises(UserError, match=r"features of image \d+ in .* are not finite"):
        evaluate(folder_source(samples), real, network, ["is"], tmp_path / "out", cache)
    assert not list((tmp_path / "out").glob("result-*"))


def test_damaged_features_are_named(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features", {"of": "something"})
    with store.reserve(range(5)):
        store.write(range(5), np.zeros((5, 3)))
    (file,) = store.folder.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=f"cannot read {file}: .*; remove it"):
        store.read(range(5))


# --- Any number of ids


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("start", "stop", "size"), [(0, 10, 4), (3, 11, 4), (4, 8, 4), (5, 5, 4)])
def test_chunks_of_a_range_are_those_of_its_list(
    start: int, stop: int, size: int, aligned: bool
) -> None:
    lazily = chunks(range(start, stop), size, aligned)
    assert isinstance(lazily, RangeChunks)
    assert [list(piece) for piece in lazily] == chunks(list(range(start, stop)), size, aligned)


def test_chunks_of_all_ids_take_no_memory() -> None:
    lazily = chunks(range(2**56), 64, aligned=True)
    assert len(lazily) == 2**50
    assert lazily[2**50 - 1] == range(2**56 - 64, 2**56)


def test_real_images_keep_their_order_whichever_thread_is_first(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RealImages(open_shards(shards), (8, 8, 1))
    alone = [real.read([k])[0] for k in range(6)]
    decoded, begun = RealImages._decoded, []

    def slow_at_first(self: RealImages, sample: Any) -> Any:
        begun.append(sample[0])
        time.sleep(0.02 if sample[0] == 0 else 0)
        return decoded(self, sample)

    monkeypatch.setattr(RealImages, "_decoded", slow_at_first)
    monkeypatch.setattr(threads, "threads_to_use", lambda: 3)
    assert np.array_equal(real.read(range(6)), alone)
    assert sorted(begun) == list(range(6))
