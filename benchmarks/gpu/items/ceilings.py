"""What the card can do at best: copies, matrix products, convolutions of the networks' shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from benchmarks.gpu import machine
from benchmarks.gpu.item import Context
from benchmarks.gpu.timing import microseconds, normals, sized

MATMUL = "matmul"
"""`what` of the row whose TFLOP/s are the card's ceiling."""
CONVOLUTIONS = (
    (128, 3, 32, 128, 3),
    (128, 128, 32, 128, 3),
    (128, 256, 16, 256, 3),
    (128, 512, 16, 256, 3),
    (128, 256, 8, 256, 3),
    (128, 512, 8, 256, 1),
    (16, 3, 256, 128, 3),
    (16, 128, 256, 128, 3),
    (16, 256, 64, 256, 3),
)
"""Batch, channels in, side, channels out, kernel: of the CIFAR-10 and the 256-pixel network."""


def ceilings(context: Context) -> None:
    """Time them on random values: zeros would flatter."""
    device, dry = context.device, context.dry
    block = torch.empty(2**20 if dry else 4 * 2**30, dtype=torch.uint8, device=device).random_()
    took = microseconds(block.clone, device, 5)
    context.add({"what": "copy", "size": f"{block.numel() >> 20} MiB", "µs": took,
                 "GB/s": 2 * block.numel() / took / 1e3})  # fmt: skip
    del block
    side = 64 if dry else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    took = microseconds(partial(torch.mm, a, b), device, 20)
    context.add({"what": MATMUL, "size": f"{side}³ bfloat16", "µs": took,
                 "TFLOP/s": 2 * side**3 / took / 1e6})  # fmt: skip
    if hot := machine.asked(*machine.CLOCKS):
        context.add({"what": "clocks and power under load", "size": ", ".join(hot.values())})
    for shape in ((2, 3, 8, 4, 3),) if dry else CONVOLUTIONS:
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            _convolution(context, shape, benchmark)


def _convolution(context: Context, shape: tuple[int, int, int, int, int], benchmark: bool) -> None:
    batch, inputs, side, outputs, kernel = shape
    x = normals((batch, inputs, side, side), torch.bfloat16, context.device)
    weight = normals((outputs, inputs, kernel, kernel), torch.bfloat16, context.device)
    dy = normals((batch, outputs, side, side), torch.bfloat16, context.device)
    rest = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    backward = partial(torch.ops.aten.convolution_backward, dy, x, weight, None, *rest)
    passes: dict[str, Callable[[], object]] = {
        "forward": partial(torch.ops.aten.convolution, x, weight, None, *rest),
        "of the input": partial(backward, [True, False, False]),
        "of the weights": partial(backward, [False, True, False]),
    }
    flop = 2 * batch * side**2 * inputs * outputs * kernel**2
    for name, run in passes.items():
        run()  # cuDNN looks for an algorithm
        took = microseconds(run, context.device, 10)
        context.add({
            "what": f"convolution, {name}",
            "size": f"{sized((batch, inputs, side, side))} → {outputs}, {kernel}×{kernel}",
            "cudnn.benchmark": benchmark, "µs": took, "TFLOP/s": flop / took / 1e6,
        })  # fmt: skip
