"""Images per second that one process reads from shards: `python benchmarks/data_loading.py`.

The same images, as 32×32 npy, 64×64 png and 256×256 jpg, are read in random order by the engine
(an index, one `pread` per image), by WebDataset's usual pipeline over the same shards (a stream,
mixed in a buffer of 1000), and from a folder with one file per image, listed beforehand. All of
them decode to uint8 arrays and stack batches of 64; files are in the system's cache.

Before anything is timed, the three must have read the same images with the same labels; otherwise
there is no figure, and the exit status is 1. Then they are timed in turn. The committed figures
were made with `--json benchmarks/results/data_loading.json`.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import PIL
import torch
import webdataset
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned, figure, write_json
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups, timed
from PIL import Image
from torch.utils.data import DataLoader

from ddpm_engine.bounds import Ge
from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.cli.options import Positive, parse_options
from ddpm_engine.data.dataset import ShardDataset
from ddpm_engine.data.loader import make_loader
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source
from ddpm_engine.data.shuffle import Order
from ddpm_engine.presets import PRESETS
from ddpm_engine.training.trainer import Trainer

BATCH = 64
CPU = torch.device("cpu")

Epoch = Callable[[], Iterator[tuple[Any, Any]]]
"""Batches of uint8 images `[B, …]` and labels `[B]`."""


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    images: Positive = 1024
    """Number of images in each set."""
    rounds: Positive = 9
    """Number of repetitions of each method."""
    training_steps: Annotated[int, Ge(0)] = 60
    """Number of steps of the digits preset whose share of waiting for data is reported; 0: none."""
    json: Path | None = None
    """File for all results."""


@dataclass(frozen=True)
class Row:
    """A method and its figures."""

    name: str
    images_per_second: Spread
    speed_up: Spread
    """Over WebDataset's pipeline, of paired repetitions."""


def make_example(size: int, number: int) -> Example:
    """Make smooth colours with a little noise, so that png and jpg compress as photographs do."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    noise = generator.integers(-6, 7, smooth.shape)
    image = np.clip(smooth.astype(int) + noise, 0, 255).astype(np.uint8)
    return Example(f"{number:08d}", image, number % 10)


def engine(shards: Path) -> Epoch:
    """Read by position."""
    dataset = ShardDataset(shards, seed=0)

    def epoch() -> Iterator[tuple[Any, Any]]:
        count = len(dataset)
        places = [list(range(i, min(i + BATCH, count))) for i in range(0, count, BATCH)]
        for batch in make_loader(dataset, places):
            yield batch.images.permute(0, 2, 3, 1).numpy(), batch.labels

    return epoch


def usual_pipeline(shards: Path, extension: str) -> Epoch:
    """Read by WebDataset as its documentation does."""
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    # WebDataset decodes npy by itself, and images to uint8 arrays by this name.
    decoders = [] if extension == "npy" else ["rgb8"]

    def epoch() -> Iterator[tuple[Any, Any]]:
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=100)
            .shuffle(1000)
            .decode(*decoders)
            .to_tuple(extension, "cls")
            .batched(BATCH)
        )
        for images, labels in DataLoader(dataset, batch_size=None):
            yield np.stack(list(images)), labels

    return epoch


def folder_of_files(folder: Path, extension: str) -> Epoch:
    """Read one file per image in class folders, as ImageFolder does."""
    files = [(path, int(path.parent.name)) for path in sorted(folder.glob(f"*/*.{extension}"))]

    def read(path: Path) -> np.ndarray:
        if extension == "npy":
            content: np.ndarray = np.load(path)
            return content
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))

    def epoch() -> Iterator[tuple[Any, Any]]:
        order = random.sample(files, len(files))
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            yield np.stack([read(path) for path, _ in part]), np.array([label for _, label in part])

    return epoch


def content(epoch: Epoch) -> Counter[tuple[bytes, int]]:
    """Count how often each image with its label comes in an epoch."""
    seen: Counter[tuple[bytes, int]] = Counter()
    for images, labels in epoch():
        for image, label in zip(images, labels, strict=True):
            seen[sha256(np.ascontiguousarray(image).tobytes()).digest(), int(label)] += 1
    return seen


def exhaust(epoch: Epoch) -> None:
    """Read an epoch and drop it."""
    for _ in epoch():
        pass


def measure(size: int, extension: str, options: Options, folder: Path) -> list[Row] | str:
    """Return the figures of a set, or why there are none."""
    examples = LazyExamples(range(options.images), partial(make_example, size))
    write_shards(Source("images", examples), folder / "set", None, None, 256, extension)
    for path in sorted((folder / "set").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            target = folder / "files" / sample["cls"].decode() / f"{sample['__key__']}.{extension}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(sample[extension])
    ways = {
        "WebDataset's pipeline": usual_pipeline(folder / "set", extension),
        "a file an image": folder_of_files(folder / "files", extension),
        "engine": engine(folder / "set"),
    }
    seen = {name: content(way) for name, way in ways.items()}
    baseline = next(iter(ways))
    for name, found in seen.items():
        if found != seen[baseline] or found.total() != options.images:
            return f"{name} reads other images than {baseline}"
    works = {name: partial(timed, partial(exhaust, way), CPU) for name, way in ways.items()}
    seconds = interleaved(options.rounds, works)
    return [
        Row(name, rates(took, options.images), speed_ups(seconds[baseline], took))
        for name, took in seconds.items()
    ]


def look_ups(rounds: int) -> dict[str, Spread]:
    """Return microseconds per look-up in 10⁵ shards of 10⁴ samples, for some batch sizes."""
    order = Order([10_000] * 100_000, seed=0)
    order.samples_at([0])
    figures = {}
    for batch in (8, 64, 512):
        steps = [np.arange(batch) + step * 1024 * batch for step in range(20 * rounds)]
        seconds = [timed(partial(order.samples_at, step), CPU) for step in steps]
        figures[str(batch)] = Spread.of([1e6 * took / batch for took in seconds])
    return figures


def waiting_share(steps: int, folder: Path) -> float:
    """Return the percentage of its time that the digits preset waits for data in training."""
    import json

    preset = PRESETS["digits"]()
    logging.disable(logging.WARNING)
    Trainer(
        replace(
            preset,
            out=folder / "run",
            data=replace(preset.data, path=folder / "digits"),
            training=replace(preset.training, steps=steps),
            log=replace(preset.log, every=steps // 2, sample_every=0, tracker="none"),
        )
    ).fit()
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(last)["data_wait_percent"])


@exit_in_one_line()
def main() -> int:
    """Measure, print, write."""
    options = parse_options(Options)
    machine = facts(CPU) | {"webdataset": webdataset.__version__, "pillow": PIL.__version__}
    found: dict[str, Any] = {}
    print(f"{machine['device']}, load average {machine['load_average']}; one process, no workers\n")
    lines = []
    failures = []
    for size, extension in ((32, "npy"), (64, "png"), (256, "jpg")):
        name = f"{size}×{size} {extension}"
        print(f"measuring {name}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(size, extension, options, Path(folder))
        if isinstance(rows, str):
            failures.append(f"{name}: {rows}")
            continue
        found[name] = [asdict(row) for row in rows]
        lines += [
            [f"{name}: {row.name}", figure(row.images_per_second, 0), figure(row.speed_up, 2)]
            for row in rows
        ]
    print("\n".join(aligned(["way", "images/s", "×WebDataset"], lines)))
    found["look_up_microseconds"] = {k: asdict(v) for k, v in look_ups(options.rounds).items()}
    for batch, spread in found["look_up_microseconds"].items():
        print(f"look-up of a position, in batches of {batch}: {spread['median']:.1f} µs")
    if options.training_steps:
        with tempfile.TemporaryDirectory() as folder:
            found["data_wait_percent"] = waiting_share(options.training_steps, Path(folder))
        print(f"training digits waits for data {found['data_wait_percent']:.1f}% of its time")
    machine["load_average_after"] = facts(CPU)["load_average"]
    print(f"load average afterwards {machine['load_average_after']}")
    for failure in failures:
        print(f"FAILED {failure}")
    if options.json is not None:
        about = {"machine": machine, "images": options.images, "rounds": options.rounds}
        write_json(options.json, about | found)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
