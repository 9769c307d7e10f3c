"""Folders of images as people have them: every reader takes the same files for images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.sets import PIXELS, contents

from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import prepare_shards, write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.sources import folder_source
from ddpm_engine.generation.input_images import InputImages, open_low_resolution
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_formats import Format
from ddpm_engine.images.codec import encode

SHAPE = (3, 8, 8)
Read = Callable[[Path, int], np.ndarray]


def packed(folder: Path, count: int) -> np.ndarray:
    source = open_source(str(folder))
    write_shards(source, folder.with_name(f"{folder.name}-packed"))
    assert len(source.examples) == count
    return np.stack([example.image for example in source.examples])


def pixels(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def begun_with(folder: Path, count: int) -> np.ndarray:
    images = InputImages(folder, SHAPE)
    assert torch.equal(images.of([count]), images.of([0])), "again from the first after the last"
    return pixels(images.of(range(count)))


def upscaled(folder: Path, count: int) -> np.ndarray:
    return pixels(open_low_resolution(folder, SHAPE).of(range(count)))


def evaluated(folder: Path, count: int) -> np.ndarray:
    source = folder_source(folder)
    assert len(source.ids) == count
    return source.images.read(source.ids)


READERS = {read.__name__: read for read in (packed, begun_with, upscaled, evaluated)}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Read:
    return READERS[request.param]


def save(path: Path, image: np.ndarray, extension: str = "png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(image, extension))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images, whose names sort in the order of `PIXELS`."""
    for number, name in enumerate(("0.png", "1.PNG", "10.Webp", "2.png")):
        extension = "webp" if name.endswith("Webp") else "png"
        save(tmp_path / "images" / name, PIXELS[number], extension)
    return tmp_path / "images"


@pytest.fixture(params=["png", "tar", "tar-npy", "npz"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Samples of ids 2, 5 and 100000000, with everything that generating leaves beside them."""
    store = SampleDir(tmp_path / "drawn", {"seed": 0}, request.param)
    for number, sample_id in enumerate((2, 5, 100_000_000)):
        store.write([sample_id], PIXELS[number][None])
    store.finish([2, 5])
    return tmp_path / "drawn"


HIDDEN = (
    ".DS_Store", "._0.png", "._2.png", ".hidden.png", "Thumbs.db", "desktop.ini", "ehthumbs.db",
    ".directory/x.png", "__MACOSX/._0.png", ".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png",
)  # fmt: skip


def test_hidden_files_and_companions_are_no_images(images: Path, read: Read) -> None:
    for name in HIDDEN:
        path = images / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    assert np.array_equal(read(images, 4), PIXELS[:4])


def test_hidden_files_in_and_among_class_folders_change_no_byte(
    images: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        save(tmp_path / "classes" / name / "0.png", PIXELS[0])
    write_shards(open_source(str(tmp_path / "classes")), tmp_path / "before")
    for name in HIDDEN:
        for parent in ("", "a", "b"):
            path = tmp_path / "classes" / parent / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (tmp_path / "after").mkdir()
    (tmp_path / "after" / ".DS_Store").touch()
    write_shards(open_source(str(tmp_path / "classes")), tmp_path / "after")
    after = contents(tmp_path / "after")
    assert after.pop(".DS_Store") == b""
    assert after == contents(tmp_path / "before")


def test_a_folder_of_nothing_but_hidden_files_is_empty(tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        for folder in ("drawn", "set"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).touch()
    save(tmp_path / "images" / "0.png", PIXELS[0])
    SampleDir(tmp_path / "drawn", {"seed": 0}, "png").write([0], PIXELS[:1])
    write_shards(open_source(str(tmp_path / "images")), tmp_path / "set")
    assert open_shards(tmp_path / "set").manifest.samples == 1
    assert (tmp_path / "set" / "Thumbs.db").exists()


def test_companions_of_shards_are_not_indexed(tmp_path: Path, images: Path) -> None:
    write_shards(open_source(str(images)), tmp_path / "set")
    for name in ("manifest.json", "shard-000000.index.npy"):
        (tmp_path / "set" / name).unlink()
    (tmp_path / "set" / "._shard-000000.tar").write_bytes(b"\0\5\x16\7")
    assert [shard.name for shard in index_shards(tmp_path / "set").shards] == ["shard-000000.tar"]


@pytest.mark.parametrize("reader", ["begun_with", "evaluated"])
def test_a_folder_of_samples_is_its_samples_in_the_order_of_ids(drawn: Path, reader: str) -> None:
    assert np.array_equal(READERS[reader](drawn, 3), PIXELS[:3])


def test_samples_as_files_can_be_packed(tmp_path: Path) -> None:
    store = SampleDir(tmp_path / "drawn", {"seed": 0}, "png")
    store.write([0, 1, 2], PIXELS[:3])
    store.finish([0, 1])
    (store.directory / "00000003.png.tmp").write_bytes(b"half")
    assert np.array_equal(packed(store.directory, 3), PIXELS[:3])


def test_the_grid_is_no_sample_where_samples_were_copied(tmp_path: Path, read: Read) -> None:
    for number in range(3):
        save(tmp_path / "copied" / f"{number:08d}.png", PIXELS[number])
    save(tmp_path / "copied" / "grid.png", PIXELS[9])
    assert np.array_equal(read(tmp_path / "copied", 3), PIXELS[:3])


def test_an_image_called_grid_among_others_is_one(tmp_path: Path, read: Read) -> None:
    for number, name in enumerate(("cat", "dog", "grid")):
        save(tmp_path / "images" / f"{name}.png", PIXELS[number])
    assert np.array_equal(read(tmp_path / "images", 3), PIXELS[:3])


@pytest.mark.parametrize("name", ["x.gif", "x.bmp", "x.TIFF"])
def test_images_of_other_formats_are_refused_by_name(images: Path, read: Read, name: str) -> None:
    (images / name).touch()
    with pytest.raises(UserError, match=f"{name} is not an image .* convert"):
        read(images, 4)


def test_other_files_are_named(images: Path, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    (images / "notes.txt").touch()
    assert np.array_equal(read(images, 4), PIXELS[:4])
    assert "notes.txt" in caplog.text


def test_what_a_folder_without_images_holds_is_named(tmp_path: Path) -> None:
    save(tmp_path / "images" / "cat" / "0.png", PIXELS[0])
    (tmp_path / "images" / "notes.txt").touch()
    for read in (begun_with, upscaled, evaluated):
        with pytest.raises(UserError, match=r"holds no images .* only notes\.txt, cat"):
            read(tmp_path / "images", 1)


def test_a_manifest_of_something_else_is_a_file_like_others(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (images / "manifest.json").write_text('{"name": "theirs"}')
    for read in (begun_with, upscaled, evaluated):
        caplog.clear()
        assert np.array_equal(read(images, 4), PIXELS[:4])
        assert "manifest.json" in caplog.text


def test_many_foreign_files_are_named_at_once_and_counted(images: Path) -> None:
    for number in range(14):
        (images / f"{number:02d}.gif").touch()
    for read in READERS.values():
        with pytest.raises(UserError, match=r"00\.gif, .*09\.gif and 4 more are not images"):
            read(images, 4)


def test_content_decides_what_an_image_is(tmp_path: Path, read: Read) -> None:
    for number, (named, actual) in enumerate((("jpg", "webp"), ("png", "npy"), ("webp", "png"))):
        save(tmp_path / "images" / f"{number}.{named}", PIXELS[number], actual)
    assert np.array_equal(read(tmp_path / "images", 3), PIXELS[:3])


def test_all_damaged_images_are_named_at_once_with_reasons(images: Path, read: Read) -> None:
    (images / "1.PNG").write_bytes(encode(PIXELS[1], "png")[:60])
    (images / "2.png").write_bytes(b"<!DOCTYPE html>")
    (images / "3.jpg").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read(images, 5)
    message = str(caught.value)
    assert "cannot read 3 images" in message
    for name, reason in (("1.PNG", "truncated"), ("2.png", "HTML"), ("3.jpg", "no bytes")):
        assert reason in message.split(name)[1].split(";")[0]
    assert "object at 0x" not in message
    assert "\n" not in message


def test_many_damaged_images_are_counted(tmp_path: Path) -> None:
    for number in range(15):
        save(tmp_path / "images" / f"{number:02d}.png", PIXELS[number])
        if number > 2:
            (tmp_path / "images" / f"{number:02d}.png").write_bytes(b"no image")
    source = open_source(str(tmp_path / "images"))
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"12 images: .*03\.png: .*12\.png: .* and 2 more"):
            write_shards(source, tmp_path / "set", per_shard=4, processes=processes)
        # Repaired, the same command works.
        assert not [name for name in contents(tmp_path / "set") if name.endswith(".tmp")]
    with pytest.raises(UserError, match=r"12 images"):
        InputImages(tmp_path / "images", SHAPE).check(range(15))
    InputImages(tmp_path / "images", SHAPE).check(range(3))


@pytest.mark.parametrize("format", ["png", "tar", "npz"])
def test_damaged_files_of_samples_are_named_at_once(tmp_path: Path, format: Format) -> None:
    store = SampleDir(tmp_path / "drawn", {"seed": 0}, format)
    for sample_id in range(4):
        store.write([sample_id], PIXELS[sample_id][None])
    damaged = sorted(path for path in store.folder.iterdir() if path.name.startswith("0000000"))[
        1:3
    ]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:70])
    for source in (
        InputImages(tmp_path / "drawn", SHAPE),
        open_low_resolution(tmp_path / "drawn", SHAPE),
    ):
        for use in (source.of, source.check):
            with pytest.raises(UserError, match="cannot read 2 images") as caught:
                use(range(4))
            assert all(str(path) in str(caught.value) for path in damaged)
    with pytest.raises(UserError, match="cannot read 2 images"):
        evaluated(tmp_path / "drawn", 4)


def test_a_file_of_samples_that_holds_others_is_named(tmp_path: Path) -> None:
    store = SampleDir(tmp_path / "drawn", {"seed": 0}, "npz")
    store.write([0, 1], PIXELS[:2])
    (file,) = store.folder.iterdir()
    np.savez(file, ids=np.array([0]), images=PIXELS[:1])
    with pytest.raises(UserError, match="does not hold sample 1"):
        begun_with(tmp_path / "drawn", 2)


def test_a_set_of_shards_is_no_folder_of_images(images: Path, tmp_path: Path) -> None:
    write_shards(open_source(str(images)), tmp_path / "set")
    with pytest.raises(UserError, match=r"`images` .* is a data set of shards"):
        InputImages(tmp_path / "set", SHAPE)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        save(tmp_path / "linked" / name / "0.png", PIXELS[ord(name) - ord("a")])
    return tmp_path / "linked"


def test_links_that_lead_back_are_left_out_and_named(
    linked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("up1", "up2", "a/up1", "a/up2", "b/self"):
        (linked / place).symlink_to(".." if "up" in place else ".")
    source = open_source(str(linked))
    assert source.classes == ("a", "b", "c")
    assert [example.key for example in source.examples] == ["a/0", "b/0", "c/0"]
    assert all(str(linked / place) in caplog.text for place in ("up1", "a/up2", "b/self"))


def test_folders_that_all_link_to_each_other_are_walked_in_no_time(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(12)]
    for name in names:
        save(tmp_path / "linked" / name / "0.png", PIXELS[0])
        for other in names:
            (tmp_path / "linked" / name / f"to{other}").symlink_to(f"../{other}")
    source = open_source(str(tmp_path / "linked"))
    assert source.classes == tuple(names)
    assert {example.key.split("/")[0] for example in source.examples} == set(names)


def test_links_elsewhere_are_followed(linked: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "1.png", PIXELS[3])
    (linked / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (linked / "d").symlink_to(tmp_path / "elsewhere")
    (linked / "e").symlink_to("b")
    source = open_source(str(linked))
    assert source.classes == ("a", "b", "c", "d", "e")
    assert [example.key for example in source.examples] == [
        "a/0", "a/more/1", "b/0", "c/0", "d/1", "e/0",
    ]  # fmt: skip


@pytest.mark.parametrize("inside", ["set", "a/set"])
@pytest.mark.parametrize("with_classes", [False, True])
def test_a_set_inside_its_source_can_be_packed_again(
    images: Path, linked: Path, inside: str, with_classes: bool
) -> None:
    root = linked if with_classes else images
    out = root / inside
    out.mkdir(parents=True)  # by hand, before the first run
    first = None
    for _ in range(2):
        manifest = write_shards(open_source(str(root), out), out)
        first = first or manifest
        assert manifest == first
        for path in out.iterdir():
            path.unlink()
    prepare_shards(out, str(root))
    assert open_shards(out).manifest == first
    # Another set, elsewhere: the first is recognised by what is in it.
    assert write_shards(open_source(str(root)), root.parent / "other").samples == first.samples


def test_output_of_every_kind_is_left_out(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    SampleDir(linked / "drawn", {"seed": 0}, "png").write([0], PIXELS[:1])
    (linked / "run").mkdir()
    for name in ("config.json", "lock"):
        (linked / "run" / name).touch()
    (linked / "begun").mkdir()
    (linked / "begun" / ".packing").touch()
    (linked / "evaluation").mkdir()
    (linked / "evaluation" / "result-0123abcd.json").touch()
    SampleDir(linked / "features" / "digits-0123", {"seed": 0}, "npz")
    source = open_source(str(linked))
    assert source.classes == ("a", "b", "c")
    for name in ("drawn", "run", "begun", "evaluation", "features"):
        assert str(linked / name) in caplog.text


def test_reports_beside_the_images_they_are_about_are_no_images(images: Path, read: Read) -> None:
    for name in ("result-0123abcd.json", "result-0123abcd.md"):
        (images / name).touch()
    SampleDir(images / "features" / "digits-0123", {"seed": 0}, "npz")
    assert np.array_equal(read(images, 4), PIXELS[:4])


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def odd_names(tmp_path: Path) -> Path:
    save(tmp_path / NOT_UTF8 / NOT_UTF8 / f"{NOT_UTF8}.png", PIXELS[0])
    return tmp_path / NOT_UTF8


def test_names_that_are_not_utf8_are_packed_and_shown(odd_names: Path) -> None:
    out = odd_names.with_name(f"{NOT_UTF8}-set")
    manifest = write_shards(open_source(str(odd_names)), out)
    assert manifest.classes == (r"caf\xe9",)
    assert open_shards(out).manifest == manifest
    assert b"caf" in open_shards(out).indexes[0]["key"][0]
    # A shard of such a name, from elsewhere.
    (out / "manifest.json").unlink()
    (out / "shard-000000.index.npy").unlink()
    (out / "shard-000000.tar").rename(out / f"{NOT_UTF8}.tar")
    assert index_shards(out) == open_shards(out).manifest


def test_names_that_are_not_utf8_are_read_and_named_in_errors(odd_names: Path, read: Read) -> None:
    folder = odd_names / NOT_UTF8
    assert np.array_equal(read(folder, 1), PIXELS[:1])
    (folder / f"{NOT_UTF8}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*caf"):
        read(folder, 1)


@pytest.mark.parametrize("names", [("train",), ("train", "val"), ("Test", "training", "valid")])
def test_splits_taken_for_classes_are_questioned(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        save(tmp_path / "images" / name / "0.png", PIXELS[0])
    assert open_source(str(tmp_path / "images")).classes == names
    assert str(tmp_path / "images" / names[0]) in caplog.text
    assert "splits" in caplog.text
    caplog.clear()
    save(tmp_path / "images" / "bus" / "0.png", PIXELS[0])
    open_source(str(tmp_path / "images"))
    assert caplog.text == ""
