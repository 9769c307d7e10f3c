"""How fast do the samplers converge? `python benchmarks/solver_convergence.py`.

Data from three Gaussians in each pixel have a denoiser in closed form, so every error is the
solver's own. Each deterministic sampler goes from the schedule's largest σ to its smallest, in
steps even in log σ and in float64, and is compared with a Runge-Kutta solution of order 8. Reported
are the largest error at each number of network evaluations, and the slope of its logarithm.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor

from ddpm_engine.bounds import Ge
from ddpm_engine.cli.errors import exit_in_one_line
from ddpm_engine.cli.options import parse_options
from ddpm_engine.diffusion.schedule import NoiseSchedule
from ddpm_engine.samplers.noise_levels import noise_levels
from ddpm_engine.samplers.registry import SAMPLERS
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import reverse_step

MEANS, WEIGHTS, DEVIATION = np.array([-1.0, -0.2, 0.8]), np.array([0.3, 0.3, 0.4]), 0.4
PIXELS = 32
# Okabe and Ito's colours, and a mark each for those who see none. Euler's line is DDIM's.
LINES = {
    "ddim": ("#000000", "o", "DDIM, Euler"),
    "heun": ("#E69F00", "s", "Heun"),
    "dpm++2m": ("#56B4E9", "^", "DPM-Solver++ 2M"),
    "dpm++3m": ("#0072B2", "v", "DPM-Solver++ 3M"),
    "unipc": ("#D55E00", "D", "UniPC, order 2"),
    "unipc3": ("#009E73", "P", "UniPC, order 3"),
}


@dataclass(frozen=True)
class Options:
    """Error of each sampler against the number of network evaluations."""

    out: Path = Path("docs/pictures/solver-convergence.png")
    """Path of the plot."""
    doublings: Annotated[int, Ge(2)] = 6
    """Number of doublings of the evaluations, starting from 8."""


def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[x_0 | x_0 + σ ε = x], elementwise."""
    variance = DEVIATION**2 + sigma**2
    away = x[..., None] - MEANS
    logits = np.log(WEIGHTS) - away**2 / (2 * variance)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    return np.asarray((share * (MEANS + DEVIATION**2 / variance * away)).sum(-1))


def reference(schedule: NoiseSchedule, start: np.ndarray) -> np.ndarray:
    """The probability-flow ODE from the largest σ to the smallest, as VP states."""
    first, last = schedule.log_sigma[[-1, 0]].exp().tolist()
    solution = solve_ivp(
        lambda sigma, x: (x - denoise(x, sigma)) / sigma, (first, last),
        start * math.hypot(1, first), "DOP853", rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    return np.asarray(solution.y[:, -1] / math.hypot(1, last))


def final_state(schedule: NoiseSchedule, table: CoefficientTable, start: np.ndarray) -> np.ndarray:
    """Run all rows but the last, which would go on to σ = 0."""
    x = torch.from_numpy(start).reshape(1, 1, 1, -1)
    ring = x.new_zeros(max(table.history, 1), *x.shape)
    rows: Tensor = torch.nn.functional.pad(table.rows, (0, 1))
    for i in range(table.evaluations - 1):
        a, s = (level[0].item() for level in noise_levels(schedule, table.timesteps[i : i + 1]))
        output = torch.from_numpy(denoise(x.numpy() / a, s / a))
        x = reverse_step(
            x, output, rows, torch.tensor(i), 0, torch.zeros(1, dtype=torch.int64), history=ring,
            clip=False,
        )  # fmt: skip
    return x.numpy().ravel()


@exit_in_one_line()
def main() -> None:
    """Measure, print and plot."""
    options = parse_options(Options)
    schedule = NoiseSchedule.linear()
    known = schedule.log_sigma.numpy()
    start = np.linspace(-2.5, 2.5, PIXELS)
    exact = reference(schedule, start)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, (colour, mark, label) in LINES.items():
        calls, errors = [], []
        for budget in (8 * 2**k for k in range(options.doublings + 1)):
            steps = budget // 2 if name == "heun" else budget
            levels = np.linspace(known[-1], known[0], steps + 1)
            timesteps = torch.from_numpy(np.interp(levels, known, np.arange(len(known))))
            table = SAMPLERS[name](schedule, timesteps, "x0")
            calls.append(table.evaluations - 1)
            errors.append(float(np.abs(final_state(schedule, table, start) - exact).max()))
        slope = -np.polyfit(np.log(calls[-3:]), np.log(errors[-3:]), 1)[0]
        print(json.dumps({"sampler": name, "slope": round(slope, 2), "errors": errors}))
        axes.loglog(calls, errors, mark + "-", color=colour, label=f"{label} (slope {slope:.1f})")
    axes.set(
        xlabel="network evaluations",
        ylabel="largest error of a pixel",
        title="Samplers against the exact solution of the ODE",
    )
    axes.set_xticks(calls, [str(count) for count in calls])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
