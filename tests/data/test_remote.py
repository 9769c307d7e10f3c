from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from tests.data import captioned
from tests.data.conftest import Server
from tests.data.sets import PIXELS, pack

from ddpm_engine.data.dataset import ShardDataset, collate
from ddpm_engine.data.remote import fetch
from ddpm_engine.data.remote.cache import ShardCache
from ddpm_engine.data.remote.fetch import ATTEMPTS, FetchError
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError

LIMIT = 10**8


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", LIMIT)


def cached(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in (cache.directory / "files").iterdir())


def serve(server: Server, name: str, content: bytes) -> tuple[str, str]:
    (server.folder / name).write_bytes(content)
    return f"{server.url}/{name}", hashlib.sha256(content).hexdigest()


def read(cache: ShardCache, url: str, digest: str, size: int) -> bytes:
    descriptor = cache.open(url, digest, size)
    try:
        return os.read(descriptor, 10_000)
    finally:
        os.close(descriptor)


def test_a_remote_set_reads_as_a_local_one(server: Server, cache: ShardCache) -> None:
    folder = pack(server.folder / "set")
    local = ShardDataset(folder, seed=5)
    remote = ShardDataset(open_shards(f"{server.url}/set/", cache), seed=5)
    assert server.requests == ["/set/manifest.json"]
    for position in range(20):
        ours, theirs = remote[position], local[position]
        assert ours.label == theirs.label
        assert np.array_equal(ours.image, theirs.image)
    assert remote.fingerprint == local.fingerprint

    # Each file was fetched once, and another reader fetches none.
    assert len(server.requests) == len(set(server.requests)) == 7
    again = ShardDataset(open_shards(f"{server.url}/set", cache), seed=6)
    assert sorted(again[p].label for p in range(20)) == list(range(20))
    assert len(server.requests) == 8


def test_captions_and_embeddings_are_read_from_a_remote_set(
    server: Server, cache: ShardCache
) -> None:
    folder = captioned.pack(server.folder / "set", captioned.WordEncoder(), embedder=True)
    local = ShardDataset(folder, seed=5)
    remote = ShardDataset(open_shards(f"{server.url}/set/", cache), seed=5)
    ours, theirs = (collate(one.__getitems__(range(12))) for one in (remote, local))
    assert ours.captions == theirs.captions
    assert set(ours.tensors()) == set(theirs.tensors())
    assert all(torch.equal(t, theirs.tensors()[name]) for name, t in ours.tensors().items())


@pytest.mark.parametrize(
    ("fault", "message"),
    [("503", "503"), ("cut", "ended after 3500 of 7000"), ("flip", "SHA-256 is .* manifest says")],
)
def test_errors_are_retried_and_lasting_ones_leave_nothing(
    server: Server, cache: ShardCache, fault: str, message: str
) -> None:
    content = b"content" * 1000
    url, digest = serve(server, "a", content)
    server.faults["/a"] = [fault] * (2 * ATTEMPTS - 1)
    with pytest.raises(FetchError, match=message):
        cache.open(url, digest, 7000)
    assert len(server.requests) == ATTEMPTS
    assert cached(cache) == []
    assert read(cache, url, digest, 7000) == content
    assert len(server.requests) == 2 * ATTEMPTS


def test_missing_files_are_requested_once_and_new_versions_are_told_apart(
    server: Server, cache: ShardCache
) -> None:
    with pytest.raises(FetchError, match=r"/nowhere: 404"):
        cache.open(f"{server.url}/nowhere", "0" * 64, 100)
    assert len(server.requests) == 1
    with pytest.raises(UserError, match=r"manifest\.json cannot be read: .*404"):
        open_shards(f"{server.url}/nothing")
    for content in (b"old" * 100, b"new" * 100):
        assert read(cache, *serve(server, "a", content), 300) == content


def test_a_body_that_is_too_long_is_cut_off(server: Server, cache: ShardCache) -> None:
    url, digest = serve(server, "a", bytes(5000))
    with pytest.raises(FetchError, match="more than 4000 bytes"):
        cache.open(url, digest, 4000)
    assert cached(cache) == []
    with pytest.raises(FetchError, match="more than 100"):
        fetch.fetch(url, 100)


def test_a_set_in_another_store_is_read_through_its_back_end_and_verified(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_SECONDS", 0.001)
    memory, stored = fsspec.filesystem("memory"), "memory://bucket/set"
    memory.put(str(pack(tmp_path / "local")), "/bucket/set", recursive=True)
    dataset = ShardDataset(open_shards(stored, cache), seed=5)
    samples = [dataset[p] for p in range(20)]
    assert all(np.array_equal(s.image, PIXELS[s.label]) and not s.faults for s in samples)
    assert len(cached(cache)) == 6
    with pytest.raises(UserError, match=r"nowhere/manifest\.json cannot be read: .*FileNotFound"):
        open_shards("memory://bucket/nowhere", cache)
    memory.pipe("/bucket/set/shard-000001.tar", b"something else")
    damaged = ShardDataset(open_shards(stored, ShardCache(tmp_path / "empty", LIMIT)), seed=5)
    faults = {f.shard for p in range(20) for f in damaged[p].faults}
    assert faults == {"shard-000001.tar"}
    memory.rm("/bucket", recursive=True)


def test_a_back_end_that_is_missing_is_named(cache: ShardCache) -> None:
    with mock.patch.dict(sys.modules, {"s3fs": None}), pytest.raises(UserError, match="s3fs"):
        open_shards("s3://bucket/set", cache)
    with pytest.raises(UserError, match="unknown scheme, nowhere: give"):
        open_shards("nowhere://bucket/set", cache)


def test_the_least_recently_used_is_removed_first_and_nothing_in_use(
    server: Server, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 3500)
    files = {name: serve(server, name, name.encode() * 1000) for name in "abcd"}
    held = cache.open(*files["a"], 1000)
    for name in "bcb":
        os.close(cache.open(*files[name], 1000))
    times = {path.name: path for path in (cache.directory / "files").iterdir()}
    for age, name in enumerate("abc"):  # a is the oldest, but held
        key = next(key for key in times if key.endswith(files[name][1]))
        os.utime(times[key], ns=(0, age + 1))
    os.close(cache.open(*files["d"], 1000))
    kept = {name for name in "abcd" if any(key.endswith(files[name][1]) for key in cached(cache))}
    assert kept == {"a", "c", "d"}
    assert os.pread(held, 1000, 0) == b"a" * 1000
    os.close(held)
    with pytest.raises(UserError, match=r"`data\.cache_gb`"):
        cache.open(*files["b"], 4000)


def test_a_cache_that_is_all_in_use_is_exceeded_with_a_warning(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", 1500)
    one, two = (cache.open(*serve(server, n, n.encode() * 1000), 1000) for n in "ab")
    assert os.pread(one, 1, 0) + os.pread(two, 1, 0) == b"ab"
    assert "500 bytes over its limit" in caplog.text
    os.close(one)
    os.close(two)


def test_what_a_killed_download_left_is_removed(server: Server, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1500)
    half = cache.directory / "files" / "half.tmp"
    half.write_bytes(bytes(1000))
    # Another download that is still alive holds its lock.
    alive = cache.directory / "files" / "alive.tmp"
    alive.write_bytes(bytes(10))
    with open(alive) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.close(cache.open(*serve(server, "a", bytes(1000)), 1000))
        assert alive.exists()
    assert not half.exists()


def test_a_download_begins_while_others_make_room(server: Server, tmp_path: Path) -> None:
    """A file that was just created is in use already, with nothing in it yet."""
    # Room for one file: each download first removes what it can.
    cache = ShardCache(tmp_path / "cache", 1500)
    files = [serve(server, name, name.encode() * 1000) for name in "abcdefgh"]

    def read(worker: int) -> None:
        for url, digest in (files[worker:] + files[:worker]) * 5:
            descriptor = cache.open(url, digest, 1000)
            assert len(os.read(descriptor, 2000)) == 1000
            os.close(descriptor)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [None] * 8


def _read_all(url: str, directory: Path, limit: int, results: Queue[object]) -> None:
    try:
        dataset = ShardDataset(open_shards(url, ShardCache(directory, limit)), 0, window_shards=1)
        images = [dataset[p] for p in range(2 * len(dataset))]
        results.put(all(np.array_equal(s.image, PIXELS[s.label]) for s in images))
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("limit", [LIMIT, 80_000])
def test_many_readers_share_one_cache(server: Server, tmp_path: Path, limit: int) -> None:
    pack(server.folder / "set", count=40, per_shard=2)
    context = multiprocessing.get_context("fork")
    results: Queue[object] = context.Queue()
    arguments = (f"{server.url}/set", tmp_path / "cache", limit, results)
    readers = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=60) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join()
    fetched = [path for path in server.requests if not path.endswith("manifest.json")]
    if limit == LIMIT:
        assert len(fetched) == len(set(fetched)) == 40
    else:  # too small for the set: files went and came back
        assert len(fetched) > 40


def test_a_shard_that_cannot_be_fetched_is_replaced_and_named(
    server: Server, cache: ShardCache
) -> None:
    folder = pack(server.folder / "set")
    (folder / "shard-000001.tar").unlink()
    dataset = ShardDataset(open_shards(f"{server.url}/set", cache), seed=5)
    samples = [dataset[p] for p in range(20)]
    faults = {f.shard: f.reason for s in samples for f in s.faults}
    assert list(faults) == ["shard-000001.tar"]
    assert "404" in faults["shard-000001.tar"]
    # It is not requested again for every sample.
    assert server.requests.count("/set/shard-000001.tar") == 1
