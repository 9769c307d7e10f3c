"""Time other tiles on the GPU at hand, and write the fastest to a file for `DDPM_TILES`.

    python -m ddpm_kernels.autotune --out tiles.json

Each operation is run on images (or activations) of several sizes; a tile's figure is the geometric
mean, over the sizes, of its time relative to that of the table's tile. A graph of many calls is
timed, so that the kernels are measured and not the host. First the size of a tile and its warps
vary; then, of the norms, the stages of their loops and the number of programs.
Nothing else tunes by itself: a tile decides in which order sums are taken, so all ranks of a run
must use the same file.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch

from ddpm_kernels import (
    Column,
    adamw_step,
    denoising_loss,
    gradient_norm,
    q_sample,
    residual_sum,
    reverse_step,
)
from ddpm_kernels.tiles import (
    TILES,
    Table,
    Tile,
    architecture,
    read_tiles,
    tile_for,
    trying,
    write_tiles,
)
from ddpm_kernels.triton_shim import HAS_TRITON, triton

CANDIDATES = tuple(
    Tile(elements, warps)
    for elements in (512, 1024, 2048, 4096)
    for warps in (1, 2, 4, 8)
    if 4 <= elements // (32 * warps) <= 64
)
STAGES = (1, 2, 3)
PROGRAMS = (256, 512, 1024, 2048)
IMAGES = ((64, 3, 32, 32), (256, 3, 64, 64), (64, 3, 256, 256))
TOKENS = ((256, 64, 384), (256, 256, 768), (64, 256, 1152))
WEIGHTS = (100_000, 35_000_000)
ACTIVATIONS = ((64, 256, 64, 64), (64, 128, 128, 128), (16, 128, 256, 256))
"""None fits on chip: there no tile is chosen."""

Work = Callable[[], object]


def workloads(device: torch.device) -> dict[str, list[Work]]:
    """Calls of each operation, on bfloat16 as a network in mixed precision has it."""
    works: dict[str, list[Work]] = {operation: [] for operation in TILES["default"]}
    for batch, length, channels in TOKENS:
        x, y = torch.randn(2, batch, length, channels, dtype=torch.bfloat16, device=device)
        gate, scale, shift = torch.randn(3, batch, channels, dtype=torch.bfloat16, device=device)
        works["modulate"].append(
            partial(torch.ops.ddpm.modulate, x, y, gate, scale, shift, None, "layer", 1e-6)
        )
        works["modulate_backward"].append(
            partial(torch.ops.ddpm.modulate_backward, x, y, x, y, gate, scale, None, "layer", 1e-6)
        )
    for shape in IMAGES:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        t, ids = (torch.arange(shape[0], device=device) for _ in range(2))
        table = torch.linspace(0.9, 0.1, max(1000, shape[0]), device=device)
        seed = torch.tensor(0, device=device)
        output = q_sample(images, t, table, table, seed, ids, dtype=torch.bfloat16)
        state, row = output.float(), torch.tensor(1, device=device)
        coefficients = torch.full((2, Column.HISTORY), 0.1, device=device)
        noising = (images, t, table, table, seed, ids)
        works["q_sample"].append(partial(q_sample, *noising, dtype=torch.bfloat16))
        works["denoising_loss"].append(partial(denoising_loss, output, *noising))
        works["reverse_step"].append(
            partial(reverse_step, state, output, coefficients, row, seed, ids, in_place=True)
        )
    for shape in ACTIVATIONS:
        x = torch.randn(shape, dtype=torch.bfloat16, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        gain = torch.ones(shape[1], device=device)
        rest = (32, gain, gain, None, None)
        y, statistics = torch.ops.ddpm.group_norm_silu(x, *rest, 1e-6, "silu")
        operations = torch.ops.ddpm
        works["residual_sum"].append(partial(residual_sum, x, x.clone(), gain))
        works["group_norm_silu"].append(partial(operations.group_norm_silu, x, *rest, 1e-6, "silu"))
        works["group_norm_silu_backward"].append(
            partial(operations.group_norm_silu_backward, y, x, *rest, statistics, "silu")
        )
    number, one = torch.zeros((), device=device), torch.ones((), device=device)
    for count in WEIGHTS:
        gradients = torch.randn(count, device=device, dtype=torch.bfloat16).split(2**20)
        weights, exp_avg, exp_avg_sq, average = torch.zeros(4, count, device=device)
        step = partial(
            adamw_step, list(gradients), list(range(0, count, 2**20)), weights, exp_avg, exp_avg_sq,
            average[None], torch.zeros_like(weights, dtype=torch.bfloat16), number.clone(), number,
            one[None], one, number, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        )  # fmt: skip
        works["gradient_norm"].append(partial(gradient_norm, list(gradients)))
        works["adamw_step"].append(step)
    return works


def fastest(
    operation: str,
    works: Sequence[Work],
    table_tile: Tile,
    seconds: Callable[[Work], float],
) -> tuple[Tile, float]:
    """The best of `CANDIDATES`, with the best stages and programs, and its relative time.

    Args:
        operation: whose tile is tried.
        works: calls to time.
        table_tile: what the others are compared with; it wins unless another is faster.
        seconds: times a call; an exception of it rules a candidate out (too many registers, say).
    """

    def times(tile: Tile) -> list[float]:
        with trying(operation, tile):
            return [seconds(work) for work in works]

    baseline = times(table_tile)
    ratios = {table_tile: 1.0}

    def try_all(candidates: Iterable[Tile]) -> Tile:
        for tile in candidates:
            if tile in ratios:
                continue
            try:
                logs = [math.log(t / b) for t, b in zip(times(tile), baseline, strict=True)]
            except Exception as error:
                print(f"  {operation} {tile}: {type(error).__name__}", flush=True)
                continue
            ratios[tile] = math.exp(sum(logs) / len(logs))
        return min(ratios, key=lambda tile: ratios[tile])

    best = try_all(table_tile._replace(elements=c.elements, warps=c.warps) for c in CANDIDATES)
    if operation.startswith(("group_norm_silu", "modulate")):
        best = try_all(
            best._replace(stages=stages, programs=programs)
            for stages, programs in product(STAGES, PROGRAMS)
        )
    return best, ratios[best]


def captured_milliseconds(work: Work) -> float:
    """Time a call on the GPU: the median over replays of a graph of many, per call."""
    found: float = triton.testing.do_bench_cudagraph(work, quantiles=[0.5])
    return found


def main() -> None:
    """Tune every operation and write the file."""
    parser = argparse.ArgumentParser(description="Time tiles on this GPU, write the fastest.")
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write; other GPUs' entries in it are kept"
    )
    options = parser.parse_args()
    if not (HAS_TRITON and torch.cuda.is_available()):
        sys.exit("error: autotuning needs a GPU and Triton; torch sees no GPU here")
    device = torch.device("cuda")
    name = architecture(torch.empty(0, device=device))
    table: Table = {}
    for operation, works in workloads(device).items():
        before = tile_for(operation, torch.empty(0, device=device))
        tile, ratio = fastest(operation, works, before, captured_milliseconds)
        table[operation] = tile
        print(f"{operation}: {before} → {tile}, {ratio:.2f} of the time", flush=True)
    tables = read_tiles(options.out) if options.out.exists() else {}
    write_tiles(options.out, {**tables, name: table})
    print(f"wrote {options.out}; run with DDPM_TILES={options.out} to use it")


if __name__ == "__main__":
    main()
