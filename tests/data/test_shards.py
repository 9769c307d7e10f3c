"""Opening, verifying and indexing sets of shards."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.data.sets import PIXELS, contents, flip, pack, write_tar

from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.shards.manifest import Manifest, Shard
from ddpm_engine.data.shards.shard_set import ShardSet, open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode

PNG = encode(PIXELS[0], "png")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "set", count=10, per_shard=4, classes=("a", "b", "c"))


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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": ["a"]}))
    with pytest.raises(UserError, match=r"labels up to 2, the manifest names 1 classes"):
        open_shards(packed).indexes[0]


def test_opening_reads_no_index() -> None:
    class Nowhere:
        def open(self, name: str, sha256: str, at_most: int) -> int:
            raise AssertionError(name)

        def manifest(self, name: str) -> bytes:
            raise AssertionError(name)

    shard = Shard("0.tar", 10_000, 1, "0" * 64, "0" * 64)
    shards = tuple(dataclasses.replace(shard, name=f"{i}.tar") for i in range(1000))
    opened = ShardSet(Nowhere(), Manifest(shards, 8, 8, 3, ("a",)))
    assert opened.manifest.samples == 10**7
    assert opened.highest_label == 0


def test_verify_names_every_damaged_sample(packed: Path) -> None:
    shards = open_shards(packed)
    for shard, row in ((0, 1), (0, 3), (2, 0)):
        entry = shards.indexes[shard][row]
        flip(packed / shards.manifest.shards[shard].name, int(entry["offset"] + entry["size"] // 2))
    faults = verify(packed)
    assert [(f.shard, f.key) for f in faults if f.key] == [
        ("shard-000000.tar", "00000001"),
        ("shard-000000.tar", "00000003"),
        ("shard-000002.tar", "00000008"),
    ]
    assert all("checksum" in f.reason for f in faults if f.key)
    assert [f.shard for f in faults if f.key is None] == ["shard-000000.tar", "shard-000002.tar"]


def test_verify_finds_a_changed_label_a_damaged_header_and_missing_files(packed: Path) -> None:
    with tarfile.open(packed / "shard-000000.tar") as tar:
        flip(packed / "shard-000000.tar", tar.getmember("00000002.cls").offset_data)
    with tarfile.open(packed / "shard-000001.tar") as tar:
        header = tar.getmember("00000005.cls").offset
        flip(packed / "shard-000001.tar", header)
    (packed / "shard-000002.tar").unlink()
    text = "\n".join(map(str, verify(packed)))
    assert "shard-000000.tar: sample '00000002': unreadable label" in text
    assert f"shard-000001.tar has a damaged header at or after byte {header}" in text
    assert "shard-000002.tar: cannot be read" in text


def test_shards_made_elsewhere_are_indexed(tmp_path: Path) -> None:
    png = [encode(image, "png") for image in (*PIXELS[:2], PIXELS[2][:, :4])]
    write_tar(
        tmp_path / "b.tar",
        ("x/0.JPG", encode(PIXELS[0], "jpg")),
        ("x/0.json", b'{"label": 4}'),
        ("x/0.txt", b"a cat"),
    )
    write_tar(
        tmp_path / "a.tar",
        ("0.cls", b"2\n"),
        ("0.png", png[0]),
        ("0.seg.png", png[1]),
        ("1.png", png[2]),
        ("1.cls", b"0"),
    )
    manifest = index_shards(tmp_path)
    assert [(s.name, s.samples) for s in manifest.shards] == [("a.tar", 2), ("b.tar", 1)]
    assert manifest.classes == ("0", "1", "2", "3", "4")
    assert (manifest.height, manifest.width, manifest.channels) == (8, None, 3)
    assert [index["label"].tolist() for index in open_shards(tmp_path).indexes] == [[2, 0], [4]]
    assert verify(tmp_path) == []
    with pytest.raises(UserError, match="indexed already"):
        index_shards(tmp_path)


def test_indexing_gives_what_packing_gave(packed: Path) -> None:
    before = contents(packed)
    for name in before:
        if not name.endswith(".tar"):
            (packed / name).unlink()
    assert index_shards(packed, processes=2).samples == 10
    after = contents(packed)
    del before["manifest.json"], after["manifest.json"]  # the names of classes are not in the tars
    assert after == before


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.cls": b"one"}, "unreadable label"),
        ({"0.cls": b"-3"}, "label -3"),
        ({"0.json": b'{"label": 1.5}'}, "label 1.5"),
        ({"0.json": b"{"}, "unreadable label"),
        ({"0.cls": b"9" * 12}, "label 999999999999"),
        ({"0.cls": b"1", "1.png": PNG}, "'1' has no label"),
        ({"1.pyd": b"", "1.cls": b"1"}, r"'1' .*has no image, only cls, pyd"),
        ({"0.png": PNG}, r"'0' of .*a\.tar has two members 'png'.*byte \d+"),
    ],
)
def test_samples_that_cannot_be_used(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    write_tar(tmp_path / "a.tar", ("0.png", PNG), *members.items())
    with pytest.raises(UserError, match=message):
        index_shards(tmp_path)


def test_damaged_tars_are_named_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, *((f"{i}.png", PNG) for i in range(4)))
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
