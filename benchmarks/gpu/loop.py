"""A whole sampling loop: one step captured in a CUDA graph and replayed for every row.

The step reads its row, its timestep and its seed from the device, and advances the row there, so
that one graph serves every step of every seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from statistics import median
from unittest.mock import MagicMock

import torch
from benchmarks.gpu.capture import captured
from benchmarks.gpu.checks import Check, Extent, named
from benchmarks.gpu.compare import Comparison, equal, largest
from benchmarks.gpu.timing import Measurement, Timer, interleaved
from torch import Tensor, nn

from ddpm_engine.samplers import CoefficientTable, ddpm_table, sampling_steps, spaced_timesteps
from ddpm_engine.schedule import NoiseSchedule
from ddpm_kernels import Stream, gaussian_noise, reverse_step

try:
    import cattrs  # noqa: F401
except ModuleNotFoundError:
    # The U-Net's configuration imports it to read and write run files, which nothing here does.
    sys.modules["cattrs"] = MagicMock(name="cattrs")

from ddpm_engine.config import UNetConfig
from ddpm_engine.unet import UNet

Model = Callable[[Tensor, Tensor], Tensor]
SEED = 3


def unet(config: UNetConfig, device: torch.device, dtype: torch.dtype) -> UNet:
    """A U-Net of random weights, none of them zero."""
    torch.manual_seed(0)
    model = UNet(config)
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model.to(device, dtype).eval().requires_grad_(False)


def small_unet(device: torch.device) -> UNet:
    """Two levels with attention, on 16×16 pixels, in float32."""
    config = UNetConfig(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    return unet(config, device, torch.float32)


def pointwise(x: Tensor, timesteps: Tensor) -> Tensor:
    """Stands in for a network: nothing whose result could depend on how it is launched."""
    return 0.5 * x + 0.001 * timesteps[:, None, None, None]


def table_of(steps: int) -> CoefficientTable:
    """Ancestral sampling on some steps of the paper's schedule."""
    return ddpm_table(NoiseSchedule.linear(1000), spaced_timesteps(1000, steps))


class Loop:
    """The state of a sampling loop, all of it on the device; the engine's loop otherwise."""

    def __init__(
        self, model: Model, table: CoefficientTable, shape: tuple[int, int, int], ids: Tensor
    ) -> None:
        device = ids.device
        self.model, self.shape, self.ids = model, shape, ids
        self.steps = len(table.timesteps)
        rows = table.rows.to(device, torch.float32)
        # One slot of history with weight zero, as the engine's loop has.
        self.rows = torch.cat([rows, rows.new_zeros(len(rows), 1)], dim=1)
        self.timesteps = table.timesteps.to(device)
        self.row = torch.zeros((), dtype=torch.int64, device=device)
        self.seed = torch.zeros_like(self.row)
        self.x = self.initial_noise()
        self.history = torch.zeros_like(self.x)[None]

    def initial_noise(self) -> Tensor:
        """What the chain of this seed starts from."""
        return gaussian_noise(self.seed, self.ids, self.shape, 0, Stream.INITIAL_NOISE)

    def start(self, seed: int) -> None:
        """Go back to the first row, with some seed."""
        self.row.zero_()
        self.seed.fill_(seed)
        self.x.copy_(self.initial_noise())

    @torch.inference_mode()
    def step(self) -> None:
        """Advance by one row; launches only."""
        timestep = self.timesteps.index_select(0, self.row.reshape(1)).expand(len(self.ids))
        output = self.model(self.x, timestep)
        reverse_step(
            self.x, output, self.rows, self.row, self.seed, self.ids,
            history=self.history, in_place=True,
        )  # fmt: skip
        self.row.add_(1)

    def run(self, step: Callable[[], None], seed: int = SEED) -> Tensor:
        """The pictures of a seed, every step taken by `step`."""
        self.start(seed)
        for _ in range(self.steps):
            step()
        return self.x


def by_engine(
    model: Model, table: CoefficientTable, shape: tuple[int, int, int], ids: Tensor, seed: int
) -> Tensor:
    """The same pictures by the engine's own loop."""
    for step in sampling_steps(model, table, shape, seed=seed, sample_ids=ids):
        pictures = step.x
    return pictures


def check_loop(model: Model, side: int, exact: bool, device: torch.device) -> list[Comparison]:
    """Captured, eager and the engine's, for two seeds with one graph.

    To the bit where nothing depends on how it is launched; with a network, within twice what two
    eager runs differ by, and 5e-3: libraries may choose other algorithms in a graph, and convolve
    in TF32.
    """
    shape, table = (3, side, side), table_of(6)
    loop = Loop(model, table, shape, torch.tensor([0, 5, 2**40], device=device))
    replay = captured(loop.step, device)
    found = []
    for seed in (SEED, -7):
        eager = loop.run(loop.step, seed).clone()
        again = loop.run(loop.step, seed).clone()
        ours = by_engine(model, table, shape, loop.ids, seed)
        graph = loop.run(replay, seed).clone()
        for name, pictures in (("graph", graph), ("engine's loop", ours)):
            if exact:
                found.append(equal(f"{name}, seed {seed}", pictures, eager))
            else:
                allowed = 2 * largest(again - eager) + 5e-3
                error = largest(pictures - eager)
                found.append(Comparison(f"{name}, seed {seed}", error, allowed))
    return found


def loop_checks(device: torch.device, extent: Extent) -> Iterator[Check]:
    """A chain that must agree to the bit, and one with a U-Net."""
    yield "pointwise network", lambda: check_loop(pointwise, 17, True, device)
    yield "U-Net", lambda: check_loop(small_unet(device), 16, False, device)


def measure_loop(device: torch.device, extent: Extent, timer: Timer) -> list[Measurement]:
    """Time whole loops: the engine's, and with the step captured, compiled and both.

    In full, the paper's CIFAR-10 network in bfloat16, 64 pictures, 25 steps. The time of one call
    is that of a step. Bytes are not counted: a network is no matter of bandwidth.
    """
    if extent == "full":
        model, batch, steps, repeats = unet(UNetConfig(), device, torch.bfloat16), 64, 25, 5
    else:
        model, batch, steps, repeats = small_unet(device), 2, 4, 3
    ids = torch.arange(batch, device=device)
    shape, table = model.sample_shape, table_of(steps)
    loop = Loop(model, table, shape, ids)

    def loops(kind: str) -> dict[str, Callable[[], object]]:
        replay = captured(loop.step, device)
        return {
            f"{kind}": lambda: by_engine(model, table, shape, ids, SEED),
            f"{kind}, graph": lambda: loop.run(replay),
        }

    times = interleaved(loops("eager"), timer, repeats)
    if device.type == "cuda":
        model.compile_regions()
        times |= interleaved(loops("compiled"), timer, repeats)
    name = f"sampling loop, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"
    dtype = named(next(model.parameters()).dtype)
    return [
        Measurement(
            name, (batch, *shape), dtype, way, 0,
            median(found) / steps * 1e3, min(found) / steps * 1e3, median(found) / steps * 1e3,
            steps, repeats,
        )
        for way, found in times.items()
    ]  # fmt: skip
