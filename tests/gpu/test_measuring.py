"""How operations are timed, what a trace says, and the machine, without a GPU."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import machine, timing, trace
from benchmarks.gpu.items import norms
from benchmarks.gpu.networks import NormCall, heaviest_norms, norm_calls, training_flop
from benchmarks.gpu.timing import Job
from torch import Tensor

from ddpm_engine.presets import PRESETS
from ddpm_kernels.dispatch import force_ops

CPU = torch.device("cpu")


def test_ways_take_turns() -> None:
    order: list[str] = []
    ways = {name: partial(order.append, name) for name in "abc"}

    def clock(function: Callable[[], object]) -> float:
        function()
        return float(len(order))

    times = timing.interleaved(ways, clock, repeats=3)
    assert "".join(order) == "bcacababcbcacab"
    assert times == {"a": [7.0, 12.0, 14.0], "b": [8.0, 10.0, 15.0], "c": [9.0, 11.0, 13.0]}


def test_statistics_are_of_one_call_on_memory_beyond_the_caches() -> None:
    ticks: Iterator[float] = iter(range(1, 10_000))
    made: list[dict[str, Tensor]] = []

    def clock(function: Callable[[], object]) -> float:
        function()
        return next(ticks)

    def make() -> dict[str, Tensor]:
        made.append({"x": torch.zeros(4)})
        return made[-1]

    job = Job("double", (4,), torch.float32, 32, make, {"engine": lambda x: 2 * x})
    engine, copy = timing.measure(job, CPU, clock, repeats=5, beyond=300)
    assert len(made) == engine["calls"] == copy["calls"] == 10
    # Two rounds of warm-up, ticks 1 … 4; then a round is two ticks, which way first by turns.
    assert [row["way"] for row in (engine, copy)] == ["engine", "copy"]
    assert engine["µs"] == pytest.approx(9 / 10 * 1e3)
    assert engine["µs, least"] == pytest.approx(5 / 10 * 1e3)
    assert copy["µs, least"] == pytest.approx(6 / 10 * 1e3)
    assert engine["GB/s"] == pytest.approx(32 / 900e-6 / 1e9)
    assert engine["of the copy, %"] == pytest.approx(100 * 10 / 9)


def event(name: str, begin: float, took: float, category: str = "kernel") -> dict[str, Any]:
    return {"name": name, "cat": category, "ts": begin, "dur": took}


def test_a_trace_is_summed_up_by_step_and_class() -> None:
    events = [
        event("sm90_xmma_fprop_implicit_gemm_bf16", 0, 3000),
        event("_moments_kernel", 2000, 2000),  # overlaps: the device is busy once
        event("vectorized_elementwise_kernel", 6000, 1000),
        event("Memcpy HtoD", 9000, 1000, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 5, "cuda_runtime"),
        event("cudaGraphLaunch", 10, 5, "cuda_runtime"),
        event("cudaStreamSynchronize", 20, 5, "cuda_runtime"),
        event("aten::conv2d", 0, 9000, "cpu_op"),
        {"name": "process_name", "ph": "M"},
    ]
    found = trace.summarised(events, steps=2)
    assert found.kernels == 2
    assert found.launches == 1
    assert found.busy == pytest.approx(3)
    assert dict(found.by_class) == {
        "convolution": (1.5, 0.5),
        "normalisation": (1.0, 0.5),
        "cast or copy": (0.5, 0.5),
        "elementwise": (0.5, 0.5),
    }
    assert next(iter(found.by_class)) == "convolution"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("cudnn::engines_precompiled::nchwToNhwcKernel<float>", "layout"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad>", "convolution"),
        ("nvjet_tst_128x256", "matrix product"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "cast or copy"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("_q_sample_kernel", "noise and loss"),
        ("triton_poi_fused_silu_0", "compiled"),
        ("nobody_knows", "other"),
    ],
)
def test_kernels_have_classes(name: str, title: str) -> None:
    assert trace.class_of(name) == title


def test_a_trace_that_is_too_large_keeps_what_the_device_did(tmp_path: Path) -> None:
    host = [event(f"aten::{hash(k)}", k, 1, "cpu_op") for k in range(2000)]
    whole = {"traceEvents": [event("kernel", 0, 1), *host], "other": 1}
    path = tmp_path / "trace.json.gz"
    trace.keep(path, whole)
    assert json.loads(gzip.decompress(path.read_bytes())) == whole
    trace.keep(path, whole, largest=1000)
    assert path.stat().st_size <= 1000
    kept = json.loads(gzip.decompress(path.read_bytes()))
    assert kept == {"traceEvents": [event("kernel", 0, 1)], "other": 1}


def test_norms_and_flop_of_the_networks() -> None:
    config = PRESETS["cifar10"]().model
    # 37.3 GFLOP an image with attention and linear layers, backward twice the forward.
    assert training_flop(config, 2) == pytest.approx(2 * 37.3e9, rel=0.05)
    calls = norm_calls(config, 128)
    assert sum(calls.values()) == 51
    assert all(call.shape[0] == 128 for call in calls)
    # The second norm of 22 residual blocks; the first of the 12 on the way up.
    assert sum(calls[call] for call in calls if call.before and call.dropout == 0.1) == 22
    assert sum(calls[call] for call in calls if call.skip) == 12
    largest, *_ = heaviest_norms(dry=False)
    assert (largest.shape, largest.skip, largest.kept) == ((16, 256, 256, 256), 128, True)


def test_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert machine.machine_of(CPU, "command")["device"] == "CPU"
    assert machine.output_of("no-such-command") is None
    assert machine.output_of(sys.executable, "-c", "raise SystemExit(1)") is None

    def commit_of(answers: dict[str, str | None]) -> str:
        monkeypatch.setattr(machine, "output_of", lambda *command: answers[command[1]])
        return machine.commit()

    assert commit_of({"rev-parse": None}) == "unknown"
    assert commit_of({"rev-parse": "abc", "status": ""}) == "abc"
    assert commit_of({"rev-parse": "abc", "status": " M Makefile"}) == "abc+changes"
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "COMMIT").write_text("def\n")
    assert machine.commit() == "def"


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "output_of", lambda *_: "580.1, 1980 MHz\nof a second card, x")
    assert machine.asked("driver_version", "clocks.sm") == {
        "driver_version": "580.1", "clocks.sm": "1980 MHz",
    }  # fmt: skip
    monkeypatch.setattr(machine, "output_of", lambda *_: None)
    assert machine.asked("driver_version") == {}


@pytest.mark.parametrize(
    "call",
    [
        NormCall((2, 8, 4, 4), 4, 1e-6, "silu"),
        NormCall((2, 8, 4, 4), 4, 1e-6, "silu", skip=4, before=True),
        NormCall((2, 8, 36, 36), 4, 1e-6, "silu", kept=True),
    ],
    ids=lambda call: call.options or "plain",
)
def test_ways_see_the_same_values(call: NormCall) -> None:
    """The engine's and torch's ways of each job agree where no noise is drawn."""
    with force_ops():
        job, both = norms.norm_jobs(CPU, [call])
        made = job.make()
        ours: Any = job.ways["engine"](**made)
        for way in job.ways:
            assert torch.allclose(ours.float(), job.ways[way](**made).float(), atol=0.05), way  # type: ignore[attr-defined]
        made = both.make()
        results: list[Any] = [both.ways[way](**made) for way in ("engine", "torch, NHWC")]
    (_, gradients), (_, theirs) = results
    for gradient, expected in zip(gradients, theirs, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            error = (gradient.float() - expected.float()).abs().max()
            assert error < 0.05 * max(1, expected.float().abs().max())


def test_a_replay_returns_what_the_captured_call_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    held: list[bool] = []

    def function() -> list[int]:
        calls.append(len(calls))
        return calls[-1:]

    def capture(work: Any) -> Any:
        work()
        return lambda: held.append(True)

    monkeypatch.setattr(timing.graphs, "as_captured", lambda _: nullcontext())
    monkeypatch.setattr(timing.graphs, "captured", capture)
    replay = timing.captured(function, torch.device("cuda"))
    assert [replay(), replay()] == [[3], [3]]
    assert calls == [0, 1, 2, 3]
    assert held == [True, True]
