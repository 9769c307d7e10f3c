"""What the benchmarks of sampling and training say: parity, statistics, counts, and the scripts.

No time is asserted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from benchmarks import sample_throughput, train_throughput
from benchmarks.reference.ddpm import GaussianDiffusion
from benchmarks.throughput import digits, equal_quality, measuring, sampling, training
from benchmarks.throughput.equal_quality import Method, Settings, Study, student_method
from benchmarks.throughput.measuring import table
from benchmarks.throughput.memory import peak_tensor_bytes
from benchmarks.throughput.sampling import Job, all_ways, check, sampled_by_engine
from benchmarks.throughput.subject import SEED, Subject, counted_noise, random_unet
from benchmarks.throughput.timing import Spread, interleaved, rates, speed_ups
from tests.tiny import TINY_GREY
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_engine.checkpoints.load import LoadedModel
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.presets import PRESETS
from ddpm_engine.samplers.config import SamplingConfig
from ddpm_engine.samplers.sampler import Sampler
from ddpm_kernels.dispatch import force_ops

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = PRESETS["digits"]()
    config = replace(config, model=TINY_GREY)
    return Subject("small", config, random_unet(config).state_dict(), CPU)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers take too long for a test."""
    monkeypatch.setattr(Subject, "compiled", property(lambda subject: subject.unet))


# --- The reference


@pytest.mark.parametrize(("steps", "variance"), [(50, "fixed_small"), (4, "fixed_large")])
def test_the_reference_generates_the_engines_samples(
    subject: Subject, steps: int, variance: Any
) -> None:
    diffusion = GaussianDiffusion(subject.unet, subject.schedule.betas, steps, variance)
    with counted_noise(SEED, CPU):
        theirs = diffusion.sample((3, 1, 8, 8))
    model = subject.model(subject.unet)
    request = model.request(seed=SEED, steps=steps, spacing="leading", variance=variance)
    ours = Sampler(model, request).sample(range(3))
    assert (ours.abs() < 0.99).float().mean() > 0.2, "or the clipping hides what comes before"
    assert (ours - theirs).abs().max() < 1e-4


def test_the_reference_samples_fresh_noise_by_itself(subject: Subject) -> None:
    diffusion = GaussianDiffusion(subject.unet, subject.schedule.betas, 4)
    one, other = diffusion.sample((1, 1, 8, 8)), diffusion.sample((1, 1, 8, 8))
    assert not torch.equal(one, other)


def test_every_way_generates_the_same_samples(subject: Subject) -> None:
    pytest.importorskip("diffusers")
    ways = all_ways(subject, Job(2, 5), ("ddpm", "ddim", "dpm++2m"))
    assert len(ways) == 13
    recordings: dict[str, sampling.Recording] = {}
    for way in ways:
        parity = check(way, recordings, CPU)
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
    recordings: dict[str, sampling.Recording] = {}
    assert all(check(way, recordings, CPU).problem is None for way in ways)
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

    def sample() -> Tensor:
        handle = way.network.register_forward_hook(model)
        try:
            return way.sample()
        finally:
            handle.remove()

    return replace(way, sample=sample)


@pytest.mark.parametrize("kind", ["error", "evaluations", "not finite", "raises"])
def test_a_way_that_generates_other_samples_gets_no_figure(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    original = measuring.all_ways

    def raising() -> Tensor:
        raise RuntimeError("no compiler\nfound")

    def with_fault(subject: Subject, job: Job, samplers: Any) -> list[sampling.Way]:
        ways = original(subject, job, samplers)
        place = [way.label for way in ways].index("ddpm: engine, eager")
        fewer = original(subject, replace(job, steps=2), samplers)[place]
        ways[place] = {
            "error": planted(ways[place], 0.05),
            "evaluations": replace(ways[place], sample=fewer.sample),
            "not finite": planted(ways[place], float("nan")),
            "raises": replace(ways[place], sample=raising),
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


class Counter(TorchDispatchMode):
    """Counts the operations outside of a network that write memory, and host waits.

    Both from the first evaluation on: what precedes it, such as making the table, is no step.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inside, self.started, self.launches, self.waits = True, False, 0, 0
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(lambda *_: setattr(self, "inside", False))

    def _enter(self, *_: object) -> None:
        self.inside = self.started = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            # In inference mode composite operations arrive whole.
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        views = func.is_view or func is torch.ops.aten._unsafe_view.default
        self.waits += self.started and func is torch.ops.aten._local_scalar_dense.default
        if not self.inside and not views and "empty" not in func.overloadpacket.__name__:
            self.launches += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["ddpm", "unipc3"])
def test_an_engine_step_outside_the_network_is_two_launches_and_no_wait(
    subject: Subject, sampler: str
) -> None:
    sampling.SPACINGS.setdefault(sampler, "trailing")
    counters = []
    for steps in (5, 10):
        network = subject.copy()
        with force_ops(), Counter(network) as counter:
            sampled_by_engine(subject, Job(2, steps), sampler, network)
        counters.append(counter)
    few, many = counters
    assert many.launches - few.launches <= 2 * 5
    assert many.waits == few.waits


def test_peak_of_tensors() -> None:
    def work() -> None:
        x = torch.ones(1000, 256)
        y = x + 1
        del x, y
        torch.ones(500, 256)

    assert 2 * 1024_000 <= peak_tensor_bytes(work, CPU) < 2 * 1024_000 + 4096


# --- The scripts


@pytest.mark.parametrize("script", [sample_throughput, train_throughput])
def test_the_scripts_report(
    script: Any,
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "preset_subject", lambda *_: subject)
    monkeypatch.setattr(UNet, "compile_blocks", lambda _: None)
    file, plot = tmp_path / "found.json", tmp_path / "found.png"
    sampling_only = ["--samplers", "ddpm", "--profile"] if script is sample_throughput else []
    monkeypatch.setattr(sys, "argv", [
        f"{script.__name__}.py", "--batch", "2", "--steps", "2", "--rounds", "2", *sampling_only,
        "--json", str(file), "--plot", str(plot),
    ])  # fmt: skip
    assert script.main() == 0
    output = capsys.readouterr().out
    assert ("ddpm: reference" if sampling_only else "plain loop") in output
    if sampling_only:
        assert re.search(r"^aten::\S*conv.* \d+\.\d%$", output, re.MULTILINE)
    found = json.loads(file.read_text())
    assert {"commit", "torch", "load_average", "command", "threads"} <= found["machine"].keys()
    rows = found["measured"]["rows"] if sampling_only else found["rows"]
    assert all(row.get("parity", row)["problem"] is None for row in rows)
    assert all(row["images_per_second"]["median"] > 0 for row in rows)
    assert rows[0]["speed_up"] == {"median": 1, "lower": 1, "upper": 1}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3"], "must divide"),
        (["--equal-quality"], "needs a trained model"),
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


def scaled(sample: Callable[[], Tensor]) -> Tensor:
    return 1.01 * sample()


@pytest.fixture
def study(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A teacher on a schedule of eight timesteps, and a student of three steps."""
    monkeypatch.setattr(digits, "digit_classifier", cache(digits.digit_classifier))
    settings = Settings(
        samples=40, seeds=1, spread=2, steps=(2, 4), tolerance=1e9, batch=40, rounds=1
    )
    students = {"progressive 3": loaded(subject, 3)}
    return Study(loaded(subject), students, tmp_path, settings)


def loaded(
    subject: Subject, steps: int | None = None, sampler: Literal["ddim", "ddpm"] = "ddim"
) -> LoadedModel:
    """The weights as a model; with steps, as if distilled to them and predicting v."""
    diffusion = replace(subject.config.diffusion, timesteps=8, beta_end=0.9)
    config = replace(subject.config, diffusion=diffusion)
    if steps is not None:
        sampling = SamplingConfig(sampler, steps, "trailing", "fixed_small")
        config = replace(config, diffusion=replace(diffusion, prediction="v"), sampling=sampling)
    return LoadedModel.from_config(subject.copy(), config, f"student {steps}")


def test_equal_quality_is_resumed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    found = equal_quality.run(study, lambda _: None)
    assert found["enough"] == {
        **dict.fromkeys(equal_quality.SAMPLERS, 2), "distilled, progressive": 3
    }  # fmt: skip
    # The standard; then each sampler, which is good enough at once, and with cached features; and
    # the student.
    assert [point["cache_interval"] for point in found["points"]] == [1, *[1, 2] * 4, 1]
    assert [len(point["distances"]) for point in found["points"]] == [2] * 10
    # What diffusers computes is what the engine computes.
    assert [(peer["name"], peer["steps"]) for peer in found["peers"]] == [
        ("diffusers DDPMPipeline", 8), ("diffusers DDIMPipeline", 2), ("diffusers DPMSolver++", 2)
    ]  # fmt: skip
    assert found["peers"][0]["distances"] == found["points"][0]["distances"]
    assert all(peer["images_per_second"] > 0 for peer in found["peers"])
    assert found["reference"]["speed_up"] == 1
    assert all(line for line in equal_quality.table(found))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr(equal_quality, "measure_speed", lambda *_: {})
    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "images", never)
        patched.setattr(equal_quality, "check_equal", lambda *_: None)
        again = equal_quality.run(study, lambda _: None)
    for point, before in zip(again["points"], found["points"], strict=True):
        assert point["distances"] == before["distances"]
    strict = replace(study, settings=replace(study.settings, tolerance=-1.0, samples=20))
    assert equal_quality.run(strict, lambda _: None)["enough"] == {}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_other_samples_are_not_timed(
    sampler: Literal["ddim", "ddpm"], subject: Subject, study: Study
) -> None:
    study = replace(study, students={"consistency 4": loaded(subject, 4, sampler)})
    for method in (Method("ddpm", 8), student_method("consistency 4", loaded(subject, 4, sampler))):
        standard = equal_quality.textbook_way(study, method)
        equal_quality.check_equal(study, method, standard)
        wrong = replace(standard, sample=partial(scaled, standard.sample))
        with pytest.raises(UserError, match="differs from reference"):
            equal_quality.check_equal(study, method, wrong)
