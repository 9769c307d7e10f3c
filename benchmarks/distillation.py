"""Digits in 1, 2, 4 and 8 evaluations of the network: `python benchmarks/distillation.py`.

Models distilled by each method are compared with samplers that draw from their teacher in as few
evaluations, by the Fréchet distance to the real digits (features of the small digit classifier,
which compare with each other only). The line to reach is ddpm in all of the teacher's timesteps. A
second teacher knows the digits' classes; it is distilled with guidance built in, and the share of
pictures that the classifier takes for the class that was asked for must not fall.

What is missing is trained first, with the scripts of launch/. Everything is kept, so the command
can be stopped and repeated. It writes benchmarks/results/distillation.json, the table in
docs/distillation.md and the plot in docs/pictures, and its exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

import numpy as np
import torch
from benchmarks.throughput.gallery import Gallery, Method, student_method, students_of
from benchmarks.throughput.machine import facts
from benchmarks.throughput.report import finish, pyplot, write_between_marks, write_json
from benchmarks.throughput.subject import subject_of

from ddpm_engine.cli.options import Positive, exit_on_user_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.digits import DigitClassifier, digit_classifier, real_digits
from ddpm_engine.evaluation.fid import frechet_distance, moments

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "distillation.json"
DOCUMENT = ROOT / "docs" / "distillation.md"
PLOT = ROOT / "docs" / "pictures" / "distillation.png"

EVALUATIONS = (1, 2, 4, 8)
MANY = 50
"""Steps in which ddim gets as close as it can: the distance of the path that is distilled."""
SAMPLERS = ("ddim", "dpm++2m", "unipc")
GUIDANCE_SCALE = 2.0
"""Of the teacher that knows classes."""
GUIDED_STEPS = 100
"""Of ddpm, by which the teacher of classes is asked for digits, as `make demo` does."""

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
    """Where runs are, and are trained if they are missing."""
    pictures: Positive = 5000
    """Pictures drawn for each distance in few evaluations."""
    seeds: Positive = 3
    """How many, of the pictures."""
    reference_pictures: Positive = 2000
    """Pictures drawn by ddpm in all timesteps; what is compared with it is of as many."""
    reference_seeds: Positive = 1
    """How many, of these; each is half an hour."""
    guided_pictures: Positive = 2000
    """Pictures of which the classes are judged."""
    result: Path = RESULT
    """Write everything here."""
    document: Path = DOCUMENT
    """Write the tables here, between their two marks."""
    plot: Path = PLOT
    """Draw the curves here."""


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
    """Distilling the teacher to `steps` steps; every so many optimizer steps are `kept`."""
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
    """After which optimizer step of `PROGRESSIVE` its student takes so many steps."""
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


def spread(values: Sequence[float]) -> dict[str, Any]:
    """What is kept of the distances of seeds."""
    return {"mean": mean(values), "each": list(values)}


def shown(found: dict[str, Any]) -> str:
    """The distances of seeds, in a table."""
    middle, each = found["mean"], found["each"]
    return f"{middle:.2f}" + (f" ({min(each):.2f} – {max(each):.2f})" if len(each) > 1 else "")


def measure_few(options: Options, progress: Callable[[str], None]) -> dict[str, Any]:
    """Distances in few evaluations, and the line to reach."""
    runs, device = options.runs, torch.device("cpu")
    teacher = subject_of(TEACHER.checkpoint(runs), device)
    students = students_of(students_by_evaluations(runs), device)
    gallery = Gallery(teacher, runs / TEACHER.run / "pictures-by-method", students=students)
    size = teacher.unet.sample_shape[-1]
    features = digit_classifier(size).features
    real = moments([features(real_digits(size).images)])

    def distance(pictures: np.ndarray) -> float:
        return frechet_distance(moments([features(pictures)]), real)

    def as_many_as_the_reference(method: Method, seeds: int) -> dict[str, Any]:
        drawn = [gallery.pictures(method, s, options.reference_pictures) for s in range(seeds)]
        found = spread([distance(pictures) for pictures in drawn])
        progress(
            f"{method.name}, {method.steps} evaluations: {found['mean']:.3f} "
            f"({options.reference_pictures} pictures)"
        )
        return found

    total = teacher.schedule.timesteps
    reference = as_many_as_the_reference(Method("ddpm", total), options.reference_seeds)
    path = as_many_as_the_reference(Method("ddim", MANY), options.seeds)
    points = []
    methods = [Method(sampler, steps) for sampler in SAMPLERS for steps in EVALUATIONS]
    methods += [student_method(name, student) for name, student in students.items()]
    for method in methods:
        drawn = [gallery.pictures(method, s, options.pictures) for s in range(options.seeds)]
        found = spread([distance(pictures) for pictures in drawn])
        # A seed's luck is larger than what is to be told apart.
        as_many = spread([distance(p[: options.reference_pictures]) for p in drawn])
        points.append(
            {
                "name": method.name,
                "evaluations": method.steps,
                "distance": found,
                "of_as_many_as_the_reference": as_many,
                "times_the_reference": as_many["mean"] / reference["mean"],
            }
        )
        progress(f"{method.name}, {method.steps} evaluations: {found['mean']:.3f}")
    return {
        "reference": {"evaluations": total, "distance": reference},
        "path": {"evaluations": MANY, "distance": path},
        "points": points,
        "teacher": teacher.name,
        "students": {name: student.name for name, student in students.items()},
    }


def measure_classes(options: Options, progress: Callable[[str], None]) -> dict[str, Any]:
    """Shares classified as asked: of the guided teacher, and with guidance built in."""
    runs, device = options.runs, torch.device("cpu")
    teacher = subject_of(CLASSES.checkpoint(runs), device)
    students = students_of([GUIDED.checkpoint(runs)], device)
    gallery = Gallery(teacher, runs / CLASSES.run / "pictures-by-method", students=students)
    size = teacher.unet.sample_shape[-1]
    classifier, real = digit_classifier(size), real_digits(size)
    statistics = moments([classifier.features(real.images)])
    ((name, student),) = students.items()
    methods = {
        "teacher, guided": Method("ddpm", GUIDED_STEPS, guidance=GUIDANCE_SCALE),
        "teacher, guided, as few steps": Method("ddim", 4, guidance=GUIDANCE_SCALE),
        "distilled, guidance built in": Method("ddim", 4, student=name),
    }
    found = {}
    for row, method in methods.items():
        pictures = gallery.pictures(method, 0, options.guided_pictures)
        found[row] = {
            "sampler": method.sampler,
            "steps": method.steps,
            "accuracy": accuracy(classifier, pictures),
            "distance": frechet_distance(moments([classifier.features(pictures)]), statistics),
        }
        progress(f"{row}: {found[row]['accuracy']:.1%} classified as asked")
    return {
        "scale": GUIDANCE_SCALE,
        "teacher": teacher.name,
        "rows": found,
        "student": student.name,
    }


def accuracy(classifier: DigitClassifier, pictures: np.ndarray) -> float:
    """Share of pictures taken for the class asked: 0, 1, …, 9 in turn."""
    return float((classifier.classify(pictures) == np.arange(len(pictures)) % 10).mean())


def goals(found: dict[str, Any]) -> dict[str, bool]:
    """What was hoped for, and whether it came true."""
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
        return f"{shown(point['of_as_many_as_the_reference'])}, × {times:.2f}"

    seeds = len(reference["distance"]["each"])
    lines = by_evaluations(few["points"], lambda point: shown(point["distance"]))
    lines += [
        "",
        f"Fréchet distance to the 1,797 real digits, {options['pictures']} pictures: mean of "
        f"{options['seeds']} seeds, and their range. Of {options['reference_pictures']} pictures, "
        f"`ddpm` in {reference['evaluations']} evaluations has {shown(reference['distance'])}, of "
        f"{seeds} seed{'s' * (seeds > 1)}, and `ddim` in {path['evaluations']}, "
        f"the path that is distilled, {shown(path['distance'])}. Of as many, and over `ddpm`'s:",
        "",
        *by_evaluations(few["points"], compared),
    ]
    lines += [
        "",
        f"With classes and a guidance scale of {classes['scale']:g}, {options['guided_pictures']} "
        "pictures:",
        "",
        "| model | steps | classified as asked | distance |",
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
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    few = found["few"]
    looks = {
        "ddim": ("#0072B2", "o"), "dpm++2m": ("#56B4E9", "s"), "unipc": ("#009E73", "^"),
        "distilled, progressive": ("#D55E00", "D"), "distilled, consistency": ("#CC79A7", "v"),
        "distilled, moments": ("#000000", "*"),
    }  # fmt: skip
    for name, (colour, mark) in looks.items():
        line = [point for point in few["points"] if point["name"] == name]
        middles = [point["distance"]["mean"] for point in line]
        each = np.array([point["distance"]["each"] for point in line])
        ranges = [middles - each.min(1), each.max(1) - middles]
        steps = [point["evaluations"] for point in line]
        axes.errorbar(steps, middles, ranges, label=name, color=colour, marker=mark, capsize=3)
    reference = few["reference"]
    axes.axhline(
        reference["distance"]["mean"], color="#000000", linestyle=":",
        label=f"ddpm, {reference['evaluations']} evaluations, "
        f"{found['settings']['reference_pictures']} pictures",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network")
    axes.set_ylabel("Fréchet distance to the real digits")
    axes.set_xticks(EVALUATIONS, [str(steps) for steps in EVALUATIONS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    finish(figure, path)


def main() -> int:
    """Train what is missing, draw, compare, write; the exit status."""
    with exit_on_user_error():
        options = parse_options(Options)

        def progress(line: str) -> None:
            print(line, flush=True)

        students = (PROGRESSIVE, *CONSISTENCY.values(), MOMENTS, GUIDED)
        for training in (TEACHER, CLASSES, *students):
            train(training, options.runs)
        machine = facts(torch.device("cpu"))
        settings = {
            key: getattr(options, key)
            for key in (
                "pictures",
                "seeds",
                "reference_pictures",
                "reference_seeds",
                "guided_pictures",
            )
        }
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
