"""Every objective on the digits, in the same budget: `python benchmarks/objectives.py`.

Each trains the same network on the same batches from the same seeds and generates samples with the
same sampler; reported is their Fréchet distance to the real digits (features of the small digit
classifier, which compare with each other only), and that of few and of many network evaluations.
The best fixed variances and the learned one are
compared by their bits per dimension, too.

Runs go side by side, one thread each, in processes of their own. Results are kept in `--out`, so
that the command can be interrupted, repeated, and given more seeds. It writes
benchmarks/results/objectives.json, the tables in docs/objectives.md and the curves in
docs/pictures/objectives.png, and its exit status is 1 if
an objective ends more than 1.5 times as far from the real digits as the simple one, or if the
hybrid objective does not take fewer bits.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.digits import DigitMetrics
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_between_marks, write_json

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.bounds import Ge
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.config import RunConfig
from ddpm_engine.data.packing.pack import prepare_shards
from ddpm_engine.diffusion.variational_bound import bits_per_dim
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import digit_classifier
from ddpm_engine.plots.style import COLOURS, MARKS, saved
from ddpm_engine.presets import PRESETS
from ddpm_engine.samplers.config import SamplerName, SamplingConfig
from ddpm_engine.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "objectives.json"
DOCUMENT = ROOT / "docs" / "objectives.md"
PICTURE = "pictures/objectives.png"
"""Beside the document."""

ENTRIES: dict[str, dict[str, Any]] = {
    "simple ε": {},
    "simple x_0": {"diffusion.prediction": "x0"},
    "simple v": {"diffusion.prediction": "v"},
    "min-SNR": {"objective.weighting": "min-snr"},
    "P2": {"objective.weighting": "p2"},
    "bound": {"objective.weighting": "vlb"},
    "bound, importance": {
        "objective.weighting": "vlb",
        "objective.timestep_sampling": "importance",
    },
    "hybrid": {"objective.learned_variance": True, "model.out_channels": 2},
    "importance": {"objective.timestep_sampling": "importance"},
    "logit-normal": {"objective.timestep_sampling": "logit-normal"},
    "EDM": {"preset": "digits-edm"},
    "flow": {"diffusion.schedule": "flow", "diffusion.prediction": "flow"},
    "flow, logit-normal": {"preset": "digits-flow"},
    "x_0, velocity loss": {
        "diffusion.schedule": "flow",
        "diffusion.prediction": "x0",
        "objective.loss": "flow",
        "objective.loss_limit": 400.0,
        "objective.timestep_sampling": "logit-normal",
    },
    "transformer": {"preset": "digits-dit"},
}
"""What differs from the digits preset."""
BEFORE, AFTER = "simple ε", "hybrid"
CURVES = (
    BEFORE,
    "simple x_0",
    "simple v",
    "EDM",
    "flow, logit-normal",
    "x_0, velocity loss",
    "transformer",
)
"""Objectives in the figure."""
BITS: dict[str, tuple[str, ...]] = {
    BEFORE: ("fixed_small", "fixed_large"),
    "bound": ("fixed_small", "fixed_large"),
    AFTER: ("learned_range",),
}
"""Objectives whose likelihood is measured, and with which variances."""
WITHIN = 1.5
"""Largest acceptable distance, in units of that of the simple objective."""


@dataclass(frozen=True)
class Budget:
    """Budget of every objective."""

    steps: Positive = 700
    """Optimizer steps, batches of 64."""
    samples: Annotated[int, Ge(2)] = 1000
    """Samples for each distance."""
    sampler: SamplerName = "heun"
    """Name of the sampler."""
    sampling_steps: Positive = 18
    """Steps per sample; with heun each but the last is two evaluations."""
    evaluations: tuple[Positive, ...] = (5, 10, 25, 100)
    """Network evaluations per sample of the further distances."""
    curve_sampler: SamplerName = "dpm++2m"
    """Name of their sampler, one evaluation a step."""
    likelihoods: Positive = 48
    """Real digits whose likelihood is measured, T evaluations each."""


@dataclass(frozen=True)
class Options:
    """Compare the objectives on the digits."""

    budget: Budget = Budget()
    """Budget of each objective."""
    seeds: Positive = 2
    """Runs of each objective."""
    only: tuple[str, ...] = ()
    """Objectives to compare; default: all."""
    at_once: Positive = 2
    """Runs side by side, one thread each."""
    out: Path = Path("runs/objectives")
    """Folder of runs and their results."""
    result: Path = RESULT
    """File for everything, as JSON."""
    document: Path = DOCUMENT
    """Document for the table, between its two marks."""
    entry: str | None = None
    """Objective of a single run to measure, as this command does for each run."""
    seed: int = 0
    """Seed of that run."""


def folder(options: Options, name: str, seed: int) -> Path:
    """Folder of one run; a longer one is another."""
    plain = re.sub(r"\W+", "-", name.replace("ε", "eps"))
    return options.out / f"{plain}-{options.budget.steps}-{seed}"


def configuration(options: Options, name: str, seed: int) -> RunConfig:
    """The digits preset, but for the objective and the budget."""
    changes = dict(ENTRIES[name])
    config = PRESETS[changes.pop("preset", "digits")]()
    changes |= {
        "training.seed": seed,
        "training.steps": options.budget.steps,
        "data.path": options.out / "data",
        "data.workers": 0,
        "log.sample_every": 0,
        "log.tracker": "none",
    }
    for flag, value in changes.items():
        group, field = flag.split(".")
        config = replace(config, **{group: replace(getattr(config, group), **{field: value})})
    return replace(config, out=folder(options, name, seed))


def measure(options: Options, name: str, seed: int) -> dict[str, Any]:
    """Train, sample, compare: the result of one run."""
    config = configuration(options, name, seed)
    started = time.monotonic()
    Trainer(config).fit()
    trained = load_model(config.out)
    seconds = time.monotonic() - started
    budget = options.budget
    if trained.step != budget.steps:
        raise UserError(f"stopped at step {trained.step} of {budget.steps}; run it again to go on")
    digits = DigitMetrics.of_size(config.model.sample_size, options.out / "classifier")

    def distance(sampler: SamplerName, steps: int) -> float:
        sampling = SamplingConfig(sampler, steps, clip_x0=trained.sampling.clip_x0)
        samples = trained.sample(
            budget.samples, batch_size=250, progress=False, seed=seed, sampling=sampling
        )
        return digits.distance(trained.codec.decode(samples.tensor))

    real = digits.digits.images
    chosen = real[np.linspace(0, len(real) - 1, budget.likelihoods).astype(int)]
    images = torch.from_numpy(chosen).permute(0, 3, 1, 2).contiguous()
    return {
        "budget": _plain(budget),
        "distance": distance(budget.sampler, budget.sampling_steps),
        "by_evaluations": [distance(budget.curve_sampler, n) for n in budget.evaluations],
        "bits_per_dim": {
            variance: bits(trained, images, variance) for variance in BITS.get(name, ())
        },
        "training_seconds": seconds,
    }


def bits(trained: LoadedModel, images: torch.Tensor, variance: str) -> float:
    """Mean bound of these images in bits per dimension."""
    terms = bits_per_dim(
        trained.network,
        trained.schedule,
        images,
        torch.arange(len(images)),
        prediction=trained.config.diffusion.prediction,
        variance=variance,  # type: ignore[arg-type]
    )
    return float(terms.sum(1).mean())


def finished(options: Options, name: str, seed: int) -> dict[str, Any] | None:
    """Return the result of an earlier call with the same budget, or None."""
    file = folder(options, name, seed) / "measured.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found["budget"] == _plain(options.budget) else None


def run_apart(options: Options, todo: tuple[str, int]) -> str:
    """Measure in a separate process; return a line about the result.

    Raises:
        UserError: it failed; the message has the end of its output.
    """
    name, seed = todo
    budget = []
    for key, value in asdict(options.budget).items():
        values = value if isinstance(value, tuple) else (value,)
        budget += [f"--budget.{_flag(key)}", *map(str, values)]
    own = ["--entry", name, "--seed", str(seed), "--out", str(options.out)]
    done = subprocess.run(
        [sys.executable, __file__, *own, *budget],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = finished(options, name, seed)
    if done.returncode or found is None:
        tail = "\n       ".join(done.stdout.splitlines()[-12:])
        raise UserError(f"{name}, seed {seed}, ended with status {done.returncode}:\n       {tail}")
    said = f"{name}, seed {seed}: distance {found['distance']:.3f}"
    for variance, value in found["bits_per_dim"].items():
        said += f", {value:.3f} bits/dim {variance}"
    return f"{said} (trained in {found['training_seconds']:.0f} s)"


def _plain(budget: Budget) -> dict[str, Any]:
    """The budget as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(budget)))
    return values


def _flag(name: str) -> str:
    return name.replace("_", "-")


def summary(options: Options, names: list[str]) -> dict[str, Any]:
    """Collect all results, by objective."""
    runs = {
        name: [run for seed in range(options.seeds) if (run := finished(options, name, seed))]
        for name in names
    }
    base = mean(run["distance"] for run in runs[BEFORE])
    objectives = {}
    for name, found in runs.items():
        distances = [run["distance"] for run in found]
        objectives[name] = {
            "changes": ENTRIES[name],
            "distances": distances,
            "distance": mean(distances),
            "times_simple": mean(distances) / base,
            "by_evaluations": [
                [run["by_evaluations"][i] for run in found]
                for i in range(len(options.budget.evaluations))
            ],
            "bits_per_dim": {
                variance: [run["bits_per_dim"][variance] for run in found]
                for variance in BITS.get(name, ())
            },
            "training_seconds": [run["training_seconds"] for run in found],
        }
    return {"budget": _plain(options.budget), "seeds": options.seeds, "objectives": objectives}


def bits_fall(objectives: dict[str, Any]) -> bool | None:
    """Whether the hybrid objective takes fewer bits than either fixed variance, for every seed."""
    if AFTER not in objectives:
        return None
    before = zip(*objectives[BEFORE]["bits_per_dim"].values(), strict=True)
    after = objectives[AFTER]["bits_per_dim"]["learned_range"]
    return all(learned < min(fixed) for learned, fixed in zip(after, before, strict=True))


def table(found: dict[str, Any]) -> list[str]:
    """Three Markdown tables, the figure, and the machine and command that made them."""
    budget, machine, objectives = found["budget"], found["machine"], found["objectives"]

    def spread(values: list[float]) -> str:
        return (
            f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"
        )

    lines = [
        "| objective | flags | distance of each seed | mean ± deviation | × simple ε |",
        "|---|---|---|---|---|",
    ]
    for name, entry in objectives.items():
        flags = " ".join(f"--{_flag(key)} {value}" for key, value in entry["changes"].items())
        flags = flags.replace("learned-variance True", "learned-variance")
        each = ", ".join(f"{distance:.3f}" for distance in entry["distances"])
        changes = f"`{flags}`" if flags else "none"
        lines.append(
            f"| {name} | {changes} | {each} | {spread(entry['distances'])} | "
            f"{entry['times_simple']:.2f} |"
        )
    counts = budget["evaluations"]
    lines += [
        "",
        f"| distance by {budget['curve_sampler']}, evaluations: | {' | '.join(map(str, counts))} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for name, entry in objectives.items():
        lines.append(f"| {name} | {' | '.join(map(spread, entry['by_evaluations']))} |")
    lines += ["", f"![Distance against evaluations]({PICTURE})"]
    lines += ["", "| objective | variance | bits/dim of each seed | mean |", "|---|---|---|---|"]
    for name, entry in objectives.items():
        for variance, values in entry["bits_per_dim"].items():
            each = ", ".join(f"{value:.3f}" for value in values)
            lines.append(f"| {name} | `{variance}` | {each} | {mean(values):.3f} |")
    return [
        *lines,
        "",
        f"Digits at 16×16, the preset's network, {budget['steps']} steps of 64 images, "
        f"{found['seeds']} seeds; {budget['samples']} samples by `{budget['sampler']}` in "
        f"{budget['sampling_steps']} steps against all 1,797 digits; bits/dim of "
        f"{budget['likelihoods']} real digits, T = 1000. `{machine['command']}`, "
        f"{machine['date'][:10]}, {machine['device']}, commit {machine['commit'][:12]}.",
    ]


def curves(found: dict[str, Any], path: Path) -> None:
    """Plot distance against network evaluations, a line for each of `CURVES`; `path` of the PNG."""
    objectives, counts = found["objectives"], found["budget"]["evaluations"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with saved(path, 6.4, 4) as (_, axes):
        axis = axes[0, 0]
        shown = [name for name in CURVES if name in objectives]
        for name, colour, mark in zip(shown, COLOURS, MARKS, strict=False):
            means = [mean(values) for values in objectives[name]["by_evaluations"]]
            axis.plot(counts, means, mark + "-", color=colour, label=name.replace("x_0", "$x_0$"))
        axis.set(
            xscale="log", yscale="log", xlabel="network evaluations a sample",
            ylabel="Fréchet distance",
        )  # fmt: skip
        axis.set_xticks(counts, list(map(str, counts)))
        axis.grid()
        axis.legend()


def compare(options: Options) -> int:
    """Measure what is missing, and report; the exit status."""
    unknown = [name for name in options.only if name not in ENTRIES]
    if unknown:
        raise UserError(
            f"`only` names {unknown[0]!r}; there are {', '.join(ENTRIES)}", field="only"
        )
    if options.only and (options.result == RESULT or options.document == DOCUMENT):
        raise UserError(
            "`only` makes a shorter table, which would replace the whole one; give `result` and "
            "`document` too",
            field="only",
        )
    names = [name for name in ENTRIES if not options.only or name in options.only or name == BEFORE]
    runs = [(name, seed) for seed in range(options.seeds) for name in names]
    todo = [run for run in runs if finished(options, *run) is None]
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished", flush=True)
    machine = facts(torch.device("cpu"))
    size = PRESETS["digits"]().model.sample_size
    prepare_shards(options.out / "data", "digits", size)
    digit_classifier(size, options.out / "classifier")
    with ThreadPoolExecutor(options.at_once) as pool:
        for line in pool.map(partial(run_apart, options), todo):
            print(line, flush=True)
    found = {"machine": machine, **summary(options, names)}
    lines = table(found)
    print("\n" + "\n".join(lines))
    write_json(options.result, found)
    curves(found, options.document.parent / PICTURE)
    write_between_marks(options.document, "benchmarks/objectives.py", lines)

    far = [name for name, entry in found["objectives"].items() if entry["times_simple"] > WITHIN]
    for name in far:
        print(f"{name} is further than {WITHIN} times the simple objective's distance")
    if (fallen := bits_fall(found["objectives"])) is False:
        print("the hybrid objective does not take fewer bits than the fixed variances")
    return int(bool(far) or fallen is False)


def main() -> int:
    """Compare, or measure one."""
    with exit_on_error(Options):
        options = parse_options(Options)
        if options.entry is None:
            return compare(options)
        found = measure(options, options.entry, options.seed)
        with atomic_write(folder(options, options.entry, options.seed) / "measured.json") as file:
            file.write(json.dumps(found, indent=2).encode())
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
