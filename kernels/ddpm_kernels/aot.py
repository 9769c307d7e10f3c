"""Compile every kernel for every target on a machine without a GPU, and read what came out.

    python -m ddpm_kernels.aot [--targets sm_90,gfx942] [--dtypes bfloat16]

There is no second list of signatures: the operations are called on CPU tensors, each launch is
caught before it reaches a device, and what would have been launched is compiled, specialised as
Triton would have specialised it. The table shows, for each kernel and target, registers, spills,
bytes of local memory, the widest global load and store in bits, and instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels import Column, denoising_loss, group_norm_silu, q_sample, reverse_step
from ddpm_kernels.assembly import (
    Access,
    Instruction,
    executed,
    read_accesses,
    read_amdgcn,
    read_sass,
)
from ddpm_kernels.denoising_loss import BoundColumn
from ddpm_kernels.dispatch import assume_gpu
from ddpm_kernels.triton_shim import HAS_TRITON, triton

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
    programs: int = field(default=1, compare=False)
    """Of the grid; they do not decide the code."""
    integers: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    """Values of the integer parameters that are not constants, likewise."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.fn.__name__).strip("_")


@dataclass(frozen=True)
class Code:
    """What the compiler made of a launch for one target."""

    registers: int
    """Per thread (vector registers on AMD)."""
    spills: int
    """Instructions, or registers on AMD, that go to local memory because registers ran out."""
    local_bytes: int
    """Stack or scratch bytes a thread."""
    widest_load: int
    """Bits of the widest global load of one thread."""
    widest_store: int
    """Bits of the widest global store of one thread."""
    instructions: int
    """Instructions of the whole kernel, each counted once."""
    threads: int
    """Of a program."""
    shared_bytes: int
    """Of shared memory a program."""
    listing: tuple[Instruction, ...] = field(repr=False)
    """The kernel's instructions in order."""
    accesses: tuple[Access, ...] = field(repr=False)
    """The loads and stores the kernel was compiled from."""

    def path(self, trips: int = 1) -> list[Instruction]:
        """What one thread executes (`assembly.executed`)."""
        return executed(self.listing, trips)

    def tile_bytes(self, path: list[Instruction]) -> int:
        """Bytes a program loads and stores on a path, by the instructions, for its whole tiles.

        A load or store belongs to a tile if the statement it comes from moves as many elements as
        any in the kernel does.
        """
        whole = max((access.elements for access in self.accesses), default=0)
        lines = {access.line for access in self.accesses if access.elements == whole}
        return sum(i.loads + i.stores for i in path if i.line in lines) // 8 * self.threads

    def other_bytes(self) -> int:
        """Bytes a program loads and stores beside its tiles, such as a seed or channels' weights.

        Counted once, however many threads ask for them: a cache serves the rest.
        """
        whole = max((access.elements for access in self.accesses), default=0)
        return sum(a.elements * a.bits for a in self.accesses if a.elements < whole) // 8


@contextmanager
def recorded_launches(target: str) -> Iterator[list[Launch]]:
    """Let operations on CPU tensors go as far as the launch on a target, and note it instead."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = _describe(self, arguments, named, grid)
        if launch not in launches:
            launches.append(launch)

    original = JITFunction.run
    JITFunction.run = note
    try:
        with assume_gpu(target):
            yield launches
    finally:
        JITFunction.run = original


def _describe(
    kernel: Any, arguments: tuple[Any, ...], named: dict[str, Any], grid: tuple[int, ...]
) -> Launch:
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, _TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(index)
        elif isinstance(value, int):
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                aligned.append(index)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        else:
            raise TypeError(f"{kernel.fn.__name__}: {parameter.name} is a {type(value).__name__}")
    constant = {name for name, _ in constants}
    return Launch(
        kernel,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(sorted(options.items())),
        programs=prod(grid),
        integers=tuple(
            (name, value)
            for name, value in values.items()
            if isinstance(value, int) and name not in constant
        ),
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
    vendor, _, lanes = TARGETS[target]
    if vendor == "cuda":
        usage, listing = _read_cubin(compiled.asm["cubin"])
    else:
        usage, listing = _read_amdgcn(compiled.asm["amdgcn"])
    return Code(
        **usage,
        widest_load=max((i.loads for i in listing), default=0),
        widest_store=max((i.stores for i in listing), default=0),
        instructions=len(listing),
        threads=compiled.metadata.num_warps * lanes,
        shared_bytes=compiled.metadata.shared,
        listing=tuple(listing),
        accesses=read_accesses(compiled.asm["ttgir"]),
    )


def _nvidia_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _read_cubin(cubin: bytes) -> tuple[dict[str, int], list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        listing = read_sass(_nvidia_tool("nvdisasm", "-g", file.name))
    usage = {
        "registers": int(_first(r"REG:(\d+)", text)),
        "spills": sum(i.name.startswith(("LDL", "STL")) for i in listing),
        "local_bytes": int(_first(r"STACK:(\d+)", text)) + int(_first(r"LOCAL:(\d+)", text)),
    }
    return usage, listing


def _read_amdgcn(text: str) -> tuple[dict[str, int], list[Instruction]]:
    usage = {
        "registers": int(_first(r"\.vgpr_count:\s+(\d+)", text)),
        "spills": int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
        + int(_first(r"\.sgpr_spill_count:\s+(\d+)", text, "0")),
        "local_bytes": int(_first(r"\.private_segment_fixed_size:\s+(\d+)", text)),
    }
    return usage, read_amdgcn(text)


def _first(pattern: str, text: str, otherwise: str | None = None) -> str:
    match = re.search(pattern, text)
    if match is None and otherwise is None:
        raise ValueError(f"nothing matches {pattern!r} in the compiler's output")
    return match[1] if match is not None else str(otherwise)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Channels-last zeros; unaligned ones begin one element into their memory."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    memory = torch.zeros(like.numel() + 1, dtype=dtype)
    return memory.as_strided(like.shape, like.stride(), 0 if aligned else 1)


def production_launches(dtype: torch.dtype, aligned: bool, target: str) -> list[Launch]:
    """What the operations launch for a network running in `dtype`.

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
        for stored in (torch.uint8, torch.float32):
            images = _tensor(shape, stored, aligned)
            q_sample(images, timesteps, table, table, seed, ids, flip, dtype)
            prediction = _tensor(shape, dtype, aligned)
            for predicted in ("eps", "x0", "v"):
                denoising_loss(
                    prediction, images, timesteps, table, table, seed, ids, weights, flip,
                    target=predicted,
                )  # fmt: skip
        x, output = _tensor(shape, torch.float32, aligned), _tensor(shape, dtype, aligned)
        both = _tensor((batch, 2 * channels, side, side), dtype, aligned)
        denoising_loss(
            both, images, timesteps, table, table, seed, ids, weights, flip,
            bound_table=torch.zeros(1000, len(BoundColumn)), bound_weights=weights,
        )  # fmt: skip
        history = torch.zeros(2, batch, side, side, channels).permute(0, 1, 4, 2, 3)
        reverse_step(x, output, coefficients, row, seed, ids, in_place=True)
        reverse_step(x, both, coefficients, row, seed, ids, unconditional=both, in_place=True)
        reverse_step(
            x, output, coefficients, row, seed, ids, unconditional=output, rescale=weights,
            threshold=weights, history=history, in_place=True,
        )  # fmt: skip
        for width, groups in [(64, 32), (320, 32)] if aligned else [(30, 6), (7, 1)]:
            activations = _tensor((batch, width, side, side), dtype, aligned).requires_grad_()
            affine = torch.ones(width)
            film = torch.zeros(batch, width, dtype=dtype)
            for scale in (None, film):
                for activation in ("silu", "none"):
                    y = group_norm_silu(
                        activations, groups, affine, affine, scale, scale, 1e-6, activation
                    )
                    y.sum().backward()
    return launches


def main() -> None:
    """Compile what production launches and print one line a kernel."""
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
    targets = options.targets.split(",")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        sys.exit(f"error: unknown target {unknown[0]!r}; choose from {', '.join(TARGETS)}")
    print(
        f"{'kernel':24} {'network':9} {'aligned':8} {'target':7} regs spills local load store code"
    )
    failures = 0
    for name in options.dtypes.split(","):
        for aligned in (True, False):
            for target in targets:
                for launch in production_launches(getattr(torch, name), aligned, target):
                    code = compile_launch(launch, target)
                    failures += code.spills > 0 or code.local_bytes > 0
                    print(
                        f"{launch.name:24} {name:9} {aligned!s:8} {target:7} {code.registers:4} "
                        f"{code.spills:6} {code.local_bytes:5} {code.widest_load:4} "
                        f"{code.widest_store:5} {code.instructions:4}",
                        flush=True,
                    )
    if failures:
        sys.exit(f"{failures} of these spill or use local memory")


if __name__ == "__main__":
    main()
