"""One suite for every way that an operation runs.

`backend` runs a test on the plain references, on the registered operations, on the kernels in
Triton's interpreter, and on those of a GPU. Which of them there are is decided by the process:

    python -m pytest tests/kernels                     references and operations, and a GPU if any
    TRITON_INTERPRET=1 python -m pytest tests/kernels  the interpreter alone

The variable must be set before a kernel's module is imported. With `THOROUGH=1` properties are
tried on ten times as many examples.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.tiles import Tile, trying
from ddpm_kernels.triton_shim import HAS_TRITON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = HAS_TRITON and torch.cuda.is_available()
collect_ignore = (
    ["test_aot.py", "test_philox.py", "test_tiles.py", "test_tiling.py"] if INTERPRETED else []
)
"""What runs no kernel."""
GUARD = 256
"""Elements before and after a guarded tensor."""

settings.register_profile(
    "kernels",
    max_examples=200 if os.environ.get("THOROUGH") == "1" else 8 if INTERPRETED else 20,
    derandomize=True,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("kernels")


@dataclass(frozen=True)
class Backend:
    """One way that the operations run."""

    name: str

    @property
    def device(self) -> torch.device:
        """That the operations run on."""
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def runs_kernels(self) -> bool:
        """Whether Triton functions run; otherwise torch's own do."""
        return self.name in ("interpreter", "cuda")

    def moved(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The tensors among the arguments on the device, strides and all."""
        if self.device.type == "cpu":
            return dict(arguments)
        return {
            k: placed(v, self.device, 0) if isinstance(v, Tensor) else v
            for k, v in arguments.items()
        }


def placed(tensor: Tensor, device: torch.device, guard: int) -> Tensor:
    """A copy of the same strides, `guard` elements into memory of NaN or the largest integer."""
    poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = guard + last + 1 + guard if tensor.numel() else 2 * guard
    page = torch.full((size,), poison, dtype=tensor.dtype, device=device)
    inside = page.as_strided(tensor.shape, tensor.stride(), guard)
    if 0 in tensor.stride() and tensor.numel():  # of an expanded tensor
        once = tuple(slice(1 if s == 0 else None) for s in tensor.stride())
        inside[once].copy_(tensor[once])
        return inside
    return inside.copy_(tensor)


BACKENDS = ["interpreter"] if INTERPRETED else ["reference", "op", *(["cuda"] if ON_GPU else [])]


def _only(*names: str) -> pytest.MarkDecorator:
    present = [name for name in BACKENDS if name in names]
    return pytest.mark.parametrize("backend", present, indirect=True)


ON_KERNELS = _only("interpreter", "cuda")
"""Tests Triton functions; where there are none, torch's operations would be tested again."""
ON_OPERATIONS = _only("op", "interpreter", "cuda")
"""Tests the registered operations."""
ON_COMPILERS = _only("reference", "op", "cuda")
"""Tests what a compiler makes of an operation, which the interpreter does not change."""
ON_CUDA = _only("cuda")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every way in turn, in effect while the test runs."""
    with nullcontext() if request.param == "reference" else force_ops():
        yield Backend(request.param)


Guarded = Callable[[Tensor], Tensor]


@pytest.fixture
def guarded(backend: Backend) -> Iterator[Guarded]:
    """Copy a tensor, same strides, to the device, into memory with poisoned pages on both sides.

    A kernel that reads outside of its tensor spoils its result. After the test the pages must be as
    they were, so one that writes there fails.
    """
    pages: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bool:
            return place(tensor.to(torch.uint8)).view(torch.bool)
        inside = placed(tensor, backend.device, GUARD)
        assert inside._base is not None
        pages.append(inside._base)
        return inside

    yield place
    for page in pages:
        for side in (page[:GUARD], page[-GUARD:]):
            floating = page.is_floating_point()
            untouched = side.isnan() if floating else side == torch.iinfo(page.dtype).max
            assert bool(untouched.all()), "written outside of a tensor"


@pytest.fixture
def poisoned(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Allocate memory full of NaN and between guard pages; lists what was allocated."""
    found: list[Tensor] = []

    def guarding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
                return tensor
            found.append(guarded(tensor.fill_(float("nan"))))
            return found[-1]

        return allocated

    monkeypatch.setattr(torch, "empty", guarding(torch.empty))
    monkeypatch.setattr(torch, "empty_like", guarding(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", guarding(Tensor.new_empty))
    return found


@pytest.fixture
def wide_offsets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it to have every launch take 64-bit offsets."""

    def widen() -> None:
        for module in ("tiling", "group_norm_silu.launching", "residual_sum.launch"):
            monkeypatch.setattr(importlib.import_module(f"ddpm_kernels.{module}"), "INDEX_LIMIT", 0)
        _forget_plans()

    yield widen
    _forget_plans()


def _forget_plans() -> None:
    norm = "ddpm_kernels.group_norm_silu"
    importlib.import_module(f"{norm}.plan").plan.cache_clear()
    importlib.import_module(f"{norm}.launch_forward")._forward_launches.cache_clear()
    importlib.import_module(f"{norm}.launch_backward")._backward_launches.cache_clear()
    importlib.import_module("ddpm_kernels.residual_sum.launch")._plan.cache_clear()
    for module in ("q_sample", "denoising_loss.launch", "reverse_step.launch"):
        importlib.import_module(f"ddpm_kernels.{module}").plan.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that little tensors take several slabs and chunks of `group_norm_silu`."""
    planning = importlib.import_module("ddpm_kernels.group_norm_silu.plan")
    monkeypatch.setattr(planning, "WIDTHS", (8, 16))
    monkeypatch.setattr(planning, "ON_CHIP", 0)
    _forget_plans()
    with (
        trying("group_norm_silu", Tile(128, 4)),
        trying("group_norm_silu_backward", Tile(64, 4)),
        trying("residual_sum", Tile(64, 4)),
    ):
        yield
    _forget_plans()


@pytest.fixture
def small_token_tiles() -> Iterator[None]:
    """Tiles of `modulate` so small that few tokens take several tiles and programs."""
    with (
        trying("modulate", Tile(128, 1, programs=5)),
        trying("modulate_backward", Tile(128, 1, programs=5)),
    ):
        yield


@pytest.fixture
def small_step_tiles() -> Iterator[None]:
    """Tiles of `adamw_step` so small that `adamw_inputs.SIZES` takes several."""
    with trying("adamw_step", Tile(128, 1)), trying("gradient_norm", Tile(128, 1)):
        yield
