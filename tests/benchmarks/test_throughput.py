"""What the benchmarks of sampling and training say: parity, statistics, counts, and the scripts.

No time is asserted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from benchmarks import sample_throughput
from benchmarks.reference.ddpm import GaussianDiffusion
from benchmarks.throughput import equal_quality, measuring, sampling, training
from benchmarks.throughput.gallery import Gallery, Method, student_method
from benchmarks.throughput.profile import evaluation, shares_by_operation
from benchmarks.throughput.report import table
from benchmarks.throughput.sampling import Job, all_ways, check, drawn_by_engine
from benchmarks.throughput.subject import SEED, Subject, counted_noise, random_unet
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups
from benchmarks.throughput.watching import operations_around, peak_tensor_bytes
from tests.sampling import sample
from tests.tiny import TINY_GREY
from torch import Tensor, nn

from ddpm_engine.errors import UserError
from ddpm_engine.presets import PRESETS
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_kernels.dispatch import force_ops

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = PRESETS["digits"]()
    config = replace(config, model=TINY_GREY)
    return Subject("small", config, random_unet(config).state_dict(), CPU)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers take too long for a test; the scripts' runs compile for real."""
    monkeypatch.setattr(Subject, "compiled", property(lambda subject: subject.unet))


# --- The reference


@pytest.mark.parametrize("steps", [4, 200])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_reference_draws_the_engines_pictures(subject: Subject, steps: int, variance: Any) -> None:
    diffusion = GaussianDiffusion(subject.unet, subject.schedule.betas, steps, variance)
    with counted_noise(SEED, CPU):
        theirs = diffusion.sample((3, 1, 8, 8))
    ours = sample(
        subject.unet, subject.schedule, sample_ids=range(3), seed=SEED, steps=steps,
        spacing="leading", variance=variance,
    )  # fmt: skip
    assert (ours.abs() < 0.99).float().mean() > 0.2, "or the clipping hides what comes before"
    assert (ours - theirs).abs().max() < 1e-4


def test_reference_draws_fresh_noise_by_itself(subject: Subject) -> None:
    diffusion = GaussianDiffusion(subject.unet, subject.schedule.betas, 4)
    one, other = diffusion.sample((1, 1, 8, 8)), diffusion.sample((1, 1, 8, 8))
    assert not torch.equal(one, other)


# --- Parity forbids figures


def labels(ways: list[sampling.Way]) -> list[str]:
    return [way.label for way in ways]


def test_every_way_draws_the_same(subject: Subject) -> None:
    pytest.importorskip("diffusers")
    ways = all_ways(subject, Job(2, 5), ("ddpm", "ddim", "dpm++2m"))
    assert len(ways) == 13
    chains: dict[str, sampling.Chain] = {}
    for way in ways:
        parity = check(way, chains, CPU)
        assert parity.problem is None, way.label
        standards = (
            "ddpm: reference",
            "ddim: diffusers DDIMPipeline",
            "dpm++2m: diffusers DPMSolver++",
        )
        assert (parity.difference is None) == (way.label in standards)


def test_without_diffusers_the_engine_is_its_own_standard(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ways = all_ways(subject, Job(1, 2), ("ddpm", "ddim"))
    assert not any("diffusers" in way.name for way in ways)
    chains: dict[str, sampling.Chain] = {}
    assert all(check(way, chains, CPU).problem is None for way in ways)
    assert "diffusers' recipe" not in [
        way.name for way in training.all_ways(subject, training.batch_of(subject, 2))
    ]


def planted(way: sampling.Way, error: float) -> sampling.Way:
    """The same, but for an error in the state before the last evaluation."""
    calls = 0

    def model(module: nn.Module, arguments: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output + error if calls == 2 else output

    def draw() -> Tensor:
        handle = way.network.register_forward_hook(model)
        try:
            return way.draw()
        finally:
            handle.remove()

    return replace(way, draw=draw)


@pytest.mark.parametrize("kind", ["error", "evaluations", "not finite", "raises"])
def test_a_way_that_draws_otherwise_gets_no_figure(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    original = measuring.all_ways

    def raising() -> Tensor:
        raise RuntimeError("no compiler\nfound")

    def with_fault(subject: Subject, job: Job, samplers: Any) -> list[sampling.Way]:
        ways = original(subject, job, samplers)
        place = labels(ways).index("ddpm: engine, eager")
        fewer = original(subject, replace(job, steps=2), samplers)[place]
        ways[place] = {
            "error": planted(ways[place], 0.05),
            "evaluations": replace(ways[place], draw=fewer.draw),
            "not finite": planted(ways[place], float("nan")),
            "raises": replace(ways[place], draw=raising),
        }[kind]
        return ways

    monkeypatch.setattr(measuring, "all_ways", with_fault)
    measured = measuring.measure(subject, Job(1, 4), ("ddpm",), 1, lambda _: None)
    assert measured.failed
    failed = [row for row in measured.rows if row.parity.problem is not None]
    assert [row.name for row in failed] == ["engine, eager"]
    assert failed[0].images_per_second is failed[0].speed_up is failed[0].peak_mib is None
    lines = table(measured)
    assert any(line.startswith("FAILED ddpm: engine, eager: ") for line in lines)
    others = [row for row in measured.rows if row not in failed]
    assert all(row.images_per_second is not None for row in others)


def test_training_ways_take_the_same_steps(subject: Subject) -> None:
    batch = training.batch_of(subject, 4)
    ways = training.all_ways(subject, batch)
    standard = training.first_steps(ways[0], batch, subject, 3)
    assert all(np.isfinite(standard))
    for way in ways[1:-1]:  # the last one compiles
        found = training.first_steps(way, batch, subject, 3)
        assert training.difference(found, standard) < 1e-4, way.name
    assert training.difference([*standard[:-1], standard[-1] * 1.01], standard) > training.TOLERANCE
    assert training.difference([*standard[:-1], float("nan")], standard) == float("inf")


# --- Statistics


def test_statistics() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4)
    assert rates([0.5, 1, 2], 4) == Spread(4, 3, 6)
    # Paired: the machine was ten times as slow in the last round.
    assert speed_ups([2, 2, 20], [1, 1, 10]) == Spread(2, 2, 2)
    with pytest.raises(ValueError, match="argument"):
        speed_ups([1, 2], [1])


def test_interleaving_turns_around() -> None:
    calls: list[str] = []

    def work(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    figures = interleaved(3, {"a": lambda: work("a"), "b": lambda: work("b")})
    assert "".join(calls) == "abbaab"
    assert figures == {"a": [1, 4, 5], "b": [2, 3, 6]}


# --- Counts


class Network(nn.Module):
    """A product and a sum, and it reads one value."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(2, 2) @ x + 1
        return y if bool(y[0, 0] > -100) else x


@contextmanager
def inference(mode: bool) -> Iterator[None]:
    with torch.inference_mode(mode):
        yield


@pytest.mark.parametrize("mode", [False, True])
def test_operations_of_a_known_graph(mode: bool) -> None:
    network, x = Network(), torch.ones(2, 2)
    with inference(mode), operations_around(network) as counter:
        x = x * 2  # before
        x = network(x)
        x = x.mul_(3).t()
        float(x.sum())
    assert (counter.before.operations, counter.before.waits) == (1, 0)
    assert dict(counter.inside.names) == {
        "aten.mm.default": 1, "aten.add.Tensor": 1, "aten.gt.Scalar": 1
    }  # fmt: skip
    assert counter.inside.waits == 1
    assert dict(counter.outside.names) == {"aten.mul_.Tensor": 1, "aten.sum.default": 1}
    assert (counter.outside.views, counter.outside.waits) == (1, 1)


def test_peak_of_tensors() -> None:
    def work() -> None:
        x = torch.ones(1000, 256)
        y = x + 1
        del x, y
        torch.ones(500, 256)

    assert 2 * 1024_000 <= peak_tensor_bytes(work, CPU) < 2 * 1024_000 + 4096


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "unipc3"])
def test_an_engine_step_outside_the_network_is_two_launches_and_no_wait(
    subject: Subject, sampler: str
) -> None:
    counters = []
    sampling.SPACINGS.setdefault(sampler, "trailing")
    for steps in (5, 10):
        with force_ops(), operations_around(subject.unet) as counter:
            drawn_by_engine(subject, Job(2, steps), sampler, subject.unet, 1)
        counters.append(counter)
    few, many = counters
    per_step = many.outside - few.outside
    assert per_step.operations <= 2 * 5
    assert per_step.names["ddpm.reverse_step_.default"] == 5
    assert few.outside.waits == many.outside.waits == 0
    assert few.inside.waits == many.inside.waits == 0


# --- The scripts


def run(script: str, *arguments: str | Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")]),
        "TORCHDYNAMO_DISABLE": "1",  # what is compiled is as it was, in seconds
    }
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sample_throughput_from_the_command_line(tmp_path: Path) -> None:
    file, plot = tmp_path / "found.json", tmp_path / "found.png"
    output = run(
        "sample_throughput.py", "--batch", "1", "--steps", "4", "--rounds", "2", "--samplers",
        "ddpm", "--profile", "--json", file, "--plot", plot,
    )  # fmt: skip
    assert "ddpm: reference" in output
    assert re.search(r"^aten::\S*conv.* \d+\.\d%$", output, re.MULTILINE)
    found = json.loads(file.read_text())
    assert {"commit", "torch", "load_average", "command", "threads"} <= found["machine"].keys()
    rows = found["measured"]["rows"]
    assert all(row["parity"]["problem"] is None for row in rows)
    assert all(row["images_per_second"]["median"] > 0 for row in rows)
    assert rows[0]["speed_up"] == {"median": 1, "lower": 1, "upper": 1}
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_profile_shares_out_all_of_the_time(subject: Subject) -> None:
    shares = list(shares_by_operation(evaluation(subject, 1)).values())
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert len(shares) > 20


def test_train_throughput_from_the_command_line(tmp_path: Path) -> None:
    file, plot = tmp_path / "found.json", tmp_path / "found.png"
    output = run(
        "train_throughput.py", "--batch", "2", "--steps", "1", "--rounds", "2", "--json", file,
        "--plot", plot,
    )  # fmt: skip
    assert "plain loop" in output
    assert all(
        row["images_per_second"]["median"] > 0 for row in json.loads(file.read_text())["rows"]
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "must divide"),
        (["--equal-quality"], "--checkpoint"),
        (["--checkpoint", "nowhere"], "no usable checkpoint in nowhere"),
    ],
)
def test_bad_arguments_are_explained(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample_throughput.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        sample_throughput.main()
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


# --- Equal quality


def test_equal_quality_goes_on_where_it_was(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = equal_quality.Settings(
        samples=150, seeds=1, spread=2, steps=(2, 4), tolerance=1e9, batch=75, rounds=1
    )
    students = {"progressive 3": student_of(short(subject), 3)}

    def measured(settings: equal_quality.Settings) -> dict[str, Any]:
        return equal_quality.run(short(subject), students, tmp_path, settings, lambda _: None)

    found = measured(settings)
    assert found["enough"] == {
        **dict.fromkeys(equal_quality.SAMPLERS, 2), "distilled, progressive": 3
    }  # fmt: skip
    # The standard; then each sampler, which is good enough at once, and with cached features; and
    # the student.
    assert [point["cache_interval"] for point in found["points"]] == [1, *[1, 2] * 4, 1]
    assert [len(point["distances"]) for point in found["points"]] == [2] * 10
    # What diffusers draws is what the engine draws.
    assert [(peer["name"], peer["steps"]) for peer in found["peers"]] == [
        ("diffusers DDPMPipeline", 8), ("diffusers DDIMPipeline", 2), ("diffusers DPMSolver++", 2)
    ]  # fmt: skip
    assert found["peers"][0]["distances"] == found["points"][0]["distances"]
    assert all(peer["images_per_second"] > 0 for peer in found["peers"])
    assert all(point["distance"] == point["distances"][0] for point in found["points"])
    assert found["reference"]["distances"] == found["points"][0]["distances"]
    assert found["reference"]["speed_up"] == 1
    assert all(line for line in equal_quality.table(found))

    drawn: list[tuple[str, int]] = []
    original = Gallery.draw

    def draw(self: Any, method: Method, *rest: int) -> Tensor:
        drawn.append((method.name, method.steps))
        return original(self, method, *rest)

    monkeypatch.setattr(Gallery, "draw", draw)
    monkeypatch.setattr(equal_quality, "same_pictures", lambda *_: None)
    monkeypatch.setattr(equal_quality, "measure_speed", lambda *_: {})
    again = measured(settings)
    assert drawn == []
    keys = ("sampler", "steps", "distances")
    assert [[p[k] for k in keys] for p in again["points"]] == [
        [p[k] for k in keys] for p in found["points"]
    ]
    next(tmp_path.rglob("ddim-2-1-75-75.npy")).unlink()
    measured(settings)
    assert drawn == [("ddim", 2)]
    strict = replace(settings, tolerance=-1.0, samples=75)
    none = measured(strict)
    assert none["enough"] == {}


def test_equal_quality_needs_a_textbook_loop_that_draws_the_same(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, method = Gallery(short(subject), tmp_path), Method("ddpm", 8)
    standard = equal_quality.textbook_way(gallery, method)
    equal_quality.same_pictures(gallery, method, standard)
    original = Gallery.draw
    monkeypatch.setattr(Gallery, "draw", lambda *a: 1.01 * original(*a))
    with pytest.raises(UserError, match="differs from reference"):
        equal_quality.same_pictures(gallery, method, standard)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_student_that_draws_something_else_is_not_timed(
    sampler: Literal["ddim", "ddpm"], subject: Subject, tmp_path: Path
) -> None:
    student = student_of(short(subject), 4, sampler)
    gallery = Gallery(short(subject), tmp_path, students={"consistency 4": student})
    method = student_method("consistency 4", student)
    equal_quality.same_pictures(gallery, method, equal_quality.textbook_way(gallery, method))
    fewer = replace(method, steps=2)
    with pytest.raises(UserError, match="2 network evaluations, not 4"):
        equal_quality.same_pictures(gallery, fewer, equal_quality.textbook_way(gallery, method))


def student_of(subject: Subject, steps: int, sampler: Literal["ddim", "ddpm"] = "ddim") -> Subject:
    """The same weights, as if they had been distilled to so many steps and predicted v."""
    config = replace(
        subject.config,
        diffusion=replace(subject.config.diffusion, prediction="v"),
        sampling=SamplingConfig(sampler, steps, "trailing", "fixed_small"),
    )
    return replace(subject, config=config)


def short(subject: Subject) -> Subject:
    """The same on a schedule of eight timesteps."""
    diffusion = replace(subject.config.diffusion, timesteps=8, beta_end=0.9)
    return replace(subject, config=replace(subject.config, diffusion=diffusion))
