"""Packing a source: the same bytes always, and nothing half-written whatever interrupts it."""

from __future__ import annotations

import fcntl
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.sets import PIXELS, contents, flip

from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.pack import prepare_shards, write_shards
from ddpm_engine.data.packing.process_map import map_forked
from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError

TALL, GREY = PIXELS[0][:, :5], PIXELS[0][..., :1]


def source(count: int = 10, labels: bool = True, **replaced: np.ndarray) -> Source:
    """A few examples; `k3=array` replaces the image of the third."""
    examples = [
        Example(f"k{i}", replaced.get(f"k{i}", PIXELS[i]), i % 3 if labels else None)
        for i in range(count)
    ]
    return Source("memory", examples, ("a", "b", "c") if labels else None)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_shards(source(), tmp_path / "set", per_shard=4)
    return tmp_path / "set"


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    manifest = write_shards(source(), tmp_path / "set", per_shard=4)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    assert (manifest.samples, manifest.height, manifest.width, manifest.channels) == (10, 8, 8, 3)
    assert manifest.classes == ("a", "b", "c")
    opened = open_shards(tmp_path / "set")
    assert opened.manifest == manifest
    assert opened.highest_label == 2
    assert sorted(contents(tmp_path / "set")) == [
        "manifest.json",
        *sorted(f"shard-00000{i}.{kind}" for i in range(3) for kind in ("index.npy", "tar")),
    ]
    assert verify(tmp_path / "set") == []
    # The fingerprint depends on pixels and labels.
    other = write_shards(source(k3=PIXELS[0]), tmp_path / "other", per_shard=4)
    blind = write_shards(source(labels=False), tmp_path / "blind", per_shard=4)
    assert len({manifest.fingerprint, other.fingerprint, blind.fingerprint}) == 3
    assert blind.classes is None
    assert open_shards(tmp_path / "blind").highest_label is None
    # Dots and slashes in names become keys that webdataset keeps whole.
    examples = [Example("cat/img.v2", PIXELS[0], None), Example("00000001", PIXELS[1], None)]
    write_shards(Source("memory", examples), tmp_path / "names")
    keys = open_shards(tmp_path / "names").indexes[0]["key"].tolist()
    assert keys == [b"00000000-cat-img-v2", b"00000001"]


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp", "npy"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, image_format: str) -> None:
    for name, processes in (("one", 1), ("two", 3)):
        done: list[int] = []
        write_shards(
            source(), tmp_path / name, per_shard=4, image_format=image_format,
            processes=processes, progress=done.append,
        )  # fmt: skip
        assert sorted(done) == [2, 4, 4]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify(tmp_path / "one") == []
    assert set(open_shards(tmp_path / "one").indexes[0]["extension"]) == {image_format.encode()}


@pytest.mark.parametrize("processes", [1, 2])
def test_images_that_differ_are_named_with_the_remedy(tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "set"
    with pytest.raises(UserError, match=r"'k3' is 8×5; give `size`"):
        write_shards(source(k3=TALL), folder, per_shard=2, processes=processes)
    with pytest.raises(UserError, match=r"'k4' has 1; give `channels`"):
        write_shards(source(k4=GREY), folder, per_shard=2, processes=processes)
    assert not list(folder.glob("*.tmp"))
    # The same folder serves the corrected run.
    manifest = write_shards(source(k3=TALL, k4=GREY), folder, size=4, channels=1)
    assert (manifest.height, manifest.width, manifest.channels) == (4, 4, 1)
    assert verify(folder) == []


@pytest.mark.parametrize("label", [None, -1, 3])
def test_a_label_that_is_missing_or_has_no_class_is_named(
    tmp_path: Path, label: int | None
) -> None:
    examples = [*source(4).examples, Example("odd", PIXELS[0], label)]
    with pytest.raises(UserError, match="'odd'"):
        write_shards(Source("memory", examples, ("a", "b", "c")), tmp_path / "set")


def test_arguments_out_of_range(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"size": 0}, {"size": 8193}, {"size": 1 << 63}, {"size": math.nan}, {"size": math.inf},
        {"size": 4.0}, {"channels": 2}, {"per_shard": 0}, {"per_shard": -1},
        {"per_shard": math.nan}, {"per_shard": math.inf}, {"image_format": "pkl"},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(UserError, match=r"size|channels|per_shard|pkl"):
            write_shards(source(), tmp_path / "set", **arguments)
    with pytest.raises(UserError, match="memory holds no images"):
        write_shards(source(0), tmp_path / "set")
    for processes in (0, -1, math.nan, math.inf, 1.5):
        with pytest.raises(UserError, match=f"`processes` is {processes}"):
            write_shards(source(), tmp_path / "set", processes=processes)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


def test_more_processes_than_memory_holds_are_refused() -> None:
    with pytest.raises(UserError, match=r"`processes` .* choose fewer"):
        next(map_forked(str, range(1 << 40), 1 << 40))


def test_existing_files_are_not_overwritten(tmp_path: Path, packed: Path) -> None:
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


def test_prepare_packs_once(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", images=PIXELS[:5])
    prepare_shards(tmp_path / "set", str(tmp_path / "few.npz"), size=8)
    before = contents(tmp_path / "set")
    prepare_shards(tmp_path / "set", "nowhere")
    assert contents(tmp_path / "set") == before
    assert open_shards(tmp_path / "set").manifest.samples == 5


def test_two_runs_into_one_folder_at_a_time_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    with open(folder / ".packing", "w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            write_shards(source(), folder)


class Counted:
    """A source that counts what is read of it, and stops at an example once."""

    def __init__(self, stop: int | None = None, revision: str | None = "r1") -> None:
        self.stop, self.read = stop, list[int]()
        self.source = replace(
            source(), examples=LazyExamples(range(10), self.load), revision=revision
        )

    def load(self, number: int) -> Example:
        if number == self.stop:
            raise KeyboardInterrupt
        self.read.append(number)
        return source().examples[number]


def interrupt(folder: Path, revision: str | None = "r1") -> None:
    """Pack two shards of three."""
    with pytest.raises(KeyboardInterrupt):
        write_shards(Counted(stop=9, revision=revision).source, folder, per_shard=4)


def test_finished_shards_are_kept_and_not_written_again(tmp_path: Path, packed: Path) -> None:
    folder = tmp_path / "again"
    interrupt(folder)
    kept = {path.name: path.stat().st_ino for path in folder.glob("shard-*")}
    assert len(kept) == 4
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_shards(folder)
    with pytest.raises(UserError, match="unfinished"):
        index_shards(folder)
    counted = Counted()
    write_shards(counted.source, folder, per_shard=4)
    # The first example is what the others are compared with.
    assert counted.read == [0, 8, 9]
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert contents(folder) == contents(packed)


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path, packed: Path) -> None:
    folder = tmp_path / "again"
    interrupt(folder)
    flip(folder / "shard-000001.tar", 700)
    with open(folder / ".packing", "ab") as journal:
        journal.write(b'{"number": 2, "sha')  # what is left of a write that was cut off
    (folder / "shard-000002.tar.tmp").write_bytes(b"what a killed run leaves")
    counted = Counted()
    write_shards(counted.source, folder, per_shard=4)
    assert counted.read == [0, 4, 5, 6, 7, 8, 9]
    assert contents(folder) == contents(packed)


@pytest.mark.parametrize(
    ("before", "after", "arguments"),
    [("r1", "r2", {}), (None, None, {}), ("r1", "r1", {"image_format": "npy"})],
)
def test_nothing_is_kept_of_another_source_or_recipe(
    tmp_path: Path, before: str | None, after: str | None, arguments: dict[str, Any]
) -> None:
    folder = tmp_path / "again"
    interrupt(folder, before)
    counted = Counted(revision=after)
    write_shards(counted.source, folder, per_shard=4, **arguments)
    assert sorted(set(counted.read)) == list(range(10))
    write_shards(source(), tmp_path / "fresh", per_shard=4, **arguments)
    assert contents(folder) == contents(tmp_path / "fresh")
