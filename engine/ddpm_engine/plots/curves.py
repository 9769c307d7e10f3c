"""Curves: loss, noise schedules, quality against the number of steps, terms of the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.plots.style import COLOURS, MARKS, saved

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def loss_figure(steps: Sequence[int], losses: Sequence[float], path: Path) -> None:
    """Plot the training loss, on logarithmic axes."""
    with saved(path, 6.4, 3.6) as (_, axes):
        axes[0, 0].plot(steps, losses, color=COLOURS[0], linewidth=1.2)
        axes[0, 0].set(xscale="log", yscale="log", xlabel="optimizer step", ylabel="loss")
        axes[0, 0].grid(which="both")


def schedules_figure(schedules: Mapping[str, NoiseSchedule], path: Path) -> None:
    """Plot ᾱ and the signal-to-noise ratio ᾱ / (1 − ᾱ) of noise schedules over their timesteps.

    Args:
        schedules: by the name in the legend. Where nothing is left of the image the ratio is zero,
            which has no logarithm: the curve ends before.
        path: of the PNG.
    """
    with saved(path, 9, 3.6, 1, 2) as (_, axes):
        left, right = axes[0]
        for (name, schedule), colour, dash in zip(
            schedules.items(), COLOURS, _DASHES, strict=False
        ):
            t = np.arange(schedule.timesteps) + 1
            left.plot(t, schedule.alpha_bar.numpy(), color=colour, linestyle=dash, label=name)
            ratio = schedule.snr.numpy()
            decibels = 10 * np.log10(np.where(ratio > 0, ratio, np.nan))
            right.plot(t, decibels, color=colour, linestyle=dash, label=name)
        left.set(xlabel="t", ylabel=r"$\bar\alpha_t$", title="signal that is left")
        right.set(
            xlabel="t", ylabel="dB", title=r"signal to noise, $\bar\alpha_t/(1-\bar\alpha_t)$"
        )
        right.axhline(0, color="#999999", linewidth=0.8)
        left.legend()
        for axis in axes[0]:
            axis.grid()


def quality_figure(
    distances: Mapping[str, Mapping[int, float]], floor: float, count: int, path: Path
) -> None:
    """Plot the Fréchet distance to real images against network evaluations.

    Args:
        distances: of each sampler, by the number of evaluations per sample.
        floor: distance between two sets of real images of the same size.
        count: samples per point.
        path: of the PNG.
    """
    from matplotlib.ticker import NullLocator, ScalarFormatter

    with saved(path, 6.4, 4) as (_, axes):
        axis = axes[0, 0]
        ticks = sorted({steps for line in distances.values() for steps in line})
        for (name, line), colour, mark in zip(distances.items(), COLOURS, MARKS, strict=False):
            axis.plot(line.keys(), line.values(), mark + "-", color=colour, label=name)
        axis.axhline(floor, color="#777777", linestyle="--", label="real images")
        axis.set(
            xscale="log", yscale="log", xlabel="network evaluations a picture",
            ylabel="Fréchet distance",
            title=f"quality against steps ({count} pictures for each point)",
        )  # fmt: skip
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.xaxis.set_minor_locator(NullLocator())
        # Distances seldom span a power of ten, and then no tick of these would have a label.
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.grid()
        axis.legend()


def bound_figure(terms: np.ndarray, path: Path) -> None:
    """Plot the terms of the variational bound over t, and their sum up to t.

    Args:
        terms: `[N, T + 1]` in bits per dimension, as `bits_per_dim` returns them.
        path: of the PNG.
    """
    count, last = terms.shape[0], terms.shape[1] - 1
    mean = terms.mean(0)
    t = np.arange(last) + 1
    total = terms.sum(1)
    error = total.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    with saved(path, 9, 3.6, 1, 2) as (figure, axes):
        left, right = axes[0]
        lower, upper = np.quantile(terms[:, 1:last], (0.1, 0.9), axis=0)
        left.fill_between(t[1:], lower, upper, color=COLOURS[0], alpha=0.25, linewidth=0)
        left.plot(t[1:], mean[1:last], color=COLOURS[0], label="$L_{t-1}$, denoising")
        left.plot([1], mean[:1], MARKS[1], color=COLOURS[1], label="$L_0$, decoder")
        left.plot([last], mean[last:], MARKS[2], color=COLOURS[2], label="$L_T$, prior")
        left.set(
            xscale="log", yscale="log", xlabel="t", ylabel="bits/dim", title="terms of the bound"
        )
        right.plot(t, mean[:last].cumsum(), color=COLOURS[0])
        right.axhline(total.mean(), color="#777777", linestyle="--")
        right.set(
            xscale="log", ylim=(0, None), xlabel="t", ylabel="bits/dim", title="their sum up to t"
        )
        for axis in axes[0]:
            axis.grid()
        left.legend()
        figure.suptitle(
            f"{total.mean():.2f} ± {error:.2f} bits/dim on {count} images (standard error); "
            "band: 10 to 90% of them"
        )
