"""Captions of a folder: beside each image, or in a list as Hugging Face's imagefolder has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.data.sets import PIXELS, contents

from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in two folders."""
    root = tmp_path / "images"
    for number, folder in enumerate(("cats", "cats", "dogs")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(root / folder / f"{number}.png")
    return root


def write_list(path: Path, *entries: Any) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def captions(root: Path) -> list[tuple[str, ...]]:
    return [example.captions for example in open_source(str(root), captions=True).examples]


def test_captions_are_beside_each_image(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "cats" / "0.txt").write_text("a cat\n a black cat \n")
    (images / "cats" / "1.txt").write_bytes("\ufeffeine Katze 🐈\r\n".encode())
    (images / "dogs" / "2.txt").write_text("a dog")
    (images / "README.txt").write_text("hello")
    found = [("a cat", "a black cat"), ("eine Katze 🐈",), ("a dog",)]
    assert captions(images) == found
    assert "README.txt" in caplog.text
    assert "0.txt" not in caplog.text
    plain = open_source(str(images))
    assert [example.captions for example in plain.examples] == [()] * 3
    assert plain.classes == ("cats", "dogs")


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_captions_are_in_a_list(images: Path, name: str) -> None:
    write_list(
        images / name,
        {"file_name": "cats/0.png", "text": "a cat"},
        {"file_name": "cats/0.png", "text": "a black cat", "further": 3},
        {"file_name": "cats/1.png", "text": ["one\nline", "two"]},
        {"file_name": "gone.png", "text": "not there"},
        {"file_name": "dogs/2.png", "objects": []},
    )
    write_list(images / "dogs" / name, {"file_name": "2.png", "caption": "a dog"})
    assert captions(images) == [("a cat", "a black cat"), ("one line", "two"), ("a dog",)]


def test_images_without_captions_are_all_named(images: Path) -> None:
    (images / "cats" / "1.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"2 of 3 images .*0\.txt, .*2\.txt\); add them"):
        open_source(str(images), captions=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty file"), (b"\xff\xfe", "not UTF-8"), (b"a\0", "NUL"), (b"x" * 2**21, "2097153?")],
)
def test_damaged_captions_are_named(images: Path, content: bytes, message: str) -> None:
    for name in ("cats/0", "cats/1", "dogs/2"):
        (images / f"{name}.txt").write_bytes(b"fine")
    (images / "cats" / "1.txt").write_bytes(content)
    opened = open_source(str(images), captions=True)
    expected = message if message != "2097153?" else "more than 1048576"
    with pytest.raises(UserError, match=rf"1\.png: captions: in 1\.txt, .*{expected}"):
        write_shards(opened, images.parent / "set")


@pytest.mark.parametrize(
    "line",
    ["{", "3", '{"text": "x"}', '{"file_name": "0.png", "text": 3}', "[" * 100_000, b"\xff"],
)
def test_lines_that_are_no_captions_are_named(images: Path, line: str | bytes) -> None:
    path = images / "captions.jsonl"
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"file_name": "cats/0.png", "text": "a"}\n' + content)
    with pytest.raises(UserError, match=r"line 2 of .*captions\.jsonl cannot be used"):
        open_source(str(images), captions=True)


def test_changed_captions_are_another_revision(images: Path) -> None:
    path = images / "captions.jsonl"
    names = ("cats/0.png", "cats/1.png", "dogs/2.png")
    write_list(path, *({"file_name": name, "text": "a"} for name in names))
    before = open_source(str(images), captions=True).revision
    assert before == open_source(str(images), captions=True).revision
    write_list(path, *({"file_name": name, "text": "an"} for name in names))
    assert open_source(str(images), captions=True).revision != before
    assert open_source(str(images)).revision != before


def test_a_source_without_captions_is_refused() -> None:
    with pytest.raises(UserError, match="digits has no captions"):
        open_source("digits", captions=True)


def test_a_hugging_face_data_set_has_a_column_of_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [Image.fromarray(image) for image in PIXELS[:3]]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "captions": datasets.Sequence(datasets.Value("string")),
        }
    )
    captions: list[list[str]] = [["x"], ["y", "z"], ["a\nb"]]
    table = {"image": rows, "label": [0, 1, 0], "captions": captions}
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "saved")
    name = f"hf:{tmp_path / 'saved'}"
    source = open_source(name, captions=True)
    assert [example.captions for example in source.examples] == [("x",), ("y", "z"), ("a b",)]
    assert [example.label for example in source.examples] == [0, 1, 0]
    assert not open_source(name).examples[0].captions
    captions[1] = []
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "empty")
    with pytest.raises(UserError, match=r"1 of hf:.*captions"):
        write_shards(open_source(f"hf:{tmp_path / 'empty'}", captions=True), tmp_path / "set")


def test_images_are_cut_to_a_height_and_a_width(tmp_path: Path) -> None:
    for processes in (1, 2):
        source = open_source("digits")
        out = tmp_path / str(processes)
        manifest = write_shards(source, out, (4, 8), per_shard=600, processes=processes)
        assert (manifest.height, manifest.width) == (4, 8)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    with pytest.raises(UserError, match="`size` is 0"):
        write_shards(source, tmp_path / "none", (4, 0))
