"""Training on stored latents, and on latents encoded in training: images/s, memory, bytes on disk.

    python benchmarks/latent_moments.py --autoencoder runs/numbers-autoencoder

The network of numbers-latents is trained on the numbers by three ways in turn, each repetition in a
process of its own: moments that were packed; moments that the same autoencoder computes of each
batch in training, as a training loop does that stores no latents; and, for scale, the pixels
themselves by the network of numbers-text. Memory is the most that the process held resident, the
autoencoder included. Bytes are those of shards without captions. `--json FILE` keeps all figures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import torch
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import aligned, figure, write_json
from benchmarks.throughput.short_runs import Row, measured, spread_over, train_briefly

from ddpm_engine.bounds import Ge
from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.cli.options import Positive, parse_options
from ddpm_engine.config import RunConfig
from ddpm_engine.data.dataset import Batch, ShardDataset
from ddpm_engine.data.loader import BatchPositions, make_batches
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.networks.autoencoder.folders import open_autoencoder
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.presets import PRESETS
from ddpm_engine.training.trainer import Trainer

STORED, ENCODED, PIXELS = "latents, stored", "latents, encoded in training", "pixels"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    autoencoder: str = "runs/numbers-autoencoder"
    """Autoencoder of the numbers: a run, or a folder of diffusers."""
    rounds: Positive = 5
    """Number of repetitions of each way."""
    steps: Annotated[int, Ge(2)] = 60
    """Steps that are timed in each."""
    warm_up: Positive = 10
    """Steps before them."""
    images: Positive = 2400
    """Number of images in the set."""
    json: Path | None = None
    """File for all results."""


class EncodingTrainer(Trainer):
    """Trains on the moments that an autoencoder computes of each batch of images."""

    def _batches(self) -> Iterator[Batch]:
        config = self.run.config
        assert config.data.autoencoder is not None
        autoencoder = open_autoencoder(config.data.autoencoder)
        images = ShardDataset(Path(str(config.data.path)).parent / PIXELS, config.training.seed)
        positions = BatchPositions(config.training.batch_size, end_step=config.training.steps)
        for batch in make_batches(images, positions):
            yield replace(batch, images=autoencoder.moments(batch.images).half())


def pack(folder: Path, preset: RunConfig, autoencoder: str, images: int) -> dict[str, float]:
    """Pack some of the numbers, as images and as latents.

    Returns:
        Bytes on disk for each image, as images, as moments, and as moments of both directions.
    """
    source = spread_over(open_source("numbers", captions=True), images)
    encoder = open_text_encoder(preset.data.text_encoder or "")
    latents = open_autoencoder(autoencoder)
    write_shards(source, folder / PIXELS, text_encoder=encoder)
    write_shards(source, folder / STORED, text_encoder=encoder, autoencoder=latents)
    plain = spread_over(open_source("numbers"), images)
    sizes = {}
    for name, encoded, flips in (
        ("images", False, False),
        ("moments", True, False),
        ("moments, also mirrored", True, True),
    ):
        write_shards(plain, folder / name, autoencoder=latents if encoded else None, flips=flips)
        files = (folder / name).glob("*.tar")
        sizes[name] = sum(file.stat().st_size for file in files) / len(source.examples)
    return sizes


def configured(folder: Path, way: str, autoencoder: str) -> RunConfig:
    """Return a run that is trained this way."""
    preset = PRESETS["numbers-text" if way == PIXELS else "numbers-latents"]()
    data = replace(
        preset.data,
        path=folder / (PIXELS if way == PIXELS else STORED),
        source=None,
        text_encoder=None,
        autoencoder=None if way == PIXELS else autoencoder,
    )
    return replace(preset, data=data)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines that show all rows."""
    cells = [(row.name, figure(row.images_per_second, 0), figure(row.megabytes, 0)) for row in rows]
    return aligned(("training on", "images/s", "MB"), cells)


def main() -> None:
    """Pack, train, print."""
    with exit_in_one_line():
        options = parse_options(Options)
        machine: dict[str, Any] = facts(torch.device("cpu"))
        with tempfile.TemporaryDirectory() as folder:
            sizes = pack(
                Path(folder), PRESETS["numbers-latents"](), options.autoencoder, options.images
            )
            ways = {
                way: partial(
                    train_briefly,
                    configured(Path(folder), way, options.autoencoder),
                    options.warm_up,
                    options.steps,
                    EncodingTrainer if way == ENCODED else Trainer,
                )
                for way in (STORED, ENCODED, PIXELS)
            }
            rows = measured(options.rounds, ways)
        print("\n".join(table(rows)))
        print("\nbytes on disk for each image, in tar files")
        for name, size in sizes.items():
            print(f"    {name:<24}{size:>8,.0f}")
        if options.json is not None:
            machine["load_average_after"] = facts(torch.device("cpu"))["load_average"]
            about = {"machine": machine, "rounds": options.rounds, "steps": options.steps}
            write_json(
                options.json,
                {**about, "images": options.images, "rows": rows, "bytes_per_image": sizes},
            )


if __name__ == "__main__":
    main()
