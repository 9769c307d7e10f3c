"""Precision that suits a device, and how torch is told to round."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_engine import runtime
from ddpm_engine.runtime import Numerics, choose_precision, has_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    settings: Any = torch.utils.deterministic
    before, fills = Numerics.in_force(), settings.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patched:
        for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
            patched.setenv(name, "")  # so that it is put back as it was
            patched.delenv(name)
        yield
    before.apply()
    settings.fill_uninitialized_memory = fills


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "no"), ((7, 5), "no"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((12, 0), "bf16")],
)
def test_auto_on_nvidia(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", GPU) == expected
    assert has_precision("bf16", GPU) == (expected == "bf16")
    assert has_precision("fp16", GPU)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gfx906", "no"),
        ("gfx908:sramecc+:xnack-", "no"),
        ("gfx90a:sramecc+:xnack-", "bf16"),
        ("gfx942", "bf16"),
        ("gfx950", "bf16"),
        ("gfx1030", "no"),
        ("gfx1100", "no"),
    ],
)
def test_auto_on_amd(family: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = SimpleNamespace(gcnArchName=family)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert choose_precision("auto", GPU) == expected


def test_auto_on_anything_else_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs too that have bf16: their results depend on no extension of theirs."""
    monkeypatch.setattr(runtime, "has_fast_bf16", lambda *_: True)
    assert choose_precision("auto", CPU) == "no"
    assert choose_precision("auto", torch.device("mps")) == "no"
    assert has_precision("bf16", CPU)
    assert not has_precision("fp16", CPU)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_is_named_stays(precision: runtime.Precision) -> None:
    assert choose_precision(precision, CPU) == choose_precision(precision, GPU) == precision


@pytest.mark.parametrize(
    ("numerics", "words"),
    [
        (Numerics(), "TF32 off, cuDNN's benchmark off"),
        (Numerics(tf32=True, cudnn_benchmark=True), "TF32 on, cuDNN's benchmark on"),
        (Numerics(cudnn_benchmark=True, deterministic=True), "TF32 off, deterministic algorithms"),
    ],
)
def test_torch_is_set_up_whatever_it_was_before(numerics: Numerics, words: str) -> None:
    for before in (Numerics(True, True, False), Numerics(False, False, True)):
        before.apply()
        numerics.apply()
        assert torch.backends.cuda.matmul.allow_tf32 == numerics.tf32
        assert torch.backends.cudnn.allow_tf32 == numerics.tf32
        assert torch.backends.cudnn.deterministic == numerics.deterministic
        assert torch.are_deterministic_algorithms_enabled() == numerics.deterministic
        timed = numerics.cudnn_benchmark and not numerics.deterministic
        assert torch.backends.cudnn.benchmark == timed
        assert Numerics.in_force() == Numerics(numerics.tf32, timed, numerics.deterministic)
    assert str(numerics) == words


def test_libraries_are_told_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    Numerics(tf32=True).apply()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert "TORCHINDUCTOR_DETERMINISTIC" not in os.environ
    Numerics(deterministic=True).apply()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    Numerics(deterministic=True).apply()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
