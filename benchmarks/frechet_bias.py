"""Bias of the Fréchet distance with the number of images: `python benchmarks/frechet_bias.py`.

Left: N draws from a normal distribution against that distribution itself, whose distance is zero.
What is measured is bias alone, about D/N + D(D + 1)/(4 (N − 1)) for D independent features: the
mean's error, and the covariance's to second order. Middle and right: N real digits against others,
by the Fréchet distance and by the kernel distance, which has no bias. The script writes the plot,
and prints its figures as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_engine.bounds import Ge
from ddpm_engine.cli.options import Positive, parse_options
from ddpm_engine.evaluation.digits import digit_classifier, real_digits
from ddpm_engine.evaluation.fid import Moments, frechet_distance, moments
from ddpm_engine.evaluation.kid import squared_mmd
from ddpm_engine.plots.style import COLOURS, MARKS, saved

SIZE = 16


@dataclass(frozen=True)
class Options:
    """Bias of the Fréchet distance with the number of images."""

    out: Path = Path("docs/pictures/frechet-bias.png")
    """File for the plot."""
    repeats: Annotated[int, Ge(2)] = 20
    """Repetitions for each number of images."""
    features: tuple[Positive, ...] = (16, 64, 256)
    """Dimensions D of the normal distributions."""
    largest: Annotated[int, Ge(100)] = 25_600
    """Largest number of draws from them; it begins at 100 and doubles."""


def expected_bias(features: int, count: int) -> float:
    """Of N draws from N(0, I) against N(0, I) itself, to second order in 1/√N."""
    return features / count + features * (features + 1) / (4 * (count - 1))


def of_normals(features: int, counts: list[int], repeats: int) -> list[list[float]]:
    """Distances of draws to their own distribution, for each number of draws."""
    exact = Moments(0, np.zeros(features), np.eye(features))
    rng = np.random.default_rng(features)
    return [
        [
            frechet_distance(moments([rng.normal(size=(count, features))]), exact)
            for _ in range(repeats)
        ]
        for count in tqdm(counts, desc=f"{features} features")
    ]


def of_digits(
    features: NDArray[np.float64], counts: list[int], repeats: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Fréchet and kernel distances of N digits to a disjoint half of all digits."""
    frechet: list[list[float]] = []
    kernel: list[list[float]] = []
    rng = np.random.default_rng(0)
    for count in tqdm(counts, desc="digits"):
        frechet.append([])
        kernel.append([])
        for _ in range(repeats):
            order = rng.permutation(len(features))
            half = len(features) // 2
            some, others = features[order[:count]], features[order[half:]]
            frechet[-1].append(frechet_distance(moments([some]), moments([others])))
            kernel[-1].append(squared_mmd(some, others))
    return frechet, kernel


def main() -> None:
    """Measure, print, plot."""
    options = parse_options(Options)
    counts = [100]
    while counts[-1] * 2 <= options.largest:
        counts.append(counts[-1] * 2)
    with saved(options.out, 11, 3.6, 1, 3) as (_, axes):
        left, middle, right = axes[0]
        for k, width in enumerate(options.features):
            found = of_normals(width, counts, options.repeats)
            print(json.dumps({"features": width, "counts": counts, "mean": _means(found)}))
            left.plot(counts, _means(found), MARKS[k], color=COLOURS[k], label=f"D = {width}")
            line = [expected_bias(width, count) for count in counts]
            left.plot(counts, line, color=COLOURS[k], linewidth=1)
        left.set(xscale="log", yscale="log", title="draws against their own distribution")
        left.legend()
        some = [25, 50, 100, 200, 400, 800]
        digits = digit_classifier(SIZE).features(real_digits(SIZE).images)
        frechet, kernel = of_digits(digits, some, options.repeats)
        for axis, values, colour, title in [
            (middle, frechet, COLOURS[3], "real digits against other real digits"),
            (right, kernel, COLOURS[4], "the same, kernel distance"),
        ]:
            print(json.dumps({"title": title, "counts": some, "mean": _means(values)}))
            spread = [float(np.std(group, ddof=1)) for group in values]
            axis.errorbar(some, _means(values), spread, marker="o", color=colour, capsize=3)
            axis.set(xscale="log", title=title)
            axis.set_xticks(some, [str(count) for count in some])
            axis.minorticks_off()
        right.axhline(0, color="#777777", linewidth=1)
        for axis, label in zip(
            axes[0], ("Fréchet distance", "Fréchet distance", "squared MMD"), strict=True
        ):
            axis.set(xlabel="N", ylabel=label)
            axis.grid()
    print(options.out)


def _means(groups: list[list[float]]) -> list[float]:
    return [float(np.mean(group)) for group in groups]


if __name__ == "__main__":
    main()
