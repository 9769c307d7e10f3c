from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import prepare_shards, write_shards
from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3), dtype=np.uint8)


def source(count: int = 10, labels: bool = True, **replaced: np.ndarray) -> Source:
    """A few examples; `k3=array` replaces the image of the third."""
    examples = [
        Example(f"k{i}", replaced.get(f"k{i}", PIXELS[i % 10]), i % 3 if labels else None)
        for i in range(count)
    ]
    return Source("memory", examples, ("a", "b", "c") if labels else None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_shards(source(), tmp_path / "set", per_shard=4)
    return tmp_path / "set"


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    manifest = write_shards(source(), tmp_path / "set", per_shard=4)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    assert (manifest.samples, manifest.height, manifest.width, manifest.channels) == (10, 6, 6, 3)
    assert manifest.classes == ("a", "b", "c")
    opened = open_shards(tmp_path / "set")
    assert opened.manifest == manifest
    assert opened.highest_label == 2
    assert sorted(contents(tmp_path / "set")) == [
        "manifest.json",
        *sorted(f"shard-00000{i}.{kind}" for i in range(3) for kind in ("index.npy", "tar")),
    ]
    assert verify(tmp_path / "set") == []


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp", "npy"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, image_format: str) -> None:
    for name in ("one", "two"):
        write_shards(source(), tmp_path / name, per_shard=4, image_format=image_format)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "one") == []


def test_the_fingerprint_depends_on_pixels_and_labels(tmp_path: Path) -> None:
    plain = write_shards(source(), tmp_path / "plain")
    other = write_shards(source(k3=PIXELS[0]), tmp_path / "other")
    blind = write_shards(source(labels=False), tmp_path / "blind")
    assert len({plain.fingerprint, other.fingerprint, blind.fingerprint}) == 3
    assert blind.classes is None
    assert open_shards(tmp_path / "blind").highest_label is None


def test_names_with_dots_and_slashes_become_keys_that_webdataset_keeps_whole(
    tmp_path: Path,
) -> None:
    examples = [Example("cat/img.v2", PIXELS[0], None), Example("00000001", PIXELS[1], None)]
    write_shards(Source("memory", examples), tmp_path / "set")
    keys = open_shards(tmp_path / "set").indexes[0]["key"].tolist()
    assert keys == [b"00000000-cat-img-v2", b"00000001"]


def test_images_that_differ_are_named_with_the_remedy(tmp_path: Path) -> None:
    tall, grey = PIXELS[0][:, :5], PIXELS[0][..., :1]
    with pytest.raises(UserError, match=r"'k3' is 6×5; give `size`"):
        write_shards(source(k3=tall), tmp_path / "set")
    with pytest.raises(UserError, match=r"'k4' has 1; give `channels`"):
        write_shards(source(k4=grey), tmp_path / "set")
    # The same folder serves the corrected run.
    manifest = write_shards(source(k3=tall, k4=grey), tmp_path / "set", size=4, channels=1)
    assert (manifest.height, manifest.width, manifest.channels) == (4, 4, 1)
    assert verify(tmp_path / "set") == []


@pytest.mark.parametrize("label", [None, -1, 3])
def test_a_label_that_is_missing_or_has_no_class_is_named(
    tmp_path: Path, label: int | None
) -> None:
    examples = [*source(4).examples, Example("odd", PIXELS[0], label)]
    with pytest.raises(UserError, match="'odd'"):
        write_shards(Source("memory", examples, ("a", "b", "c")), tmp_path / "set")


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"channels": 2}, {"per_shard": 0}, {"image_format": "pkl"}]
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        write_shards(source(), tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_an_empty_source_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory holds no images"):
        write_shards(source(0), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_nothing_that_lies_there_is_overwritten(tmp_path: Path, packed: Path) -> None:
    before = contents(packed)
    with pytest.raises(UserError, match="finished set"):
        write_shards(source(), packed)
    assert contents(packed) == before
    # Somebody's own shards have the commonest name there is.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"not empty \(it holds shard-000000.tar\)"):
        write_shards(source(), theirs)
    assert contents(theirs) == {"shard-000000.tar": b"precious"}


def test_an_interrupted_run_is_run_again(tmp_path: Path, packed: Path) -> None:
    def interrupted(number: int) -> Example:
        if number == 9:
            raise KeyboardInterrupt
        return source().examples[number]

    folder = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        write_shards(Source("memory", LazyExamples(range(10), interrupted)), folder, per_shard=2)
    assert not list(folder.glob("*.tmp"))
    assert len(list(folder.glob("*.tar"))) == 4
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_shards(folder)
    with pytest.raises(UserError, match="unfinished"):
        index_shards(folder)
    (folder / "shard-000004.tar.tmp").write_bytes(b"what a killed run leaves")
    write_shards(source(), folder, per_shard=4)
    assert contents(folder) == contents(packed)


def test_two_runs_into_one_folder_at_a_time_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    with open(folder / ".packing", "w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            write_shards(source(), folder)


def test_a_full_disk_is_named_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        # The folder itself is synced first.
        patched.setattr("ddpm_engine.data.packing.journal.fsync_directory", lambda _: None)
        with pytest.raises(UserError, match=r"shard-000000\.tar: No space left .* free space"):
            write_shards(source(), tmp_path / "set")
    assert list(contents(tmp_path / "set")) == [".packing"]
    write_shards(source(), tmp_path / "set")
    assert verify(tmp_path / "set") == []


def test_prepare_packs_once(tmp_path: Path) -> None:
    prepare_shards(tmp_path / "digits", "digits", size=8)
    before = contents(tmp_path / "digits")
    prepare_shards(tmp_path / "digits", "nowhere")
    assert contents(tmp_path / "digits") == before
    assert open_shards(tmp_path / "digits").manifest.samples == 1797


# Opening and verifying


def test_files_that_disagree_with_the_manifest_are_named(packed: Path) -> None:
    with pytest.raises(UserError, match="no folder of shards"):
        open_shards(packed / "nowhere")
    (packed / "shard-000001.tar").rename(packed / "elsewhere")
    with pytest.raises(UserError, match=r"shard-000001\.tar .*No such file"):
        open_shards(packed)
    (packed / "shard-000001.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard-000001\.tar has 5 bytes"):
        open_shards(packed)
    (packed / "elsewhere").rename(packed / "shard-000001.tar")
    flip(packed / "shard-000002.index.npy", 150)
    with pytest.raises(UserError, match=r"shard-000002\.index\.npy is not the one"):
        open_shards(packed).indexes[2]
    (packed / "shard-000002.index.npy").unlink()
    with pytest.raises(UserError, match=r"shard-000002\.index\.npy cannot be read"):
        open_shards(packed)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(samples=11),
        lambda m: m.update(format=99),
        lambda m: m.update(height="6"),
        lambda m: m.update(classes="abc"),
        lambda m: m["shards"][0].update(sha256="0" * 64),
        lambda m: m["shards"][0].update(name="../shard-000000.tar"),
        lambda m: m["shards"][0].pop("bytes"),
        lambda m: m.clear(),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(packed: Path, change: Any) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_shards(packed)


def test_an_index_with_a_label_that_has_no_name_is_refused(packed: Path) -> None:
    path = packed / "manifest.json"
    content = json.loads(path.read_text())
    content.update(classes=["a"])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"labels up to 2, the manifest names 1 classes"):
        open_shards(packed).indexes[0]


def test_verify_names_every_damaged_sample(packed: Path) -> None:
    shards = open_shards(packed)
    for shard, row in ((0, 1), (0, 3), (2, 0)):
        entry = shards.indexes[shard][row]
        flip(packed / shards.manifest.shards[shard].name, int(entry["offset"] + entry["size"] // 2))
    faults = verify(packed)
    named = [(f.shard, f.key) for f in faults if f.key]
    assert named == [
        ("shard-000000.tar", "00000001-k1"),
        ("shard-000000.tar", "00000003-k3"),
        ("shard-000002.tar", "00000008-k8"),
    ]
    assert all("checksum" in f.reason for f in faults if f.key)
    assert [f.shard for f in faults if f.key is None] == ["shard-000000.tar", "shard-000002.tar"]


def test_verify_finds_a_changed_label_a_damaged_header_and_missing_files(packed: Path) -> None:
    with tarfile.open(packed / "shard-000000.tar") as tar:
        flip(packed / "shard-000000.tar", tar.getmember("00000002-k2.cls").offset_data)
    with tarfile.open(packed / "shard-000001.tar") as tar:
        header = tar.getmember("00000005-k5.cls").offset
        flip(packed / "shard-000001.tar", header)
    (packed / "shard-000002.tar").unlink()
    text = "\n".join(map(str, verify(packed)))
    assert "shard-000000.tar: sample '00000002-k2': unreadable label" in text
    assert f"shard-000001.tar has a damaged header at or after byte {header}" in text
    assert "shard-000002.tar: cannot be read" in text


# Shards made elsewhere


def test_shards_made_elsewhere_are_indexed(tmp_path: Path) -> None:
    png = [encode(image, "png") for image in PIXELS]
    write_tar(
        tmp_path / "b.tar",
        {"x/0.JPG": encode(PIXELS[0], "jpg"), "x/0.json": b'{"label": 4}', "x/0.txt": b"a cat"},
    )
    write_tar(
        tmp_path / "a.tar",
        {"0.cls": b"2\n", "0.png": png[0], "0.seg.png": png[1], "1.png": png[2], "1.cls": b"0"},
    )
    manifest = index_shards(tmp_path)
    assert [(s.name, s.samples) for s in manifest.shards] == [("a.tar", 2), ("b.tar", 1)]
    assert manifest.classes == ("0", "1", "2", "3", "4")
    shards = open_shards(tmp_path)
    assert [index["label"].tolist() for index in shards.indexes] == [[2, 0], [4]]
    assert verify(tmp_path) == []
    with pytest.raises(UserError, match="indexed already"):
        index_shards(tmp_path)


def test_sizes_that_differ_are_left_open(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {"0.png": encode(PIXELS[0], "png"), "1.png": encode(PIXELS[0][:, :4], "png")},
    )
    manifest = index_shards(tmp_path)
    assert (manifest.height, manifest.width, manifest.channels) == (6, None, 3)


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


def test_pickles_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    array = io.BytesIO()
    np.save(array, np.array([Bomb()], dtype=object), allow_pickle=True)
    png = encode(PIXELS[0], "png")
    hostile = {"0.png": png, "0.pyd": bomb, "0.pkl": bomb, "0.pth": bomb, "1.npy": array.getvalue()}
    write_tar(tmp_path / "a.tar", hostile)
    index_shards(tmp_path)
    (fault,) = verify(tmp_path)
    assert fault.key == "1"
    (tmp_path / "manifest.json").unlink()
    write_tar(tmp_path / "a.tar", {"0.pyd": bomb})
    with pytest.raises(UserError, match=r"'0' .*has no image, only pyd"):
        index_shards(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.cls": b"one"}, "unreadable label"),
        ({"0.cls": b"-3"}, "label -3"),
        ({"0.json": b'{"label": 1.5}'}, "label 1.5"),
        ({"0.json": b"{"}, "unreadable label"),
        ({"0.cls": b"9" * 12}, "label 999999999999"),
        ({"0.cls": b"1", "1.png": encode(PIXELS[0], "png")}, "'1' has no label"),
    ],
)
def test_labels_that_cannot_be_used(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": encode(PIXELS[0], "png"), **members})
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path)


def test_damaged_tars_are_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.png": encode(PIXELS[i], "png") for i in range(4)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]

    flip(path, third.offset + 3)
    with pytest.raises(UserError, match=rf"a\.tar has a damaged header .* byte {third.offset}"):
        index_shards(tmp_path)
    path.write_bytes(whole[: third.offset])
    with pytest.raises(UserError, match=rf"a\.tar ends at byte {third.offset}"):
        index_shards(tmp_path)
    path.write_bytes(whole[: third.offset_data + 5])
    with pytest.raises(UserError, match=r"a\.tar is not a whole"):
        index_shards(tmp_path)
    for content in (b"", b"\x1f\x8b compressed", bytes(700)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.tar|no samples"):
            index_shards(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"no \.tar files"):
        index_shards(tmp_path)


# Several processes, and runs that go on


@pytest.mark.parametrize("processes", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, packed: Path, processes: int
) -> None:
    done: list[int] = []
    folder = tmp_path / "parallel"
    write_shards(source(), folder, per_shard=4, processes=processes, progress=done.append)
    assert contents(folder) == contents(packed)
    assert sorted(done) == [2, 4, 4]


def test_an_error_in_another_process_reaches_the_user_and_leaves_nothing_half(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=r"'k3' is 6×5; give `size`"):
        write_shards(source(k3=PIXELS[0][:, :5]), tmp_path / "set", per_shard=2, processes=2)
    assert not list((tmp_path / "set").glob("*.tmp"))
    with pytest.raises(UserError, match="`processes` is 0"):
        write_shards(source(), tmp_path / "other", processes=0)


def test_indexing_in_processes_gives_the_same_set(tmp_path: Path, packed: Path) -> None:
    before = contents(packed)
    for name in before:
        if not name.endswith(".tar"):
            (packed / name).unlink()
    manifest = index_shards(packed, processes=2)
    assert manifest.samples == 10
    after = contents(packed)
    assert {n: b for n, b in after.items() if n != "manifest.json"} == {
        n: b for n, b in before.items() if n != "manifest.json"
    }


class Counted:
    """A source that knows its revision, and stops at an example once."""

    def __init__(self, stop: int | None = None, revision: str = "r1") -> None:
        self.stop, self.read = stop, list[int]()
        self.source = replace(
            source(), examples=LazyExamples(range(10), self.load), revision=revision
        )

    def load(self, number: int) -> Example:
        if number == self.stop:
            raise KeyboardInterrupt
        self.read.append(number)
        return source().examples[number]


def interrupted(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(Counted(stop=9).source, folder, per_shard=4)


def test_finished_shards_are_kept_and_not_written_again(tmp_path: Path, packed: Path) -> None:
    folder = tmp_path / "again"
    interrupted(folder)
    kept = {path.name: path.stat().st_ino for path in folder.glob("shard-*")}
    assert len(kept) == 4
    counted = Counted()
    write_shards(counted.source, folder, per_shard=4)
    # The first example is what the others are compared with.
    assert counted.read == [0, 8, 9]
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert contents(folder) == contents(packed)


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path, packed: Path) -> None:
    folder = tmp_path / "again"
    interrupted(folder)
    flip(folder / "shard-000001.tar", 700)
    with open(folder / ".packing", "ab") as journal:
        journal.write(b'{"number": 2, "sha')  # what is left of a write that was cut off
    counted = Counted()
    write_shards(counted.source, folder, per_shard=4)
    assert counted.read == [0, 4, 5, 6, 7, 8, 9]
    assert contents(folder) == contents(packed)


@pytest.mark.parametrize(
    ("revision", "arguments"), [("r2", {}), ("r1", {"image_format": "npy"}), ("r1", {"size": 4})]
)
def test_nothing_is_kept_of_another_source_or_recipe(
    tmp_path: Path, revision: str, arguments: dict[str, Any]
) -> None:
    folder = tmp_path / "again"
    interrupted(folder)
    counted = Counted(revision=revision)
    write_shards(counted.source, folder, per_shard=4, **arguments)
    assert sorted(set(counted.read)) == list(range(10))
    write_shards(source(), tmp_path / "fresh", per_shard=4, **arguments)
    assert contents(folder) == contents(tmp_path / "fresh")
