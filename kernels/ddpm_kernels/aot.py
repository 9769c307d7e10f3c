"""Compile every kernel for every target on a machine without a GPU, and read what came out.

    python -m ddpm_kernels.aot [--targets sm_90,gfx942] [--dtypes bfloat16]

There is no second list of signatures: the operations are called on CPU tensors, each launch is
caught before it reaches a device, and what would have been launched is compiled, specialised as
Triton would have specialised it. The table has, for each kernel, its options and target: registers,
spills, bytes of local memory, the widest global load and store in bits, instructions of the whole,
and instructions and bytes an element, loop by loop (`machine_code` says how they are counted).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels import (
    Column,
    Moments,
    Stream,
    adamw_step,
    denoising_loss,
    gaussian_noise,
    gradient_norm,
    group_norm_silu,
    group_norm_silu_residual,
    modulate,
    q_sample,
    residual_sum,
    reverse_step,
)
from ddpm_kernels.dispatch import assume_gpu
from ddpm_kernels.draws import training_draws
from ddpm_kernels.dropout import Dropout
from ddpm_kernels.machine_code import Code, read_amdgcn, read_cubin
from ddpm_kernels.triton_shim import HAS_TRITON, triton
from ddpm_kernels.variational_bound import BoundColumn

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


_PRESENT = {
    "SKIP": "skip", "THRESHOLD": "dropout", "RESIDUALS": "residuals", "COLUMNS": "columns",
    "SCALE": "latents",
}  # fmt: skip
"""Constants above zero where something is present, and what that is."""


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that decides its code."""

    kernel: Any
    """The `JITFunction`."""
    signature: tuple[tuple[str, str], ...]
    """Name and type of each parameter, `"constexpr"` for constants."""
    constants: tuple[tuple[str, Any], ...]
    """Values of the constants."""
    aligned: tuple[int, ...]
    """Indices of parameters divisible by 16, which lets loads be wide."""
    options: tuple[tuple[str, Any], ...]
    """Compiler options: warps and stages."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.fn.__name__).strip("_")

    @property
    def variant(self) -> str:
        """Switches that are on, and what else is present, as `film+silu+skip`."""
        found = [name.lower() for name, value in self.constants if value is True]
        found += [_PRESENT[name] for name, value in self.constants if _PRESENT.get(name) and value]
        return "+".join(found)

    def elements(self, warp: int) -> float | None:
        """Elements of a tile for each thread of warps of this size; None: it has no tile."""
        constants, options = dict(self.constants), dict(self.options)
        tile = constants.get("TILE") or constants.get("ROWS", 0) * constants.get("WIDTH", 0)
        return tile / (options["num_warps"] * warp) if tile else None


@contextmanager
def recorded_launches(target: str) -> Iterator[list[Launch]]:
    """Let operations on CPU tensors go as far as the launch on a target, and note it instead."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = _describe(self, arguments, named)
        if launch not in launches:
            launches.append(launch)

    original = JITFunction.run
    JITFunction.run = note
    try:
        with assume_gpu(target):
            yield launches
    finally:
        JITFunction.run = original


def _describe(kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        specialised = not parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and specialised
        if parameter.is_constexpr or value is None or one:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(index)
        elif isinstance(value, int):
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and specialised:
                aligned.append(index)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            raise TypeError(f"{kernel.fn.__name__}: {parameter.name} is a {type(value).__name__}")
    return Launch(
        kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
    )


def compile_launch(launch: Launch, target: str) -> Code:
    """Compile for one of `TARGETS` and read the result.

    Raises:
        Exception: whatever Triton or the assembler raises; the code does not compile.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        dict(launch.constants),
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget(*TARGETS[target]), options=dict(launch.options)
    )
    if TARGETS[target][0] == "cuda":
        return read_cubin(compiled.asm["cubin"])
    return read_amdgcn(compiled.asm["amdgcn"])


def each_element(launch: Launch, code: Code, target: str) -> str:
    """Instructions and bytes an element: `12.5 + 18.0, 2.0 + 4.0` of a kernel with two loops."""
    elements = launch.elements(TARGETS[target][2])
    if elements is None:
        return "-"
    instructions = (f"{each.instructions / elements:.1f}" for each in code.stretches)
    moved = (f"{each.moved_bits / 8 / elements:.1f}" for each in code.stretches)
    return f"{' + '.join(instructions)}, {' + '.join(moved)}"


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Channels-last zeros; unaligned ones begin one element into their memory."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    memory = torch.zeros(like.numel() + 1, dtype=dtype)
    return memory.as_strided(like.shape, like.stride(), 0 if aligned else 1)


def _modulate(dtype: torch.dtype, aligned: bool) -> None:
    """Join a transformer's branches, and begin with no branch, with either norm."""
    batch, length = (4, 64) if aligned else (3, 49)
    for channels, gated, norm in ((768, True, "layer"), (1152, False, "rms")):
        channels -= 0 if aligned else 3
        x, y = (_tensor((batch, length, channels), dtype, aligned) for _ in range(2))
        rows = _tensor((batch, 6 * channels), dtype, aligned)
        gate, scale, shift = rows.chunk(6, 1)[:3]
        x = x.requires_grad_()
        if gated:
            r, m = modulate(x, y, gate, scale, shift, norm=norm)
            (r + m).sum().backward()
        else:
            weight = torch.ones(channels, requires_grad=True)
            modulate(x, None, None, scale, shift, weight=weight, norm=norm)[1].sum().backward()


def production_launches(dtype: torch.dtype, aligned: bool, target: str) -> list[Launch]:
    """Record what the operations launch for a network running in `dtype`.

    Args:
        dtype: of the network's output and activations: float32, float16 or bfloat16.
        aligned: pointers and element counts divisible by 16; otherwise neither is.
        target: one of `TARGETS`; tiles may differ between them.
    """
    batch, channels, side = (4, 4, 32) if aligned else (3, 3, 15)
    shape = (batch, channels, side, side)
    table = torch.zeros(1000)
    timesteps, ids = torch.zeros(batch, dtype=torch.int64), torch.arange(batch)
    flip, weights = torch.zeros(batch, dtype=torch.bool), torch.ones(batch)
    seed, row = torch.tensor(0), torch.tensor(0)
    coefficients = torch.zeros(10, Column.HISTORY + 2)
    with recorded_launches(target) as launches:
        _modulate(dtype, aligned)
        training_draws(
            seed, ids, integers=1000, flip=True, labels=timesteps, label_dropout=0.1,
            null_class=10, augmentation_levels=251, dropout_key=True,
        )  # fmt: skip
        training_draws(seed, ids, integers=1000, dropout_key=True, dropped=True)
        gaussian_noise(seed, ids, (channels, side, side), row, Stream.INITIAL_NOISE)
        prediction = _tensor(shape, dtype, aligned)
        stored = _tensor(shape, torch.uint8, aligned), _tensor(shape, torch.float32, aligned)
        for images in stored:
            q_sample(images, timesteps, table, table, seed, ids, flip, dtype)
        for images, target_x0, target_noise in (
            (stored[0], None, table),
            (stored[0], table, None),
            (stored[0], table, table),
            (stored[1], table, table),
        ):
            denoising_loss(
                prediction, images, timesteps, target_x0, target_noise, seed, ids, weights, flip
            )
        x, output = _tensor(shape, torch.float32, aligned), _tensor(shape, dtype, aligned)
        both = _tensor((batch, 2 * channels, side, side), dtype, aligned)
        denoising_loss(
            both, stored[0], timesteps, None, table, seed, ids, weights, flip,
            bound_table=torch.zeros(1000, len(BoundColumn)), bound_weights=weights,
        )  # fmt: skip
        # As they are stored, channels first.
        numbers = _tensor((batch, 2 * channels * side**2), torch.float16, aligned)
        moments = numbers.view(batch, 2 * channels, side, side)
        latent: dict[str, Any] = {"latent_scale": 0.3611, "latent_shift": 0.1159}
        q_sample(moments, timesteps, table, table, seed, ids, None, dtype, **latent)
        denoising_loss(
            prediction, moments, timesteps, table, table, seed, ids, weights, **latent
        )  # fmt: skip
        denoising_loss(
            both, moments, timesteps, table, table, seed, ids, weights, None,
            torch.zeros(1000, len(BoundColumn)), weights, **latent,
        )  # fmt: skip
        history = torch.zeros(2, batch, side, side, channels).permute(0, 1, 4, 2, 3)
        reverse_step(x, output, coefficients, row, seed, ids, in_place=True)
        reverse_step(x, both, coefficients, row, seed, ids, unconditional=both, in_place=True)
        reverse_step(
            x, output, coefficients, row, seed, ids, unconditional=output, rescale=weights,
            threshold=weights, history=history, in_place=True,
        )  # fmt: skip
        _normalize(dtype, aligned)
        _add(dtype, aligned)
        _optimize(dtype, aligned)
    return launches


def _add(dtype: torch.dtype, aligned: bool) -> None:
    """End residual branches, with and without moments, a bias and another branch."""
    channels, side = (320, 64) if aligned else (7, 33)
    for pixels in (side, 16):
        h, x = (_tensor((2, channels, pixels, pixels), dtype, aligned) for _ in range(2))
        bias = torch.zeros(channels, dtype=dtype)
        residual_sum(h, x, bias)
        residual_sum(h, x, bias, divisor=2**0.5)
        residual_sum(h, None, bias)


def _normalize(dtype: torch.dtype, aligned: bool) -> None:
    """Take norms forward and back: plain ones, and the two of a residual block, fused.

    Of sides that leave a sample's chunk on chip, and of one that does not.
    """
    batch, small, large = (4, (8, 32), 64) if aligned else (3, (8, 15), 45)
    narrow, wide = ((64, 32), (320, 32)) if aligned else ((30, 6), (7, 1))
    for (width, groups), film, activation, side in (
        (narrow, False, "silu", large), (wide, True, "silu", large),
        (wide, False, "none", small[1]), (narrow, True, "silu", small[0]),
    ):  # fmt: skip
        x = _tensor((batch, width, side, side), dtype, aligned).requires_grad_()
        affine = torch.ones(width)
        scale = torch.zeros(batch, width, dtype=dtype) if film else None
        y = group_norm_silu(x, groups, affine, affine, scale, scale, 1e-6, activation)
        y.sum().backward()

    # A group of channels of both maps.
    first, second, groups = (40, 24, 4) if aligned else (13, 17, 6)
    affine, owed = torch.ones(first + second), torch.zeros(first, requires_grad=True)
    key = torch.zeros(batch, dtype=torch.int64)
    for side in (small[1], large):
        x = _tensor((batch, first, side, side), dtype, aligned).requires_grad_()
        skip = _tensor((batch, second, side, side), dtype, aligned).requires_grad_()
        y, *same = group_norm_silu_residual(
            x, groups, affine, affine, skip=skip, owed=(owed, None)
        )  # fmt: skip
        sum((one.sum() for one in same if one is not None), y.sum()).backward()
        kept = [Moments(torch.zeros(batch, 4, 3, n), side**2 // 4) for n in (first, second)]
        group_norm_silu(x, groups, affine, affine, skip=skip, moments=(kept[0], kept[1]))
        x = _tensor((batch, narrow[0], side, side), dtype, aligned).requires_grad_()
        before = torch.zeros(batch, narrow[0], dtype=dtype, requires_grad=True)
        group_norm_silu(
            x, narrow[1], affine[: narrow[0]], affine[: narrow[0]],
            before=before, dropout=Dropout(0.1, key),
        ).sum().backward()  # fmt: skip


def _optimize(dtype: torch.dtype, aligned: bool) -> None:
    """Take the step of an optimizer with no, one and three averages, on gradients in `dtype`."""
    sizes = (4096, 64) if aligned else (4095, 63)
    gradients = [_tensor((size,), dtype, aligned) for size in sizes]
    count, number = sum(sizes), torch.zeros(())
    gradient_norm(gradients)
    weights, exp_avg, exp_avg_sq = (_tensor((count,), torch.float32, aligned) for _ in range(3))
    shadow = None if dtype == torch.float32 else _tensor((sizes[0],), dtype, aligned)
    for kept in (0, 1, 3):
        adamw_step(
            gradients, [0, sizes[0]], weights, exp_avg, exp_avg_sq, torch.zeros(kept, count),
            shadow, number, number, torch.zeros(kept), number, number,
            betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
        )  # fmt: skip


def _check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            sys.exit(f"error: unknown {what} {name!r}; choose from {', '.join(known)}")


def main() -> None:
    """Compile what production launches and print one line per kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help="comma-separated; default: %(default)s",
    )
    parser.add_argument(
        "--dtypes",
        default="float32,float16,bfloat16",
        help="of the network; default: %(default)s",
    )
    options = parser.parse_args()
    if not HAS_TRITON:
        sys.exit("error: Triton is not installed; there are wheels for Linux only")
    targets, dtypes = options.targets.split(","), options.dtypes.split(",")
    _check_known("target", targets, TARGETS)
    _check_known("dtype", dtypes, ("float32", "float16", "bfloat16"))
    print(
        f"{'kernel':24} {'options':36} {'network':9} {'aligned':7} {'target':7} regs spills local "
        "load store code  instructions, bytes an element"
    )
    failures = 0
    for name in dtypes:
        for aligned in (True, False):
            for target in targets:
                for launch in production_launches(getattr(torch, name), aligned, target):
                    code = compile_launch(launch, target)
                    failures += code.spills > 0 or code.local_bytes > 0
                    print(
                        f"{launch.name:24} {launch.variant:36} {name:9} {aligned!s:7} {target:7} "
                        f"{code.registers:4} {code.spills:6} {code.local_bytes:5} "
                        f"{code.widest_load:4} {code.widest_store:5} {code.instructions:4}  "
                        f"{each_element(launch, code, target)}",
                        flush=True,
                    )
    if failures:
        sys.exit(f"{failures} of these spill or use local memory")


if __name__ == "__main__":
    main()
