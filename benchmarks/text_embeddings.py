"""Training with embeddings of captions packed, and encoded in training: images/s and memory.

    python benchmarks/text_embeddings.py

The network of numbers-text is trained on the numbers by three ways in turn, each repetition in a
process of its own: embeddings packed with the shards; captions encoded in training, where an
encoder keeps the embeddings of captions that it has met (the numbers have few); and captions of
which none comes twice, as in sets from the web. Memory is the most that the process held resident,
the encoder included. `--json FILE` keeps all figures.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
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
from ddpm_engine.data.packing.pack import write_shards
from ddpm_engine.data.packing.sources.registry import open_source
from ddpm_engine.data.packing.sources.source import Example, LazyExamples, Source
from ddpm_engine.networks.text.folders import open_text_encoder
from ddpm_engine.presets import PRESETS

WAYS = ("packed", "in training", "in training, each new")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    rounds: Positive = 5
    """Number of repetitions of each way."""
    steps: Annotated[int, Ge(2)] = 60
    """Steps that are timed in each."""
    warm_up: Positive = 10
    """Steps before them."""
    images: Positive = 2400
    """Number of images in each set."""
    json: Path | None = None
    """File for all results."""


def each_new(source: Source, count: int) -> Source:
    """Give every image captions of its own."""

    def load(number: int) -> Example:
        example = source.examples[number]
        return example._replace(
            captions=tuple(f"{caption}, image {number}" for caption in example.captions)
        )

    return replace(source, examples=LazyExamples(range(count), load))


def pack(folder: Path, preset: RunConfig, images: int) -> None:
    """Pack the set of every way."""
    few = spread_over(open_source("numbers", captions=True), images)
    encoder = open_text_encoder(preset.data.text_encoder or "")
    size = preset.model.sample_size
    write_shards(few, folder / WAYS[0], size=size, text_encoder=encoder)
    write_shards(few, folder / WAYS[1], size=size)
    write_shards(each_new(few, len(few.examples)), folder / WAYS[2], size=size)


def configured(preset: RunConfig, folder: Path, way: str) -> RunConfig:
    """Return a run of the preset that gets embeddings this way."""
    encoder = None if way == WAYS[0] else preset.data.text_encoder
    data = replace(
        preset.data, path=folder / way, source=None, text_encoder=encoder, text_length=16
    )
    return replace(preset, data=data)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines that show all rows."""
    cells = [(row.name, figure(row.images_per_second, 0), figure(row.megabytes, 0)) for row in rows]
    return aligned(("embeddings of captions", "images/s", "MB"), cells)


def main() -> None:
    """Pack, train, print."""
    with exit_in_one_line():
        options = parse_options(Options)
        machine: dict[str, Any] = facts(torch.device("cpu"))
        preset = PRESETS["numbers-text"]()
        with tempfile.TemporaryDirectory() as folder:
            pack(Path(folder), preset, options.images)
            ways = {
                way: partial(
                    train_briefly,
                    configured(preset, Path(folder), way), options.warm_up, options.steps,
                )
                for way in WAYS
            }  # fmt: skip
            rows = measured(options.rounds, ways)
        print("\n".join(table(rows)))
        if options.json is not None:
            machine["load_average_after"] = facts(torch.device("cpu"))["load_average"]
            about = {"machine": machine, "rounds": options.rounds, "steps": options.steps}
            write_json(options.json, {**about, "images": options.images, "rows": rows})


if __name__ == "__main__":
    main()
