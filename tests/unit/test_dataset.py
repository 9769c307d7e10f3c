from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from ddpm_engine.data.dataset import Batch, ShardDataset
from ddpm_engine.data.loader import BatchPositions, make_loader
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, Source
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import fit

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)


def pack(folder: Path, labels: bool = True) -> Path:
    examples = [Example(f"{i:08d}", PIXELS[i], i if labels else None) for i in range(30)]
    write_shards(Source("memory", examples), folder, per_shard=8)
    return folder


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "set")


def batches(folder: Path, positions: Iterable[list[int]], workers: int = 0) -> list[Batch]:
    return list(make_loader(ShardDataset(folder, seed=5), positions, workers))


def damage(folder: Path, sample: int) -> None:
    shards = open_shards(folder)
    entry = shards.indexes[sample // 8][sample % 8]
    path = folder / shards.manifest.shards[sample // 8].name
    content = bytearray(path.read_bytes())
    content[int(entry["offset"] + entry["size"] - 20)] ^= 1
    path.write_bytes(content)


def test_an_epoch_holds_every_image_once_with_its_label(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=5, window_shards=2)
    samples = [dataset[p] for p in range(30)]
    assert sorted(s.label for s in samples) == list(range(30))
    assert all(np.array_equal(s.image, PIXELS[s.label]) for s in samples)
    assert [s.position for s in samples] == list(range(30))
    many = dataset.__getitems__([3, 40, 7])
    assert [s.label for s in many] == [dataset[p].label for p in (3, 40, 7)]
    assert len(dataset) == 30
    assert dataset.shape == (3, 6, 6)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_workers(packed: Path, workers: int) -> None:
    positions = BatchPositions(8, accumulation=2, end_step=5)
    expected = batches(packed, positions)
    got = batches(packed, positions, workers)
    assert len(got) == 10
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.images, other.images)
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.positions, other.positions)


def test_a_run_resumes_anywhere_on_another_world_size(packed: Path) -> None:
    whole = batches(packed, BatchPositions(12, end_step=6))
    for rank in range(3):
        resumed = batches(packed, BatchPositions(12, rank, 3, start_step=4, end_step=6))
        for one, other in zip(whole[4:], resumed, strict=True):
            assert torch.equal(one.images[rank * 4 : rank * 4 + 4], other.images)


def test_batches_are_uint8_channels_last_and_labels_may_be_absent(tmp_path: Path) -> None:
    (batch,) = batches(pack(tmp_path / "set", labels=False), [[2, 0, 1]])
    assert batch.images.shape == (3, 3, 6, 6)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels is None
    assert batch.positions.tolist() == [2, 0, 1]
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.faults is batch.faults


def test_webdatasets_own_reader_sees_the_same_images(packed: Path) -> None:
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = list(reader.decode("rgb8").to_tuple("png", "cls"))
    assert [label for _, label in samples] == list(range(30))
    assert all(np.array_equal(image, PIXELS[label]) for image, label in samples)


def test_images_are_fitted_and_converted_on_request(packed: Path) -> None:
    sample = ShardDataset(packed, seed=5, size=4, channels=1)[0]
    assert sample.image.shape == (4, 4, 1)
    coloured = ShardDataset(packed, seed=5, size=4)[0]
    assert np.array_equal(coloured.image, fit(PIXELS[coloured.label], 4))
    with pytest.raises(UserError, match="size"):
        ShardDataset(packed, seed=5, size=0)
    with pytest.raises(UserError, match="channels"):
        ShardDataset(packed, seed=5, channels=4)


def test_a_damaged_sample_is_replaced_and_named_and_nothing_else_moves(packed: Path) -> None:
    sound = ShardDataset(packed, seed=5)
    damage(packed, 13)
    dataset = ShardDataset(packed, seed=5)
    (place,) = (p for p in range(30) if sound.order.sample_at(p) == 13)
    for position in range(30):
        sample = dataset[position]
        if position != place:
            assert sample.faults == ()
            assert sample.label == sound.order.sample_at(position)
    replaced = dataset[place]
    assert replaced.label != 13
    assert np.array_equal(replaced.image, PIXELS[replaced.label])
    (fault,) = replaced.faults
    assert (fault.shard, fault.key) == ("shard-000001.tar", "00000013")
    assert "checksum" in fault.reason
    # The substitute, too, depends on the position alone.
    assert ShardDataset(packed, seed=5)[place].label == replaced.label
    (batch,) = batches(packed, [[place, 0]], workers=1)
    assert batch.faults == [fault]


def test_shards_that_are_cut_short_or_vanish_while_reading(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=5)
    path = packed / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:1500])
    (packed / "shard-000003.tar").unlink()
    samples = [dataset[p] for p in range(30)]
    reasons = {f.shard: f.reason for s in samples for f in s.faults}
    assert "ends" in reasons["shard-000000.tar"]
    assert "No such file" in reasons["shard-000003.tar"]
    assert all(np.array_equal(s.image, PIXELS[s.label]) for s in samples)


def test_a_set_with_nothing_left_stops_with_a_message(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=5)
    for path in packed.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="Verify"):
        dataset[0]


def test_a_dataset_can_be_pickled_while_files_are_open(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=5)
    first = dataset[0]
    assert pickle.loads(pickle.dumps(dataset))[0].label == first.label


def test_few_files_are_open_at_a_time(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_engine.data.shards.reader.MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardDataset(packed, seed=5)
    assert sorted(dataset[p].label for p in range(30)) == list(range(30))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_workers_below_zero_are_refused(packed: Path) -> None:
    with pytest.raises(UserError, match="workers"):
        make_loader(ShardDataset(packed, seed=5), [[0]], workers=-1)


LOADER_SCRIPT = """
import sys, multiprocessing
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.loader import BatchPositions, make_loader
loader = make_loader(ShardDataset(sys.argv[1], seed=5), BatchPositions(4), workers=2)
batches = iter(loader)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
sys.stdin.readline()
for _ in range(20):
    next(batches)
print("done", flush=True)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_survive_the_schedulers_signals_and_end_with_the_program(packed: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOADER_SCRIPT, str(packed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for worker in workers:
            os.kill(worker, number)
    # The iterator is still alive when the program ends, the hard case for worker clean-up.
    output, _ = process.communicate("\n", timeout=60)
    assert output == "done\n"
    assert process.returncode == 0
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the program"
        time.sleep(0.05)
