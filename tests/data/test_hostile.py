"""Shards, indexes and manifests made by somebody who means harm, or by chance.

Nothing of them is executed or written elsewhere, memory stays bounded, and every error is a
`UserError`. Hypothesis looks for the rest, longer in the slow tests.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import resource
import tarfile
import tracemalloc
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.sets import PIXELS, Bomb, pack, write_tar

from ddpm_engine.data.dataset import Sample, ShardDataset
from ddpm_engine.data.members import (
    EncodedCaption,
    StoredText,
    encode_captions,
    encode_embedding,
    encode_text,
    parse_captions,
    parse_embedding,
)
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.shards.index import BESIDE, index_dtype, parse_index
from ddpm_engine.data.shards.manifest import Shard, TextEmbeddings, parse_manifest
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.data.tar import MAX_HEADER, scan_tar
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode

PNG = encode(PIXELS[0], "png")
BLOCK = 512

EFFORTS = pytest.mark.parametrize("examples", [60, pytest.param(5_000, marks=pytest.mark.slow)])


def png_of_size(side: int) -> bytes:
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + PNG[24:29]
    return PNG[:12] + header + zlib.crc32(header).to_bytes(4, "big") + PNG[33:]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty set in a folder which is all that a shard could reach by `../`."""
    made = tmp_path / "outer" / "set"
    made.mkdir(parents=True)
    monkeypatch.chdir(made)
    return made


def everything(folder: Path) -> set[str]:
    root = folder.parent.parent
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_names_links_and_code_do_nothing(folder: Path) -> None:
    bomb = pickle.dumps(Bomb())
    absolute = str(folder.parent / "absolute.png")
    write_tar(
        folder / "a.tar",
        ("../escaped.png", PNG),
        (absolute, PNG),
        ("link.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard.png", b"", {"type": tarfile.LNKTYPE, "linkname": "../escaped.png"}),
        ("device.png", b"", {"type": tarfile.CHRTYPE}),
        ("ok.png", PNG),
        ("ok.pyd", bomb),
        ("ok.pickle", bomb),
        ("ok.pth", bomb),
    )
    index_shards(folder)
    assert verify(folder) == []
    dataset = ShardDataset(folder, seed=0)
    assert [dataset[p].faults for p in range(3)] == [()] * 3
    assert len(dataset) == 3
    assert everything(folder) == {
        "outer", "outer/set", "outer/set/a.tar", "outer/set/a.index.npy", "outer/set/manifest.json",
    }  # fmt: skip


def test_images_that_cannot_be_decoded_are_replaced_and_named(folder: Path) -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([Bomb()], dtype=object), allow_pickle=True)
    bad = {"big": png_of_size(30_000), "wide": png_of_size(8193), "empty": b"", "cut": PNG[:40]}
    write_tar(
        folder / "a.tar",
        *((f"{name}.png", payload) for name, payload in bad.items()),
        ("array.npy", pickled.getvalue()),
        ("ok.png", PNG),
    )
    index_shards(folder)
    dataset = ShardDataset(folder, seed=0)
    samples: list[Sample] = []
    assert peak_bytes(lambda: samples.extend(dataset[p] for p in range(6))) < 10e6
    assert all(np.array_equal(sample.image, PIXELS[0]) for sample in samples)
    assert {f.key for s in samples for f in s.faults} == {*bad, "array"}
    assert not (folder / "executed").exists()


def test_odd_names_are_kept_up_to_a_length(folder: Path) -> None:
    write_tar(folder / "a.tar", ("caf\udce9.png", PNG), ("x" * 5000 + "-end.png", PNG))
    index_shards(folder)
    latin, long = open_shards(folder).indexes[0]["key"].tolist()
    assert latin == b"caf\xe9"
    assert (len(long), long[-4:]) == (255, b"-end")
    assert verify(folder) == []


def peak_bytes(work: Callable[[], object]) -> int:
    """Memory that Python allocates at most while it does something."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "kind",
    [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE],
)
def test_headers_of_any_claimed_size_are_not_read_into_memory(folder: Path, kind: bytes) -> None:
    path = folder / "a.tar"
    path.write_bytes(header(300_000_000, kind))
    os.truncate(path, 400_000_000)  # sparse: it takes no room

    def index() -> None:
        with pytest.raises(UserError, match="extended header of 300000000 bytes"):
            index_shards(folder)

    assert peak_bytes(index) < 10 * MAX_HEADER


def negative_size() -> bytes:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"size": "-2048"}
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(2 * BLOCK)


NESTED = (header(1, tarfile.GNUTYPE_LONGNAME) + bytes(BLOCK)) * 5000


@pytest.mark.parametrize("content", [NESTED, negative_size()], ids=["nested", "negative"])
def test_headers_that_lead_nowhere_are_refused(folder: Path, content: bytes) -> None:
    (folder / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar"):
        index_shards(folder)


def many_members(path: Path, count: int) -> None:
    """Zero-byte images with the keys 00000000 and on."""
    template = tarfile.TarInfo("00000000.png").tobuf(tarfile.USTAR_FORMAT)
    names = np.char.zfill(np.arange(count).astype("S8"), 8)
    digits = names.view(np.uint8).reshape(count, 8)
    blocks = np.tile(np.frombuffer(template, np.uint8), (count, 1))
    blocks[:, :8] = digits
    # The template's own checksum is that of eight zeros.
    sums = int(template[148:154], 8) + digits.sum(1, dtype=int) - 8 * ord("0")
    blocks[:, 148:154] = (
        np.array([b"%06o" % s for s in sums.tolist()]).view(np.uint8).reshape(-1, 6)
    )
    with open(path, "wb") as file:
        blocks.tofile(file)
        file.write(bytes(2 * BLOCK))


def growth(work: Callable[[], object]) -> int:
    """Bytes by which a process grows, at its peak, while it does something."""
    context = multiprocessing.get_context("fork")
    answer: Queue[int] = context.Queue()

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        answer.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    process = context.Process(target=measure)
    process.start()
    process.join()
    assert process.exitcode == 0
    return answer.get(timeout=10)


@pytest.mark.parametrize("count", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_tiny_members_are_indexed_in_bounded_memory(folder: Path, count: int) -> None:
    many_members(folder / "a.tar", count)
    if count == 10_000:  # tarfile alone keeps about a kilobyte of each member
        assert peak_bytes(lambda: deque(scan_tar(folder / "a.tar"), maxlen=0)) < 5e6
    # A row of the index has 32 bytes, and is copied; tracing every allocation would take minutes.
    assert growth(lambda: index_shards(folder)) < 50e6 + 150 * count
    (index,) = open_shards(folder).indexes
    assert len(index) == count
    assert index["key"][[0, -1]].tolist() == [b"00000000", b"%08d" % (count - 1)]
    assert index["offset"].tolist() == list(range(BLOCK, BLOCK * (count + 1), BLOCK))
    (folder / "a.tar").unlink()  # half a gigabyte


# What hypothesis finds


def whole_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for one in ("a", "b", "é" * 60):
            for name, payload in ((f"{one}.png", PNG), (f"{one}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def search(
    check: Callable[[bytes], None],
    strategy: st.SearchStrategy[bytes],
    examples: int,
    *known: bytes,
) -> None:
    """Let hypothesis look for bytes that `check` fails at, which passes for the known ones."""
    for content in known:
        check(content)
    settings(deadline=None, max_examples=examples)(given(strategy)(check))()


TAR = whole_tar()

edits = st.lists(st.tuples(st.integers(0, len(TAR) - 1), st.integers(0, 255)), max_size=6)
tars = st.one_of(
    st.binary(max_size=3000),
    st.tuples(edits, st.integers(0, len(TAR))).map(lambda drawn: _edited(TAR, *drawn)),
)


def _edited(content: bytes, changes: list[tuple[int, int]], length: int) -> bytes:
    edited = bytearray(content)
    for place, value in changes:
        edited[place] = value
    return bytes(edited[:length])


@EFFORTS
def test_any_bytes_are_a_tar_or_refused(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "fuzz.tar"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        samples = []
        with suppress(UserError):
            samples = list(scan_tar(path))
        assert all(s.image is None or 0 <= s.image.offset_data <= len(content) for s in samples)

    search(check, tars, examples, TAR)


SHARD = Shard("0.tar", 3, 10_000, "0" * 64, "0" * 64)
ROWS = np.zeros(3, index_dtype(4, ("captions", "embedding")))
STREAM = io.BytesIO()
np.save(STREAM, ROWS)
INDEX = STREAM.getvalue()

index_edits = st.lists(st.tuples(st.integers(0, len(INDEX) - 1), st.integers(0, 255)), max_size=6)
indexes = st.one_of(
    st.binary(max_size=300),
    st.tuples(index_edits, st.integers(0, len(INDEX))).map(lambda d: _edited(INDEX, *d)),
    index_edits.map(lambda changes: _edited(INDEX, changes, len(INDEX))),
)


def reads_or_refuses(content: bytes) -> None:
    try:
        rows = parse_index(content, SHARD, classes=2)
    except ValueError:
        return
    names = rows.dtype.names or ()
    assert rows.dtype == index_dtype(rows.dtype["key"].itemsize, names)
    assert len(rows) == 3
    for places in (rows, *(rows[name] for name in BESIDE if name in names)):
        ends = places["offset"].astype(object) + places["size"].astype(object)
        assert all(end <= SHARD.bytes for end in ends)
    assert set(rows["label"]) <= {-1, 0, 1}


@EFFORTS
def test_any_bytes_are_an_index_or_refused(examples: int) -> None:
    search(reads_or_refuses, indexes, examples, INDEX)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
shards = st.fixed_dictionaries(
    {
        "name": st.one_of(st.just("a.tar"), values),
        "samples": st.one_of(st.just(1), values),
        "bytes": st.one_of(st.just(1), values),
        "sha256": st.one_of(st.just("0" * 64), values),
        "index_sha256": st.one_of(st.just("0" * 64), values),
    }
)
TEXT_FIELDS = [field.name for field in dataclasses.fields(TextEmbeddings)]
manifests = st.one_of(
    st.binary(max_size=200),
    values.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {
            "format": st.one_of(st.just(1), values),
            "fingerprint": values,
            "samples": values,
            "shards": st.one_of(st.lists(st.one_of(shards, values), max_size=2), values),
            "height": st.one_of(st.just(8), values),
            "width": st.just(8),
            "channels": st.just(3),
            "classes": st.one_of(st.none(), values),
            "captions": st.one_of(st.booleans(), values),
            "text": st.one_of(values, st.fixed_dictionaries(dict.fromkeys(TEXT_FIELDS, values))),
        }
    ).map(lambda value: json.dumps(value).encode()),
)


def parses_or_refuses(content: bytes) -> None:
    with suppress(UserError):
        manifest = parse_manifest(content, "there/manifest.json")
        assert all("/" not in shard.name for shard in manifest.shards)


@EFFORTS
def test_any_bytes_are_a_manifest_or_refused(examples: int) -> None:
    outside = b'{"format": 1, "shards": [{"name": "..\\u0000/a.tar"}]}'
    search(parses_or_refuses, manifests, examples, b"[" * 100_000, outside)


TOKENS = np.ones((2, 3), np.float16)
TEXT = encode_text([EncodedCaption(TOKENS, TOKENS[0])] * 2, "f")
EMBEDDING = encode_embedding(np.ones(5, np.float32))


def edited(content: bytes) -> st.SearchStrategy[bytes]:
    edits = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    return st.one_of(
        st.binary(max_size=300),
        st.tuples(edits, st.integers(0, len(content))).map(lambda d: _edited(content, *d)),
    )


def text_is_read_or_refused(content: bytes) -> None:
    with suppress(ValueError):
        for caption in StoredText(content):
            assert caption.tokens.ndim == 2
            assert np.isfinite(caption.tokens).all()
            assert caption.pooled.ndim == 1


def embedding_is_read_or_refused(content: bytes) -> None:
    with suppress(ValueError):
        embedding = parse_embedding(content)
        assert embedding.dtype == np.float32
        assert embedding.ndim == 1
        assert np.isfinite(embedding).all()


def captions_are_read_or_refused(content: bytes) -> None:
    with suppress(ValueError):
        captions = parse_captions(content)
        assert captions
        assert all(parse_captions(encode_captions([one])) == (one,) for one in captions)


@EFFORTS
def test_any_bytes_are_embeddings_or_captions_or_refused(examples: int) -> None:
    search(text_is_read_or_refused, edited(TEXT), examples, TEXT)
    search(embedding_is_read_or_refused, edited(EMBEDDING), examples, EMBEDDING)
    lines = st.text().map(str.encode)
    search(captions_are_read_or_refused, st.one_of(st.binary(), lines), examples, b"a")


def test_a_manifest_points_to_nothing_outside_its_folder(tmp_path: Path) -> None:
    content = json.loads((pack(tmp_path / "set") / "manifest.json").read_text())
    for name in ("../a.tar", "/a.tar", "a\\b.tar", "a\0.tar", ".tar/..", "a.txt"):
        content["shards"][0]["name"] = name
        with pytest.raises(UserError, match=r"is not the name of a \.tar file"):
            parse_manifest(json.dumps(content).encode(), "manifest.json")
