"""A set of shards as a dataset by position, and its batches."""

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
from tests.data.sets import PIXELS, flip, pack

from ddpm_engine.data.dataset import Batch, ShardDataset
from ddpm_engine.data.loader import BatchPositions, make_loader
from ddpm_engine.errors import UserError
from ddpm_engine.images.codec import fit

COUNT = 30


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return pack(tmp_path / "set", count=COUNT)


def batches(folder: Path, positions: Iterable[list[int]], workers: int = 0) -> list[Batch]:
    return list(make_loader(ShardDataset(folder, seed=5), positions, workers))


def test_an_epoch_holds_every_image_once_with_its_label(packed: Path) -> None:
    dataset = ShardDataset(packed, seed=5, window_shards=2)
    samples = [dataset[p] for p in range(COUNT)]
    assert sorted(s.label for s in samples) == list(range(COUNT))
    assert all(np.array_equal(s.image, PIXELS[s.label]) for s in samples)
    assert [s.position for s in samples] == list(range(COUNT))
    assert pickle.loads(pickle.dumps(dataset))[0].label == samples[0].label  # with files open
    many = dataset.__getitems__([3, 40, 7])
    assert [s.label for s in many] == [dataset[p].label for p in (3, 40, 7)]
    assert len(dataset) == COUNT
    assert dataset.shape == (3, 8, 8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_workers_or_world_size(packed: Path) -> None:
    positions = BatchPositions(8, accumulation=2, end_step=5)
    expected = batches(packed, positions)
    got = batches(packed, positions, workers=3)
    assert len(got) == 10
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one.images, other.images)
        assert other.images.dtype == torch.uint8
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert one.labels is not None
        assert other.labels is not None
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.positions, other.positions)
    # A run resumes anywhere, on another world size.
    whole = batches(packed, BatchPositions(12, end_step=6))
    for rank in range(3):
        resumed = batches(packed, BatchPositions(12, rank, 3, start_step=4, end_step=6))
        for one, other in zip(whole[4:], resumed, strict=True):
            assert torch.equal(one.images[rank * 4 : rank * 4 + 4], other.images)


def test_labels_may_be_absent(tmp_path: Path) -> None:
    (batch,) = batches(pack(tmp_path / "set", labels=False), [[2, 0, 1]])
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.labels is None
    assert batch.positions.tolist() == [2, 0, 1]
    assert batch.to("meta").images.device.type == "meta"


def test_webdatasets_own_reader_sees_the_same_images(packed: Path) -> None:
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = list(reader.decode("rgb8").to_tuple("png", "cls"))
    assert [label for _, label in samples] == list(range(COUNT))
    assert all(np.array_equal(image, PIXELS[label]) for image, label in samples)


def test_images_are_fitted_and_converted_on_request(packed: Path) -> None:
    assert ShardDataset(packed, seed=5, size=4, channels=1)[0].image.shape == (4, 4, 1)
    coloured = ShardDataset(packed, seed=5, size=4)[0]
    assert np.array_equal(coloured.image, fit(PIXELS[coloured.label], 4))
    with pytest.raises(UserError, match="size"):
        ShardDataset(packed, seed=5, size=0)
    with pytest.raises(UserError, match="channels"):
        ShardDataset(packed, seed=5, channels=4)
    with pytest.raises(UserError, match="workers"):
        make_loader(ShardDataset(packed, seed=5), [[0]], workers=-1)


def test_a_damaged_sample_is_replaced_and_named_and_nothing_else_moves(packed: Path) -> None:
    sound = ShardDataset(packed, seed=5)
    entry = sound.shards.indexes[1][5]
    flip(packed / "shard-000001.tar", int(entry["offset"] + entry["size"] - 20))
    dataset = ShardDataset(packed, seed=5)
    (place,) = (p for p in range(COUNT) if sound.order.sample_at(p) == 13)
    for position in set(range(COUNT)) - {place}:
        sample = dataset[position]
        assert (sample.faults, sample.label) == ((), sound.order.sample_at(position))
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
    samples = [dataset[p] for p in range(COUNT)]
    reasons = {f.shard: f.reason for s in samples for f in s.faults}
    assert "ends" in reasons["shard-000000.tar"]
    assert "No such file" in reasons["shard-000003.tar"]
    assert all(np.array_equal(s.image, PIXELS[s.label]) for s in samples)
    for other in packed.glob("*.tar"):
        other.unlink()
    with pytest.raises(UserError, match=r"64 samples in a row .*Verify"):
        ShardDataset(dataset.shards, seed=5)[0]


def test_few_files_are_open_at_a_time(packed: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    dataset = ShardDataset(packed, seed=5, window_shards=1)
    assert sorted(dataset[p].label for p in range(COUNT)) == list(range(COUNT))
    # Those of one window, and one for substitutes; the set has four.
    assert len(os.listdir("/proc/self/fd")) <= before + 2


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
