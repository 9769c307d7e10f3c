from __future__ import annotations

import io
import itertools
import json
import logging
import pickle
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.data.conftest import Server
from tests.data.sets import PIXELS, Bomb, flip, pack, write_tar

from ddpm_engine.config import RunConfig, load_config
from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.stream import ShardStream, is_stream
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import encode
from ddpm_engine.training.trainer import Trainer

SHARDS = "shard-{000000..000002}.tar"


def test_what_is_a_stream() -> None:
    for location in ("pipe:cat x", "https://h/s-{0..9}.tar", "https://h/a.tar?token=1", "d/a.tar"):
        assert is_stream(location)
    for location in ("https://h/set", "data/set", "data/set.tar.d"):
        assert not is_stream(location)


def test_all_samples_of_all_shards_come_with_labels(server: Server) -> None:
    pack(server.folder, classes=tuple("abcde"))
    stream = ShardStream(f"{server.url}/{SHARDS}", 8, 3, classes=5)
    found = {}
    for sample in itertools.islice(stream, 3000):
        (number,) = np.flatnonzero((PIXELS[:20] == sample.image).all((1, 2, 3)))
        found[int(number)] = sample.label
        assert not sample.faults
    assert found == {number: number % 5 for number in range(20)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_positions_are_those_of_the_step_and_place(server: Server, workers: int) -> None:
    pack(server.folder)
    stream = ShardStream(f"{server.url}/{SHARDS}", 4, 1)
    positions = BatchPositions(8, rank=1, world_size=2, accumulation=2, start_step=3, end_step=6)
    batches = list(make_batches(stream, positions, workers))
    assert [batch.positions.tolist() for batch in batches] == list(positions)
    assert all(batch.images.shape == (2, 1, 4, 4) for batch in batches)
    # Every iterator samples independently: three steps of equal images would be no chance.
    again = list(make_batches(stream, positions, workers))
    assert any(
        not np.array_equal(one.images, other.images)
        for one, other in zip(batches, again, strict=True)
    )


def test_training_on_a_stream_warns_and_resumes(
    config: RunConfig, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    pack(server.folder)
    config = replace(config, data=replace(config.data, path=f"{server.url}/{SHARDS}"))
    with caplog.at_level(logging.WARNING):
        Trainer(replace(config, training=replace(config.training, steps=2))).fit()
    assert "with replacement" in caplog.text
    assert load_config(config.out).data.path == config.data.path
    Trainer(config).fit()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["samples_seen"] == 16


def test_bad_samples_are_left_out_and_named_and_nothing_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bomb, png = pickle.dumps(Bomb()), encode(PIXELS[0], "png")
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + png[24:29]
    huge = png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]
    pickled = io.BytesIO()
    np.save(pickled, np.array([Bomb()], dtype=object), allow_pickle=True)
    images = [("png", png), ("png", huge), ("npy", pickled.getvalue()), ("png", b""), ("png", png)]
    write_tar(
        tmp_path / "a.tar",
        ("0.pyd", bomb),
        ("0.pth", bomb),
        *(
            member
            for i, (extension, payload) in enumerate(images)
            for member in ((f"{i}.{extension}", payload), (f"{i}.cls", b"7" if i == 4 else b"0"))
        ),
        ("5.cls", b"0"),
    )
    stream = ShardStream(str(tmp_path / "a.tar"), 8, 3, classes=2)
    samples = list(itertools.islice(stream, 300))
    assert all(np.array_equal(sample.image, PIXELS[0]) for sample in samples)
    faults = {fault.key: fault.reason for sample in samples for fault in sample.faults}
    assert set(faults) == {"1", "2", "3", "4", "5"}
    assert "900000000 pixels" in faults["1"]
    assert "label 7" in faults["4"]
    assert "no image" in faults["5"]
    assert not (tmp_path / "executed").exists()


def test_a_shard_that_is_cut_short_is_named_and_others_are_read(server: Server) -> None:
    pack(server.folder)
    server.faults["/shard-000000.tar"] = ["cut"] * 10_000
    stream = ShardStream(f"{server.url}/{SHARDS}", 8, 3)
    faults = [f for sample in itertools.islice(stream, 500) for f in sample.faults]
    assert {fault.shard for fault in faults} == {f"{server.url}/shard-000000.tar"}
    assert all("ended after" in fault.reason for fault in faults)


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    png = encode(PIXELS[0], "png")
    path = tmp_path / "a.tar"
    write_tar(path, *((f"{i}.png", png) for i in range(40)))
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[20].offset
    flip(path, offset + 3)
    stream = ShardStream(str(path), 8, 3)
    faults = [f for sample in itertools.islice(stream, 300) for f in sample.faults]
    assert all("damaged header" in fault.reason for fault in faults)
    assert faults


def test_a_stream_of_nothing_ends_with_a_message(server: Server) -> None:
    stream = ShardStream(f"{server.url}/nowhere-{{0..3}}.tar", 8, 3)
    with pytest.raises(UserError, match=r"in a row of .*nowhere.*404"):
        next(iter(stream))


def test_commands_run_only_with_permission(tmp_path: Path) -> None:
    pack(tmp_path / "set")
    pattern = f"pipe:cat {tmp_path / 'set'}/shard-{{000000..000002}}.tar"
    with pytest.raises(UserError, match=r"`data\.allow_pipe`"):
        ShardStream(pattern, 8, 3)
    with pytest.raises(UserError, match="run a command"):
        ShardStream(f"{tmp_path}/{{a.tar,pipe:touch x}}".replace(f"{tmp_path}/", "", 1), 8, 3)
    assert next(iter(ShardStream(pattern, 8, 3, allow_pipe=True))).image.shape == (8, 8, 3)


def test_other_stores_are_streamed_through_their_back_end(tmp_path: Path) -> None:
    pack(tmp_path)
    stream = ShardStream(f"file://{tmp_path}/{SHARDS}", 8, 3)
    assert not next(iter(stream)).faults
    with pytest.raises(UserError, match="unknown scheme, nowhere"):
        ShardStream("nowhere://bucket/a.tar", 8, 3)
