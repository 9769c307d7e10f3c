"""Chains of models beside the direct one: `python benchmarks/text_cascade.py`.

Images of numbers are generated from words in three ways, with the same seeds and prompts:

    direct       one model of 16×32 (the preset numbers-text)
    cascade      a base model of 8×16 and a text-conditional super-resolution model (numbers-base,
                 numbers-upscale; Saharia et al. 2022), at each augmentation level
    prior        a prior of image embeddings and a decoder (numbers-prior, numbers-decoder; Ramesh
                 et al. 2022)

Reported are the shares of held-out and of trained numbers whose digits are both right, by seed; the
Fréchet distance to real images, of all numbers in turn; and images per second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

from benchmarks.number_samples.metrics import NumberMetrics, Sampleable, images_of, in_turn
from benchmarks.text_to_image import KINDS, by_seed, load
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json

from ddpm_engine.bounds import Ge, Le
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.data.packing.sources.numbers import ALL, in_words
from ddpm_engine.diffusion.config import MAX_LEVEL
from ddpm_engine.generation.chain import Cascade
from ddpm_engine.runtime import local_device


@dataclass(frozen=True)
class Options:
    """Accuracy and distance of chains of models, beside the direct model's."""

    direct: Path = Path("runs/numbers-text")
    """Run directory of the model that does it alone."""
    base: Path | None = Path("runs/numbers-base")
    """Run directory of the cascade's first model; None: no cascade."""
    upscaler: Path = Path("runs/numbers-upscale")
    """Run directory of its second."""
    prior: Path | None = Path("runs/numbers-prior")
    """Run directory of the prior; None: none."""
    decoder: Path = Path("runs/numbers-decoder")
    """Run directory of its decoder."""
    count: Positive = 100
    """Prompts of each kind and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noise."""
    compared: Annotated[int, Ge(2)] = 540
    """Samples that a distance is computed of."""
    guidance: float = 3.0
    """Guidance scale of all models; 1 is no guidance."""
    decoder_guidance: float = 1.0
    """Guidance scale of the decoder, which the embedding tells all."""
    levels: tuple[Annotated[int, Ge(0), Le(MAX_LEVEL)], ...] = (0, 50, 100)
    """Augmentation levels of the cascade."""
    steps: PositiveOrNone = None
    """Steps per sample and model; default: the runs'."""
    json: Path | None = None
    """File for everything, as JSON."""


def measured(
    name: str,
    model: Sampleable,
    metrics: NumberMetrics,
    count: int,
    seeds: Sequence[int],
    compared: int,
    **options: Any,
) -> dict[str, Any]:
    """Measure one way of generating, and print what was found.

    Args:
        name: of the way.
        model: or chain.
        metrics: of images of its size.
        count: prompts of each kind and seed.
        seeds: of the noise.
        compared: samples that the distance is computed of.
        options: of the request.
    """
    found: dict[str, Any] = {"name": name}
    for kind, numbers in KINDS.items():
        asked = in_turn(numbers, count)
        found[kind] = by_seed(model, metrics, in_words, asked, seeds, **options)
    started = time.perf_counter()
    images = images_of(model, in_words, in_turn(ALL, compared), seeds[0], **options)
    found["images_per_second"] = compared / (time.perf_counter() - started)
    found["distance"] = metrics.distance(images)
    shares = "  ".join(
        f"{kind} {' '.join(f'{share:.1%}' for share in found[kind])}" for kind in KINDS
    )
    print(
        f"{name:<22} {shares}  distance {found['distance']:.3f}  "
        f"{found['images_per_second']:.1f} images/s",
        flush=True,
    )
    return found


def main() -> None:
    """Generate in each way, read, report."""
    with exit_on_error(Options):
        options = parse_options(Options)
        direct = load(options.direct)
        metrics = NumberMetrics(direct.image_shape[1])
        device = local_device()
        ways: list[tuple[str, Sampleable, dict[str, Any]]] = [("direct", direct, {})]
        if options.base is not None:
            cascade = Cascade([options.base, options.upscaler], device)
            ways += [
                (f"cascade, level {level}", cascade, {"augmentation_level": level})
                for level in options.levels
            ]
        if options.prior is not None:
            chain = Cascade([options.prior, options.decoder], device)
            stages = [{}, {"guidance": options.decoder_guidance}]
            ways.append(("prior and decoder", chain, {"stages": stages}))
        shared = {"guidance": options.guidance, "steps": options.steps}
        rows = [
            measured(
                name, model, metrics, options.count, options.seeds, options.compared,
                **shared, **own,
            )
            for name, model, own in ways
        ]  # fmt: skip
        if options.json is not None:
            settings = {
                name: getattr(options, name)
                for name in ("count", "compared", "guidance", "decoder_guidance", "steps")
            }
            report = {
                "machine": facts(device),
                "models": {
                    name: str(getattr(options, name))
                    for name in ("direct", "base", "upscaler", "prior", "decoder")
                },
                "settings": {**settings, "seeds": list(options.seeds)},
                "accuracy_of_real": metrics.of_real,
                "ways": rows,
            }
            write_json(options.json, report)


if __name__ == "__main__":
    main()
