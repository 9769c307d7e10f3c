"""Compile every kernel for every target on a machine without a GPU, and read what came out.

    python -m ddpm_kernels.aot [--targets sm_90,gfx942] [--dtypes bfloat16]

There is no second list of signatures: the operations are called on CPU tensors, each launch is
caught before it reaches a device, and what would have been launched is compiled, specialised as
Triton would have specialised it. The table has, for each kernel and target, registers, spills,
bytes of local memory, the widest global load and store in bits, and instructions.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_kernels import (
    Column,
    Stream,
    adamw_step,
    denoising_loss,
    gaussian_noise,
    gradient_norm,
    group_norm_silu,
    q_sample,
    reverse_step,
)
from ddpm_kernels.dispatch import assume_gpu
from ddpm_kernels.draws import training_draws
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
_AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


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


@dataclass(frozen=True)
class Code:
    """What the compiler made of a launch for one target."""

    registers: int
    """Per thread (vector registers on AMD)."""
    spills: int
    """Instructions, or registers on AMD, that go to local memory because registers ran out."""
    local_bytes: int
    """Stack or scratch bytes per thread."""
    widest_load: int
    """Bits of the widest global load of one thread."""
    widest_store: int
    """Bits of the widest global store of one thread."""
    instructions: int
    """Instructions of the whole kernel, each counted once."""


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
        return _read_cubin(compiled.asm["cubin"])
    return _read_amdgcn(compiled.asm["amdgcn"])


def _nvidia_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _read_cubin(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        text = _nvidia_tool("nvdisasm", file.name)
    # A line has an address, an optional predicate, and the mnemonic with its modifiers.
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text, re.M)

    def widest(mnemonic: str) -> int:
        # LDG.E.128 moves 128 bits, LDG.E 32, LDG.E.U16 16.
        found = [name for name in names if name.split(".")[0] == mnemonic]
        sizes = [re.search(r"\.[US]?(8|16|64|128|256)\b", name) for name in found]
        return max((int(size[1]) if size else 32 for size in sizes), default=0)

    return Code(
        registers=_number(r"REG:(\d+)", usage),
        spills=sum(name.startswith(("LDL", "STL")) for name in names),
        local_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        widest_load=widest("LDG"),
        widest_store=widest("STG"),
        instructions=sum(name != "NOP" for name in names),
    )


def _read_amdgcn(text: str) -> Code:
    code = text.split(".section", 1)[0]
    names = re.findall(r"^\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)", code, re.M)

    def widest(kind: str) -> int:
        pattern = rf"(?:global|buffer|flat)_{kind}_([a-z]+?(?:x\d)?)(?:_|$)"
        sizes = [match[1] for name in names if (match := re.match(pattern, name))]
        return max((_AMD_BITS.get(size, 0) for size in sizes), default=0)

    return Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text)
        + _number(r"\.sgpr_spill_count:\s+(\d+)|\Z", text),
        local_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        widest_load=widest("load"),
        widest_store=widest("store"),
        instructions=sum(name not in ("s_nop", "s_code_end") for name in names),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing matches {pattern!r} in the compiler's output")
    return int(match[1] or 0)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Channels-last zeros; unaligned ones begin one element into their memory."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    memory = torch.zeros(like.numel() + 1, dtype=dtype)
    return memory.as_strided(like.shape, like.stride(), 0 if aligned else 1)


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
        training_draws(
            seed, ids, integers=1000, flip=True, labels=timesteps, label_dropout=0.1,
            null_class=10, augmentation_levels=251,
        )  # fmt: skip
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
        history = torch.zeros(2, batch, side, side, channels).permute(0, 1, 4, 2, 3)
        reverse_step(x, output, coefficients, row, seed, ids, in_place=True)
        reverse_step(x, both, coefficients, row, seed, ids, unconditional=both, in_place=True)
        reverse_step(
            x, output, coefficients, row, seed, ids, unconditional=output, rescale=weights,
            threshold=weights, history=history, in_place=True,
        )  # fmt: skip
        narrow, wide = ((64, 32), (320, 32)) if aligned else ((30, 6), (7, 1))
        for (width, groups), film, activation, rows in (
            (narrow, False, "silu", side), (wide, True, "silu", side), (wide, False, "none", side),
            (narrow, True, "silu", 8),  # one slab covers a sample
        ):  # fmt: skip
            activations = _tensor((batch, width, rows, rows), dtype, aligned).requires_grad_()
            affine = torch.ones(width)
            scale = torch.zeros(batch, width, dtype=dtype) if film else None
            y = group_norm_silu(activations, groups, affine, affine, scale, scale, 1e-6, activation)
            y.sum().backward()
        _optimize(dtype, aligned)
    return launches


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
        f"{'kernel':24} {'network':9} {'aligned':8} {'target':7} regs spills local load store code"
    )
    failures = 0
    for name in dtypes:
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
