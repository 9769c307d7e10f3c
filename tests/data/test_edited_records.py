"""Records that a person, or a damaged disk, has changed: read, or refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.sets import contents, pack

from ddpm_engine.atomic_io import sha256_of
from ddpm_engine.config import RunConfig
from ddpm_engine.data.packing.journal import MARKER_NAME
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.shards.verify import verify
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.sources import folder_source
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_reader import open_samples
from ddpm_engine.training.run_directory import claim_run_directory

FINGERPRINT = "0" * 64
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths to all values inside a JSON value, and to itself."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        inner = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [()] + [(key, *rest) for key, one in inner for rest in places(one)]


def replaced(value: Any, place: tuple[Any, ...], by: Any) -> Any:
    if not place:
        return by
    changed = copy.deepcopy(value)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = by
    return changed


def a_set(folder: Path) -> tuple[Path, Callable[[], object]]:
    pack(folder / "set", classes=("a", "b"))

    def read() -> None:
        opened = open_shards(folder / "set")
        opened.indexes[0]
        verify(folder / "set")
        folder_source(folder / "set")

    return folder / "set" / "manifest.json", read


def a_run(folder: Path) -> tuple[Path, Callable[[], object]]:
    config = RunConfig(out=folder / "run")
    claim_run_directory(config, FINGERPRINT, ("a", "b")).close()

    def read() -> None:
        claim_run_directory(config, FINGERPRINT, ("a", "b")).close()

    return folder / "run" / "data.json", read


def samples(folder: Path) -> tuple[Path, Callable[[], object]]:
    store = SampleDir(folder / "drawn", {"seed": 0, "classes": [0, 1]}, "png", lambda _: None)
    store.write([0, 1], np.zeros((2, 8, 8, 3), np.uint8))

    def read() -> None:
        with suppress(UserError):
            open_samples(folder / "drawn").read([0])
        folder_source(folder / "drawn")

    return folder / "drawn" / "manifest.json", read


def a_journal(folder: Path) -> tuple[Path, Callable[[], object]]:
    """Of a run that packed everything, and was killed before it wrote the manifest."""
    manifest = json.loads((pack(folder / "set") / "manifest.json").read_bytes())
    expected = contents(folder / "set")
    (folder / "set" / "manifest.json").unlink()
    entry = {
        "number": 0, "shard": manifest["shards"][0], "highest_label": 7, "unlabelled": None,
    }  # fmt: skip
    marker = folder / "set" / MARKER_NAME
    marker.write_text(json.dumps(entry))

    def read() -> None:
        line = marker.read_bytes().replace(b"\n", b" ")
        marker.write_bytes(b"\n" + line + b"\n")
        pack(folder / "set")
        assert contents(folder / "set") == expected
        (folder / "set" / "manifest.json").unlink()

    return marker, read


RECORDS = {"set": a_set, "run": a_run, "samples": samples, "journal": a_journal}


@pytest.mark.parametrize("kind", RECORDS)
def test_any_json_in_a_record_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    record, read = RECORDS[kind](tmp_path)
    sound = json.loads(record.read_bytes())

    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(places(sound)), JSON)
    def check(place: tuple[Any, ...], value: Any) -> None:
        record.write_text(json.dumps(replaced(sound, place, value)))
        with suppress(UserError):
            read()

    check()


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"", b"{}", b"\xff\xfe", b"[" * 100_000, '{"a": "\xe9"}'.encode("latin-1")],
    ids=["list", "null", "empty", "nothing", "mark", "deep", "latin"],
)
def test_a_record_of_something_else_is_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    record, read = RECORDS[kind](tmp_path)
    record.write_bytes(content)
    with suppress(UserError):
        read()


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", "{}".encode("utf-16")])
def test_the_file_at_fault_is_named(tmp_path: Path, content: bytes) -> None:
    record, read = RECORDS["set"](tmp_path)
    record.write_bytes(content)
    with pytest.raises(UserError) as refused:
        read()
    assert record.name in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["set", "run", "samples"])
def test_other_encodings_of_json_are_read(tmp_path: Path, kind: str, encoding: str) -> None:
    record, read = RECORDS[kind](tmp_path)
    record.write_text(record.read_text("utf-8"), encoding=encoding)
    read()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(20, np.float64),
        np.zeros((5, 4), np.uint8),
        np.zeros(20, [("key", "S1"), ("offset", "<u8")]),
        np.array(7),
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    folder = pack(tmp_path / "set", per_shard=20)
    np.save(folder / "shard-000000.index.npy", array)
    with pytest.raises(UserError, match=r"shard-000000\.index\.npy"):
        open_shards(folder).indexes[0]
    # Even if the manifest was made to match.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["index_sha256"] = sha256_of(folder / "shard-000000.index.npy")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard-000000\.index\.npy"):
        open_shards(folder).indexes[0]
