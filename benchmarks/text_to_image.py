"""Do images show what their prompts say? `python benchmarks/text_to_image.py --checkpoint RUN`.

A model of the preset numbers-text, or numbers-latents, generates numbers from prompts, and a
classifier of real digits reads both digits of each image. Reported is the share that is right, by
seed:

    held out     of the eighteen numbers that training left out, from each kind of caption
    trained      of the others
    other words  of either, from prompts that are no caption: "42", "fourty two", "two-and-forty"
    guidance     of all numbers, and the Fréchet distance to real images, at each guidance scale,
                 with and without dynamic thresholding (Saharia et al. 2022), which latents do
                 not have
    curve        of held-out and trained numbers at each checkpoint that the run kept
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

from benchmarks.number_samples.metrics import (
    CAPTIONS,
    OTHER_WORDS,
    NumberMetrics,
    Phrase,
    Sampleable,
    images_of,
    in_turn,
    of_two_words,
)
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_json

from ddpm_engine.bounds import Ge, Gt, Le
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.checkpoints.store import CheckpointStore
from ddpm_engine.cli.options import Positive, PositiveOrNone, exit_on_error, parse_options
from ddpm_engine.data.packing.sources.numbers import ALL, HELD_OUT, TRAINED, in_words
from ddpm_engine.errors import UserError
from ddpm_engine.plots.captioned import captioned_grid
from ddpm_engine.plots.style import COLOURS, MARKS, saved
from ddpm_engine.runtime import local_device
from ddpm_engine.samplers.config import SamplerName

KINDS = {"held out": HELD_OUT, "trained": TRAINED}


@dataclass(frozen=True)
class Options:
    """Share of images that show the numbers of their prompts."""

    checkpoint: Path = Path("runs/numbers-text")
    """Run directory of a model of numbers conditioned on text."""
    count: Positive = 100
    """Prompts of each kind and seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noise."""
    guidance: float = 3.0
    """Guidance scale; 1 is no guidance."""
    scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
    """Guidance scales that are compared, ascending; of none, give one."""
    threshold: Annotated[float, Gt(0), Le(1)] = 0.995
    """Quantile of dynamic thresholding that they are compared with."""
    compared: Annotated[int, Ge(2)] = 270
    """Samples at each of these scales, of all numbers in turn."""
    sampler: SamplerName | None = None
    """Name of the sampler; default: the run's."""
    steps: PositiveOrNone = None
    """Steps per sample; default: the run's."""
    curve: bool = False
    """Accuracy at each checkpoint of the run, too."""
    json: Path | None = None
    """File for everything, as JSON."""
    plot: Path | None = None
    """File for a plot of accuracy and distance against the guidance scale."""
    curve_plot: Path | None = None
    """File for a plot of accuracy against training, with curve."""
    picture: Path | None = None
    """File for a grid of held-out numbers below their prompts, the wrong ones marked."""


def by_seed(
    model: Sampleable,
    metrics: NumberMetrics,
    phrase: Phrase,
    numbers: Sequence[int],
    seeds: Sequence[int],
    **options: Any,
) -> list[float]:
    """Share of images that show the numbers of their prompts, for each seed."""
    return [
        metrics.accuracy(images_of(model, phrase, numbers, seed, **options), numbers)
        for seed in seeds
    ]


def by_phrase(
    model: Sampleable, metrics: NumberMetrics, count: int, seeds: Sequence[int], **options: Any
) -> dict[str, dict[str, list[float]]]:
    """Shares by the kind of numbers, by phrase and by seed; printed as they are found."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, numbers in KINDS.items():
        found[kind] = {}
        for name, phrase in {**CAPTIONS, **OTHER_WORDS}.items():
            said = of_two_words(numbers) if name in OTHER_WORDS else numbers
            shares = by_seed(model, metrics, phrase, in_turn(said, count), seeds, **options)
            found[kind][name] = shares
            print(
                f"{kind:<9} {name:<23} {'  '.join(f'{share:.1%}' for share in shares)}", flush=True
            )
    return found


def by_scale(
    model: Sampleable,
    metrics: NumberMetrics,
    scales: Sequence[float],
    threshold: float | None,
    count: int,
    seed: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Accuracy and distance at each scale, without and, if there is one, with a threshold."""
    numbers, points = in_turn(ALL, count), []
    for quantile in dict.fromkeys((None, threshold)):
        for scale in scales:
            images = images_of(
                model, in_words, numbers, seed, guidance=scale, threshold=quantile, **options
            )
            point = {
                "scale": scale,
                "threshold": quantile,
                "accuracy": metrics.accuracy(images, numbers),
                "distance": metrics.distance(images),
            }
            points.append(point)
            print(
                f"scale {scale:<4g} {'dynamic' if quantile else 'static':<8} thresholds  accuracy "
                f"{point['accuracy']:.1%}  distance {point['distance']:.3f}",
                flush=True,
            )
    return points


def by_step(
    run: Path, metrics: NumberMetrics, count: int, seeds: Sequence[int], **options: Any
) -> list[dict[str, Any]]:
    """Shares by seed at each checkpoint of a run, and how long training took until then."""
    store, points = CheckpointStore(run / "checkpoints"), []
    seconds = seconds_of(run)
    for step in store.steps():
        model = load_model(store.path(step), local_device())
        point: dict[str, Any] = {"step": step, "seconds": seconds.get(step)}
        for kind, numbers in KINDS.items():
            asked = in_turn(numbers, count)
            point[kind] = by_seed(model, metrics, in_words, asked, seeds, **options)
        points.append(point)
        shares = "  ".join(f"{kind} {mean(point[kind]):.1%}" for kind in KINDS)
        print(f"step {step:<6} {shares}", flush=True)
    return points


def seconds_of(run: Path) -> dict[int, float]:
    """Seconds of training, from the first row of a run's metrics, by step.

    Counted is what passed between rows of the file, which of an interrupted run includes the
    interruption.
    """
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["time"] - rows[0]["time"] for row in rows if "time" in row}


def mean(shares: Sequence[float]) -> float:
    """Return the mean of some shares."""
    return sum(shares) / len(shares)


def plot_scales(points: Sequence[Mapping[str, Any]], of_real: float, path: Path) -> None:
    """Plot accuracy above, distance below, against the guidance scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with saved(path, 6.4, 5.6, 2) as (_, axes):
        above, below = axes[:, 0]
        for k, quantile in enumerate(dict.fromkeys(point["threshold"] for point in points)):
            line = [point for point in points if point["threshold"] == quantile]
            name = "clipped to [−1, 1]" if quantile is None else f"dynamic thresholds, {quantile}"
            scales = [point["scale"] for point in line]
            for axis, value in ((above, "accuracy"), (below, "distance")):
                values = [point[value] for point in line]
                axis.plot(scales, values, MARKS[k] + "-", color=COLOURS[k], label=name)
        above.axhline(of_real, color="#000000", linestyle=":", label="real digits, unseen")
        above.set_ylabel("both digits right")
        below.set(ylabel="Fréchet distance", xlabel="guidance scale")
        for axis in (above, below):
            axis.grid()
        above.legend()


def plot_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the share that is right against optimizer steps, each seed as a mark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with saved(path, 6.4, 3.6) as (_, axes):
        axis = axes[0, 0]
        steps = [point["step"] for point in points]
        for k, kind in enumerate(KINDS):
            means = [mean(point[kind]) for point in points]
            axis.plot(steps, means, "-", color=COLOURS[k], label=f"numbers {kind}")
            for point in points:
                marks = [point["step"]] * len(point[kind])
                axis.plot(marks, point[kind], MARKS[k], color=COLOURS[k], alpha=0.5)
        axis.axhline(0.95, color="#777777", linestyle="--")
        axis.set(xlabel="optimizer steps", ylabel="both digits right")
        axis.grid()
        axis.legend()


def load(checkpoint: Path) -> LoadedModel:
    """Load a model of numbers.

    Raises:
        UserError: it is of something else.
    """
    model = load_model(checkpoint, local_device())
    channels, height, width = model.image_shape
    if model.spec.text is None or channels != 1 or width != 2 * height:
        raise UserError(
            f"`checkpoint` {checkpoint} is no model of numbers conditioned on text, as the preset "
            "numbers-text",
            "checkpoint",
        )
    return model


def main() -> None:
    """Generate, read, report."""
    with exit_on_error(Options):
        options = parse_options(Options)
        model = load(options.checkpoint)
        metrics = NumberMetrics(model.image_shape[1])
        chosen: dict[str, Any] = {"sampler": options.sampler, "steps": options.steps}
        guided = {**chosen, "guidance": options.guidance}
        print(f"the reader gets {metrics.of_real:.1%} of real pairs right that it never saw")
        report: dict[str, Any] = {
            "machine": facts(local_device()),
            "checkpoint": f"{options.checkpoint}, step {model.step}",
            "settings": {
                "count": options.count,
                "seeds": list(options.seeds),
                "guidance": options.guidance,
                "sampler": options.sampler or model.sampling.sampler,
                "steps": options.steps or model.sampling.steps or model.schedule.timesteps,
            },
            "accuracy_of_real": metrics.of_real,
            "phrases": by_phrase(model, metrics, options.count, options.seeds, **guided),
            "scales": by_scale(
                model, metrics, options.scales,
                None if model.codec.clip_range is None else options.threshold,
                options.compared, options.seeds[0], **chosen,
            ),
        }  # fmt: skip
        if options.curve:
            report["curve"] = by_step(
                options.checkpoint, metrics, options.count, options.seeds, **guided
            )
            if options.curve_plot is not None:
                plot_curve(report["curve"], options.curve_plot)
        if options.json is not None:
            write_json(options.json, report)
        if options.plot is not None:
            plot_scales(report["scales"], metrics.of_real, options.plot)
        if options.picture is not None:
            numbers = in_turn(HELD_OUT, 2 * len(HELD_OUT))
            images = images_of(model, in_words, numbers, options.seeds[0], **guided)
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            captioned_grid(
                images, [in_words(number) for number in numbers], options.picture,
                wrong=~metrics.reader.right(images, numbers),
            )  # fmt: skip


if __name__ == "__main__":
    main()
