"""Digits in 1, 2, 4 and 8 evaluations of the network: `python benchmarks/distillation.py`.

Models distilled by each method are compared with samplers that use their teacher in as few
evaluations, by the Fréchet distance to the real digits (features of the small digit classifier,
which compare with each other only). The reference is ddpm in all of the teacher's timesteps. A
second, class-conditional teacher is distilled with guidance built in; the share of samples that the
classifier assigns to their class must not fall.

Missing runs are trained first, with the scripts of launch/. Everything is kept, so that the command
can be interrupted and repeated. It writes benchmarks/results/distillation.json, the table in
docs/distillation.md and the plot in docs/pictures, and its exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import torch
from benchmarks.throughput.digits import DigitMetrics, in_turn, kept_samples, load, load_distilled
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import write_between_marks, write_json

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.cli.options import Positive, exit_on_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.plots.style import COLOURS, MARKS, saved

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "distillation.json"
DOCUMENT = ROOT / "docs" / "distillation.md"
PLOT = ROOT / "docs" / "pictures" / "distillation.png"

EVALUATIONS = (1, 2, 4, 8)
MANY = 50
"""Steps in which ddim converges: the distance of the trajectory that is distilled."""
SAMPLERS = ("ddim", "dpm++2m", "unipc")
GUIDANCE_SCALE = 2.0
"""Guidance scale of the class-conditional teacher."""
GUIDED_STEPS = 100
"""Steps of ddpm with the class-conditional teacher, as in `make demo`."""

START = 128
"""Steps of the first teacher of progressive distillation: the error of DDIM in these stays."""
STAGE = 600
"""Optimizer steps of each halving."""
CONSISTENCY_START = 32
"""Most steps that the teacher of consistency distillation takes."""
BUDGET = 1000
"""Optimizer steps of each of its models."""
MATCHING = 3000
"""Optimizer steps of moment matching, after progressive distillation to as many steps."""


@dataclass(frozen=True)
class Options:
    """Compare distilled models of the digits with samplers, in few evaluations."""

    runs: Path = Path("runs")
    """Folder of runs; missing ones are trained."""
    samples: Positive = 5000
    """Samples for each distance in few evaluations."""
    seeds: Positive = 3
    """Seeds of these samples."""
    reference_samples: Positive = 2000
    """Samples of ddpm in all timesteps; what is compared with it uses as many."""
    reference_seeds: Positive = 1
    """Seeds of these; each is half an hour."""
    guided_samples: Positive = 2000
    """Samples whose classes are checked."""
    result: Path = RESULT
    """File for everything, as JSON."""
    document: Path = DOCUMENT
    """Document for the tables, between their two marks."""
    plot: Path = PLOT
    """File for a plot of the curves."""


@dataclass(frozen=True)
class Training:
    """A run, and how it is trained if it is missing."""

    run: str
    script: str
    arguments: tuple[str, ...]
    steps: int

    def command(self, runs: Path) -> list[str]:
        """What trains it; run again, it goes on."""
        launcher = [sys.executable, str(ROOT / "launch" / f"{self.script}.py")]
        # A path in an argument is that of another run.
        words = [word.replace("RUNS", str(runs)) for word in self.arguments]
        return [*launcher, *words, "--out", str(runs / self.run)]

    def checkpoint(self, runs: Path, step: int | None = None) -> Path:
        """Its last checkpoint, or that of an earlier step."""
        return runs / self.run / "checkpoints" / f"step-{step or self.steps:08d}"


def distilled(
    run: str, method: str, steps: int, training_steps: int, kept: int, *more: str
) -> Training:
    """Distil the teacher to `steps` steps, keeping a checkpoint every `kept` optimizer steps."""
    words = (
        "--teacher", f"RUNS/{TEACHER.run}", "--method", method, "--steps", str(steps),
        "--training.steps", str(training_steps), "--log.checkpoint-every", str(kept),
        "--log.keep-every", str(kept), "--log.sample-every", "0", *more,
    )  # fmt: skip
    return Training(run, "distill", words, training_steps)


TEACHER = Training("digits", "train", ("--preset", "digits"), 3000)
CLASSES = Training("digits-classes", "train", ("--preset", "digits-classes"), 3000)
HALVINGS = START.bit_length() - 1
PROGRESSIVE = distilled(
    "digits-progressive", "progressive", 1, HALVINGS * STAGE, STAGE, "--start-steps", str(START)
)
CONSISTENCY = {
    steps: distilled(
        f"digits-consistency-{steps}", "consistency", steps, BUDGET, BUDGET,
        "--start-steps", str(CONSISTENCY_START),
    )
    for steps in EVALUATIONS
}  # fmt: skip


def halved(steps: int) -> int:
    """Return the optimizer step of `PROGRESSIVE` after which its student takes `steps` steps."""
    return ((START // steps).bit_length() - 1) * STAGE


MOMENTS = distilled(
    "digits-moments-4", "moments", 4, MATCHING, 500,
    "--student", str(PROGRESSIVE.checkpoint(Path("RUNS"), halved(4))),
)  # fmt: skip
# As `make demo-fast` distils it.
GUIDED = Training(
    "digits-fast",
    "distill",
    (
        "--teacher", f"RUNS/{CLASSES.run}", "--guidance-scale", f"{GUIDANCE_SCALE:g}",
        "--steps", "4", "--start-steps", "16", "--training.steps", "1000",
    ),
    1000,
)  # fmt: skip


def train(training: Training, runs: Path) -> None:
    """Train a run unless it is there.

    Raises:
        UserError: it ended before its last step.
    """
    if training.checkpoint(runs).exists():
        return
    command = training.command(runs)
    print("+ " + " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=False)
    if not training.checkpoint(runs).exists():
        raise UserError(f"{runs / training.run} did not reach step {training.steps}; see above")


def students_by_evaluations(runs: Path) -> list[Path]:
    """A checkpoint for each method and number of evaluations."""
    progressive = [PROGRESSIVE.checkpoint(runs, halved(steps)) for steps in EVALUATIONS]
    others = [*CONSISTENCY.values(), MOMENTS]
    return progressive + [training.checkpoint(runs) for training in others]


Distances = dict[str, Any]
"""Mean and each of the distances of several seeds."""


def formatted(found: Distances) -> str:
    """The distances of seeds, in a table."""
    middle, each = found["mean"], found["each"]
    return f"{middle:.2f}" + (f" ({min(each):.2f} – {max(each):.2f})" if len(each) > 1 else "")


def measure_few(options: Options, progress: Callable[[str], None]) -> dict[str, Any]:
    """Distances in few evaluations, and the reference."""
    runs, device = options.runs, torch.device("cpu")
    teacher = load(TEACHER.checkpoint(runs), device)
    students = load_distilled(students_by_evaluations(runs), device)
    folder = runs / TEACHER.run / "samples-by-method"
    digits = DigitMetrics.of_size(teacher.shape[-1])

    def distances(
        model: LoadedModel, seeds: int, count: int, first: int | None = None, **given: Any
    ) -> Distances:
        """Of the `first` of `count` samples of each seed."""
        each = [
            digits.distance(kept_samples(model, folder, count, seed=seed, **given)[:first])
            for seed in range(seeds)
        ]
        return {"mean": mean(each), "each": each}

    def of_reference(sampler: str, steps: int, seeds: int) -> Distances:
        found = distances(teacher, seeds, options.reference_samples, **few_steps(sampler, steps))
        progress(
            f"{sampler}, {steps} evaluations: {found['mean']:.3f} "
            f"({options.reference_samples} samples)"
        )
        return found

    total = teacher.schedule.timesteps
    reference = of_reference("ddpm", total, options.reference_seeds)
    path = of_reference("ddim", MANY, options.seeds)
    methods: list[tuple[str, int, LoadedModel, dict[str, Any]]] = [
        (sampler, steps, teacher, few_steps(sampler, steps))
        for sampler in SAMPLERS
        for steps in EVALUATIONS
    ]
    for name, student in students.items():
        steps = student.sampling.steps or total
        methods.append((f"distilled, {name.partition(' ')[0]}", steps, student, {}))
    points = []
    for name, steps, model, given in methods:
        found = distances(model, options.seeds, options.samples, **given)
        # Seeds differ by more than the methods being compared.
        as_many = distances(
            model, options.seeds, options.samples, options.reference_samples, **given
        )
        points.append(
            {
                "name": name,
                "evaluations": steps,
                "distance": found,
                "of_as_many_as_the_reference": as_many,
                "times_the_reference": as_many["mean"] / reference["mean"],
            }
        )
        progress(f"{name}, {steps} evaluations: {found['mean']:.3f}")
    return {
        "reference": {"evaluations": total, "distance": reference},
        "path": {"evaluations": MANY, "distance": path},
        "points": points,
        "teacher": described(teacher),
        "students": {name: described(student) for name, student in students.items()},
    }


def few_steps(sampler: str, steps: int, **more: Any) -> dict[str, Any]:
    """Options of a request to the teacher."""
    return {"sampler": sampler, "steps": steps, "spacing": "trailing", "eta": 0.0, **more}


def described(model: LoadedModel) -> str:
    """Checkpoint of a model."""
    return "" if model.checkpoint is None else str(model.checkpoint.path)


def measure_classes(options: Options, progress: Callable[[str], None]) -> dict[str, Any]:
    """Shares of samples classified as their class: guided teacher, and guidance built in."""
    runs, device = options.runs, torch.device("cpu")
    teacher = load(CLASSES.checkpoint(runs), device)
    ((_, student),) = load_distilled([GUIDED.checkpoint(runs)], device).items()
    folder, count = runs / CLASSES.run / "samples-by-method", options.guided_samples
    digits = DigitMetrics.of_size(teacher.shape[-1])
    methods: dict[str, tuple[LoadedModel, dict[str, Any]]] = {
        "teacher, guided": (teacher, few_steps("ddpm", GUIDED_STEPS, guidance=GUIDANCE_SCALE)),
        "teacher, guided, as few steps": (
            teacher, few_steps("ddim", 4, guidance=GUIDANCE_SCALE)
        ),
        "distilled, guidance built in": (student, {}),
    }  # fmt: skip
    rows = {}
    for row, (model, given) in methods.items():
        samples = kept_samples(model, folder, count, seed=0, **given)
        metrics = digits.compute(samples, ["fid", "accuracy"], in_turn(count))
        rows[row] = {
            "sampler": given.get("sampler", "ddim"),
            "steps": given.get("steps", 4),
            "accuracy": metrics["accuracy"]["share"],
            "distance": metrics["fid"]["distance"],
        }
        progress(f"{row}: {rows[row]['accuracy']:.1%} classified as their class")
    return {
        "scale": GUIDANCE_SCALE,
        "teacher": described(teacher),
        "rows": rows,
        "student": described(student),
    }


def goals(found: dict[str, Any]) -> dict[str, bool]:
    """Goals, and whether they are met."""
    by = {(point["name"], point["evaluations"]): point for point in found["few"]["points"]}

    def best(steps: int, figure: Callable[[dict[str, Any]], float]) -> float:
        return min(
            figure(point) for (name, n), point in by.items()
            if n == steps and name.startswith("distilled")
        )  # fmt: skip

    rows = found["classes"]["rows"]
    lost = rows["teacher, guided"]["accuracy"] - rows["distilled, guidance built in"]["accuracy"]
    return {
        "4 evaluations of a distilled model are within 10% of ddpm in all timesteps": (
            best(4, lambda point: point["times_the_reference"]) <= 1.1
        ),
        "1 evaluation of a distilled model is better than 8 of ddim": (
            best(1, lambda point: point["distance"]["mean"]) < by["ddim", 8]["distance"]["mean"]
        ),
        "class accuracy falls by at most 2 points with guidance built in": lost <= 0.02,
    }


def by_evaluations(
    points: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]
) -> list[str]:
    """A Markdown table: a row for each method, a column for each number of evaluations."""
    by = {(point["name"], point["evaluations"]): point for point in points}
    lines = [
        "| evaluations | " + " | ".join(map(str, EVALUATIONS)) + " |",
        "|---" * (len(EVALUATIONS) + 1) + "|",
    ]
    for name in dict.fromkeys(name for name, _ in by):
        label = name if name.startswith("distilled") else f"`{name}`"
        cells = " | ".join(cell(by[name, n]) if (name, n) in by else "–" for n in EVALUATIONS)
        lines.append(f"| {label} | {cells} |")
    return lines


def tables(found: dict[str, Any]) -> list[str]:
    """Markdown: distances, classes, goals, and where they were measured."""
    few, classes, machine, options = (
        found[key] for key in ("few", "classes", "machine", "settings")
    )
    reference, path = few["reference"], few["path"]

    def compared(point: dict[str, Any]) -> str:
        times = point["times_the_reference"]
        return f"{formatted(point['of_as_many_as_the_reference'])}, × {times:.2f}"

    seeds = len(reference["distance"]["each"])
    lines = by_evaluations(few["points"], lambda point: formatted(point["distance"]))
    lines += [
        "",
        f"Fréchet distance to the 1,797 real digits, {options['samples']} samples: mean of "
        f"{options['seeds']} seeds, and their range. Of {options['reference_samples']} samples, "
        f"`ddpm` in {reference['evaluations']} evaluations has "
        f"{formatted(reference['distance'])}, of {seeds} seed{'s' * (seeds > 1)}, and `ddim` in "
        f"{path['evaluations']}, the trajectory that is distilled, {formatted(path['distance'])}. "
        "Of as many, and over `ddpm`'s:",
        "",
        *by_evaluations(few["points"], compared),
    ]
    lines += [
        "",
        f"With classes and a guidance scale of {classes['scale']:g}, {options['guided_samples']} "
        "samples:",
        "",
        "| model | steps | classified as their class | distance |",
        "|---|---|---|---|",
    ]
    for name, row in classes["rows"].items():
        lines.append(
            f"| {name} | {row['steps']} of `{row['sampler']}` | {row['accuracy']:.1%} | "
            f"{row['distance']:.3f} |"
        )
    lines += ["", "| goal | |", "|---|---|"]
    lines += [f"| {goal} | {'yes' if met else '**no**'} |" for goal, met in found["goals"].items()]
    return [
        *lines,
        "",
        f"`{machine['command']}`, {machine['date'][:10]}, {machine['device']}, torch "
        f"{machine['torch']}, commit {machine['commit'][:12]}.",
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """Distance against evaluations, a line for each method."""
    few, reference = found["few"], found["few"]["reference"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with saved(path, 7, 4.5) as (_, grid):
        axes = grid[0, 0]
        for k, name in enumerate(dict.fromkeys(point["name"] for point in few["points"])):
            line = [point for point in few["points"] if point["name"] == name]
            means = [point["distance"]["mean"] for point in line]
            each = [point["distance"]["each"] for point in line]
            below = [middle - min(values) for middle, values in zip(means, each, strict=True)]
            above = [max(values) - middle for middle, values in zip(means, each, strict=True)]
            steps = [point["evaluations"] for point in line]
            axes.errorbar(
                steps, means, [below, above], label=name, color=COLOURS[k], marker=MARKS[k],
                capsize=3,
            )  # fmt: skip
        axes.axhline(
            reference["distance"]["mean"], color="#000000", linestyle=":",
            label=f"ddpm, {reference['evaluations']} evaluations, "
            f"{found['settings']['reference_samples']} samples",
        )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlabel="network evaluations per sample",
            ylabel="Fréchet distance to the real digits",
        )  # fmt: skip
        axes.set_xticks(EVALUATIONS, [str(steps) for steps in EVALUATIONS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()


def main() -> int:
    """Train what is missing, sample, compare, write; returns the exit status."""
    with exit_on_error(Options):
        options = parse_options(Options)

        def progress(line: str) -> None:
            print(line, flush=True)

        students = (PROGRESSIVE, *CONSISTENCY.values(), MOMENTS, GUIDED)
        for training in (TEACHER, CLASSES, *students):
            train(training, options.runs)
        machine = facts(torch.device("cpu"))
        names = (
            "samples", "seeds", "reference_samples", "reference_seeds", "guided_samples"
        )  # fmt: skip
        settings = {name: getattr(options, name) for name in names}
        found: dict[str, Any] = {"machine": machine, "settings": settings}
        found["few"] = measure_few(options, progress)
        found["classes"] = measure_classes(options, progress)
        found["goals"] = goals(found)
        lines = tables(found)
        print("\n" + "\n".join(lines))
        write_json(options.result, found)
        write_between_marks(options.document, "benchmarks/distillation.py", lines)
        plot(found, options.plot)
        missed = [goal for goal, met in found["goals"].items() if not met]
        for goal in missed:
            print(f"missed: {goal}")
        return int(bool(missed))
    return 1


if __name__ == "__main__":
    sys.exit(main())
