"""Bytes, instructions and a roofline of the kernels: `python benchmarks/kernel_roofline.py`.

No GPU is needed. Each kernel is compiled for each target; bytes, instructions, registers and shared
memory are then counts, read from the machine code along the path that a thread takes in the middle
of an image (`ddpm_kernels.assembly.executed`): no mirrored images, full tiles, noise drawn.

The two times an element are a model, not a measurement. Issue: on each kind of execution unit the
lanes' instructions over what the vendor says it takes a clock; the busiest unit decides. Memory:
bytes over the data sheet's bandwidth. Latency, caches and launches are not in it.

The same work written the textbook way is counted beside it: eager, where each torch operation reads
its inputs once and writes its outputs once, and under torch.compile, where inductor's schedule for
a CPU says what its kernels read and write; on a GPU it may fuse otherwise. Conversions are those
that autocast would insert on a GPU. What torch does around our kernels, chiefly the gradient's
scaling by the gradient of the loss, is counted the same way and told apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_engine.cli.options import parse_options
from ddpm_engine.errors import UserError, exit_on_user_error
from ddpm_kernels import Column, denoising_loss, group_norm_silu, q_sample, reverse_step
from ddpm_kernels.aot import TARGETS, Code, Launch, compile_launch, recorded_launches
from ddpm_kernels.assembly import KINDS, count_kinds

MODEL = (
    "Bytes and instructions are counts in the compiled code; times are a model of it, not a "
    "measurement."
)

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Options:
    """Bytes, instructions and a roofline of each kernel, without a GPU."""

    targets: str = ",".join(TARGETS)
    """What to compile for, comma-separated."""
    dtypes: str = "bfloat16"
    """Types of the network's output and activations, comma-separated, of bfloat16, float16 and
    float32."""
    out: Path = Path(__file__).parent / "results"
    """Folder for kernel_roofline.json and kernel_roofline.png."""


# --- Devices


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a device. A unit is a multiprocessor or a compute unit."""

    name: str
    units: int
    clock: float
    """Hz, boost or peak."""
    bandwidth: float
    """Of its memory, bytes/s."""
    pipes: dict[str, dict[str, int]]
    """Lanes a clock a unit, of each kind of instruction; kinds in one pipe wait for each other."""
    warps: int
    """Resident in a unit, at most."""
    programs: int
    """Of a launch resident in a unit, at most."""
    registers: int
    """Of 32 bits in a unit, in four equal files."""
    granule: int
    """A warp gets a multiple of so many."""
    shared_bytes: int
    """Of shared memory in a unit."""
    reserved_bytes: int
    """Of it, taken by the system for each program."""
    source: str

    def issue(self, lanes: dict[str, float]) -> tuple[float, str]:
        """Seconds for so many instructions of each kind, over all lanes, and the busiest pipe."""
        clocks = {
            name: sum(lanes[kind] / rate for kind, rate in pipe.items())
            for name, pipe in self.pipes.items()
        }
        busiest = max(clocks, key=lambda name: clocks[name])
        return clocks[busiest] / (self.units * self.clock), busiest

    def occupancy(self, code: Code, lanes: int) -> float:
        """Resident warps over the most that there can be."""
        warps = code.threads // lanes
        per_warp = -(-code.registers * lanes // self.granule) * self.granule
        shared = code.shared_bytes + self.reserved_bytes
        programs = min(
            self.warps // warps,
            self.programs,
            4 * (self.registers // 4 // per_warp) // warps,
            self.shared_bytes // max(shared, 1),
        )
        return programs * warps / self.warps


def _nvidia(float32: int) -> dict[str, dict[str, int]]:
    """Pipes of a multiprocessor.

    CUDA C++ Best Practices Guide 13, "Throughput of Native Arithmetic Instructions", columns 8.0,
    9.0, 10.0 and 12.0: float32 64, 128, 128, 128; integer addition, shifts, logic, comparison and
    multiplication 64 (12.0 adds at 128, which is not counted on); reciprocals and the like 16;
    conversions from float32 16 (others are faster and counted as those); exchange in a warp 32.
    Four schedulers issue a warp's instruction each a clock. A packed pair counts as one.
    """
    rates = {"integer": 64, "multiply": 64, "float": float32, "conversion": 16, "special": 16}
    rates["shared"] = 32
    return {"issue": dict.fromkeys(KINDS, 128)} | {kind: {kind: n} for kind, n in rates.items()}


_AMD_PIPES = {
    # LLVM, AMDGPU/SISchedule.td: WriteIntMul, WriteFloatCvt and WriteTrans32 take four times as
    # long as the rest of what the vector unit does (64 lanes a clock: CDNA 2 and 3 white papers).
    "vector": {"integer": 64, "float": 64, "multiply": 16, "conversion": 16, "special": 16},
    "shared": {"shared": 32},  # 128 bytes a clock (CDNA 3 ISA reference)
    "scalar": {"other": 64},  # and branches: one instruction a wave of 64
}

_CUDA_LIMITS = {"registers": 65536, "granule": 256, "reserved_bytes": 1024}
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_AMD_LIMITS = {"registers": 131072, "granule": 512, "reserved_bytes": 0, "warps": 32}
# ROCm documentation, "AMD GPU specifications" (VGPR file 512 KiB); LLVM, AMDGPUBaseInfo.cpp:
# eight waves a SIMD, registers by eight, sixteen work groups of several waves.

DEVICES = {
    "sm_80": Device(
        "A100 SXM 80 GB", 108, 1.41e9, 2.039e12, _nvidia(64),
        warps=64, programs=32, shared_bytes=164 << 10, **_CUDA_LIMITS,
        source="NVIDIA A100 architecture white paper (SMs, clock); A100 80GB data sheet (memory)",
    ),
    "sm_90": Device(
        "H100 SXM", 132, 1.98e9, 3.35e12, _nvidia(128),
        warps=64, programs=32, shared_bytes=228 << 10, **_CUDA_LIMITS,
        source="NVIDIA H100 architecture white paper (SMs, clock; 67 TFLOPS float32); data sheet",
    ),
    "sm_100": Device(
        "B200 SXM", 148, 1.98e9, 7.7e12, _nvidia(128),
        warps=64, programs=32, shared_bytes=228 << 10, **_CUDA_LIMITS,
        source="NVIDIA HGX B200 data sheet (75 TFLOPS float32 a GPU, memory); the number of SMs is "
        "not in it but as devices report it, the clock follows from both",
    ),
    "sm_120": Device(
        "RTX 5090", 170, 2.407e9, 1.792e12, _nvidia(128),
        warps=48, programs=24, shared_bytes=100 << 10, **_CUDA_LIMITS,
        source="NVIDIA RTX Blackwell GPU architecture white paper, table of the GeForce RTX 5090",
    ),
    "gfx90a": Device(
        "MI250X, one die", 110, 1.7e9, 1.638e12, _AMD_PIPES,
        programs=16, shared_bytes=64 << 10, **_AMD_LIMITS,
        source="AMD Instinct MI250X data sheet, halved (two dies, 220 compute units, 3.2 TB/s)",
    ),
    "gfx942": Device(
        "MI300X", 304, 2.1e9, 5.3e12, _AMD_PIPES,
        programs=16, shared_bytes=64 << 10, **_AMD_LIMITS,
        source="AMD Instinct MI300X data sheet",
    ),
    "gfx950": Device(
        "MI355X", 256, 2.4e9, 8e12, _AMD_PIPES,
        programs=16, shared_bytes=160 << 10, **_AMD_LIMITS,
        source="AMD Instinct MI355X data sheet",
    ),
}  # fmt: skip


# --- The operations, fused and as textbooks write them

BATCH, STEPS, GROUPS = 16, 1000, 32
IMAGES, ACTIVATIONS = (BATCH, 3, 64, 64), (BATCH, 128, 32, 32)
SEED, IDS, COEFFICIENTS = torch.tensor(0), torch.arange(BATCH), torch.zeros(10, Column.HISTORY + 1)


Workload = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments; what it returns is differentiated if it requires a gradient."""


@dataclass(frozen=True)
class Operation:
    """Something that the engine and textbooks both compute."""

    name: str
    shape: tuple[int, ...]
    compulsory: Callable[[int], int]
    """Bytes an element that must be read and written, of the size of the network's dtype."""
    fused: Callable[[torch.dtype, str], Workload]
    """The engine's operation on tensors of a dtype, on a device."""
    textbook: Callable[[torch.dtype, str], Workload]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)


def _per_image(table: Tensor, timesteps: Tensor) -> Tensor:
    return table[timesteps][:, None, None, None]


def _noising(
    images: Tensor, timesteps: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x_0 = images.float() / 127.5 - 1
    noise = torch.randn_like(x_0)
    x_t = _per_image(signal, timesteps) * x_0 + _per_image(sigma, timesteps) * noise
    return x_t.to(dtype), noise


def _loss(prediction: Tensor, target: Tensor) -> Tensor:
    # Autocast takes the mean squared error in float32, and its gradient back to the network's type.
    return F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3)).mean()


def _loss_x0(prediction: Tensor, images: Tensor) -> Tensor:
    return _loss(prediction, images.float() / 127.5 - 1)


def _loss_v(
    prediction: Tensor,
    images: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    sigma: Tensor,
) -> Tensor:
    x_0 = images.float() / 127.5 - 1
    return _loss(
        prediction, _per_image(signal, timesteps) * noise - _per_image(sigma, timesteps) * x_0
    )


def _ancestral(
    x: Tensor,
    output: Tensor,
    unconditional: Tensor | None = None,
    earlier: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Predict x_0, clip it, and draw from the posterior; the constants are any step's."""
    if unconditional is not None:
        output = unconditional + 4.0 * (output - unconditional)
    x_0 = ((x - 0.6 * output.float()) / 0.8).clamp(-1, 1)
    mean = 0.3 * x_0 + 0.7 * x
    if earlier is None:
        return mean + 0.2 * torch.randn_like(x)
    return mean + 0.1 * earlier + 0.2 * torch.randn_like(x), x_0


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Autocast normalises in float32; the convolution that follows takes its input's type back.
    return F.silu(F.group_norm(x.float(), GROUPS, weight, bias)).to(x.dtype)


def _q_sample(
    images: Tensor, timesteps: Tensor, signal: Tensor, sigma: Tensor, dtype: torch.dtype
) -> Tensor:
    return q_sample(images, timesteps, signal, sigma, SEED, timesteps, dtype=dtype)


def _denoising_loss(
    target: str,
    prediction: Tensor,
    images: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    sigma: Tensor,
) -> Tensor:
    return denoising_loss(
        prediction, images, timesteps, signal, sigma, SEED, timesteps, target=target
    ).mean()


def _reverse_step(
    x: Tensor, output: Tensor, unconditional: Tensor | None, earlier: Tensor | None
) -> Tensor:
    history = None if earlier is None else earlier[None]
    return reverse_step(
        x, output, COEFFICIENTS, SEED, SEED, IDS, unconditional, history=history, in_place=True
    )


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, GROUPS, weight, bias)


def _training(function: Callable[..., Any], *names: str) -> Callable[[torch.dtype, str], Workload]:
    def bind(dtype: torch.dtype, device: str) -> Workload:
        arguments = {
            "images": _zeros(IMAGES, torch.uint8, device),
            "prediction": _zeros(IMAGES, dtype, device).requires_grad_(),
            "noise": _zeros(IMAGES, torch.float32, device),
            "timesteps": torch.zeros(BATCH, dtype=torch.int64, device=device),
            "signal": torch.zeros(STEPS, device=device),
            "sigma": torch.zeros(STEPS, device=device),
            "dtype": dtype,
        }
        return function, tuple(arguments[name] for name in names)

    return bind


def _sampling(
    function: Callable[..., Any], guided: bool = False, history: bool = False
) -> Callable[[torch.dtype, str], Workload]:
    def bind(dtype: torch.dtype, device: str) -> Workload:
        x, earlier = (_zeros(IMAGES, torch.float32, device) for _ in range(2))
        output, other = (_zeros(IMAGES, dtype, device) for _ in range(2))
        return function, (x, output, other if guided else None, earlier if history else None)

    return bind


def _normalising(
    function: Callable[..., Any], gradient: bool
) -> Callable[[torch.dtype, str], Workload]:
    def bind(dtype: torch.dtype, device: str) -> Workload:
        x = _zeros(ACTIVATIONS, dtype, device)
        weight, bias = (torch.ones(ACTIVATIONS[1], device=device) for _ in range(2))
        return function, tuple(tensor.requires_grad_(gradient) for tensor in (x, weight, bias))

    return bind


_TABLES = ("timesteps", "signal", "sigma")
_BATCH = ("prediction", "images", *_TABLES)
OPERATIONS = (
    Operation(
        "q_sample", IMAGES, lambda size: 1 + size,
        _training(_q_sample, "images", *_TABLES, "dtype"),
        _training(_noising, "images", *_TABLES, "dtype"),
    ),
    Operation(
        "denoising_loss eps", IMAGES, lambda size: 2 * size,
        _training(partial(_denoising_loss, "eps"), *_BATCH),
        _training(_loss, "prediction", "noise"),
    ),
    Operation(
        "denoising_loss x0", IMAGES, lambda size: 1 + 2 * size,
        _training(partial(_denoising_loss, "x0"), *_BATCH),
        _training(_loss_x0, "prediction", "images"),
    ),
    Operation(
        "denoising_loss v", IMAGES, lambda size: 1 + 2 * size,
        _training(partial(_denoising_loss, "v"), *_BATCH),
        _training(_loss_v, "prediction", "images", "noise", *_TABLES),
    ),
    Operation(
        "reverse_step", IMAGES, lambda size: 8 + size,
        _sampling(_reverse_step),
        _sampling(_ancestral),
    ),
    Operation(
        "reverse_step guided", IMAGES, lambda size: 8 + 2 * size,
        _sampling(_reverse_step, guided=True),
        _sampling(_ancestral, guided=True),
    ),
    Operation(
        "reverse_step history", IMAGES, lambda size: 16 + size,
        _sampling(_reverse_step, history=True),
        _sampling(_ancestral, history=True),
    ),
    Operation(
        "group_norm_silu", ACTIVATIONS, lambda size: 2 * size,
        _normalising(_group_norm_silu, gradient=False),
        _normalising(_norm, gradient=False),
    ),
    Operation(
        "group_norm_silu + backward", ACTIVATIONS, lambda size: 5 * size,
        _normalising(_group_norm_silu, gradient=True),
        _normalising(_norm, gradient=True),
    ),
)  # fmt: skip


# --- Counting what torch does


@dataclass
class Traffic:
    """What a computation moves."""

    bytes: int = 0
    """Read and written, each tensor once an operation."""
    kernels: int = 0
    allocations: int = 0
    allocated_bytes: int = 0


def _distinct_bytes(tensor: Tensor) -> int:
    """Of a tensor's elements; those that an expanded dimension repeats count once."""
    sizes = (
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0
    )
    return math.prod(sizes) * tensor.element_size()


class EagerCounter(TorchDispatchMode):
    """Counts each operation that is not a view as one kernel, which is the least it can be.

    It reads its tensors once and writes its results once. Operations of the engine count only
    their results' memory: what their kernels move is read from the kernels.
    """

    _FILLS = ("copy_", "fill_", "zero_", "normal_", "uniform_")

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if not func.is_view:
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            self._allocate(inputs, outputs)
            if func.namespace != "ddpm" and "empty" not in name:
                only_written = tree_leaves(kwargs.get("out"))
                only_written += [args[0]] if name in self._FILLS else []
                read = [t for t in inputs if not any(t is other for other in only_written)]
                read = [] if name.endswith("_like") else read
                self.traffic.bytes += sum(map(_distinct_bytes, read + outputs))
                self.traffic.kernels += 1
        return result

    def _allocate(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in known:
                self.traffic.allocations += 1
                self.traffic.allocated_bytes += tensor.untyped_storage().nbytes()


def eager_traffic(workload: Workload) -> Traffic:
    """Count a computation, and its backward pass if it has one."""
    function, arguments = workload
    counter = EagerCounter()
    with counter:
        result = function(*arguments)
    if isinstance(result, Tensor) and result.requires_grad:
        gradient = torch.ones_like(result)
        with counter:
            result.backward(gradient)
    return counter.traffic


def compiled_traffic(workload: Workload) -> Traffic:
    """Count what torch.compile makes of a computation on a CPU, by inductor's own schedule."""
    from torch._functorch import config as aot_config
    from torch._inductor import config, metrics
    from torch._inductor.graph import GraphLowering

    traffic = Traffic()
    original = GraphLowering.codegen

    def codegen(graph: GraphLowering) -> Any:
        result = original(graph)
        traffic.bytes += sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes)
        buffers = re.findall(
            r"= empty_strided_cpu\(\(([\d, ]*)\), .*?, torch\.(\w+)\)", result[0].value
        )
        traffic.allocations += len(buffers)
        for shape, dtype in buffers:
            count = math.prod(int(size) for size in shape.split(",") if size.strip())
            traffic.allocated_bytes += count * getattr(torch, dtype).itemsize
        return result

    torch._dynamo.reset()
    metrics.reset()
    function, arguments = workload
    # What a cache holds is not scheduled again.
    uncached = config.patch(fx_graph_cache=False), aot_config.patch(enable_autograd_cache=False)
    with patch.object(GraphLowering, "codegen", codegen), uncached[0], uncached[1]:
        result = torch.compile(function, fullgraph=True)(*arguments)
        if isinstance(result, Tensor) and result.requires_grad:
            result.backward(torch.ones_like(result))
    traffic.kernels = metrics.generated_kernel_count
    return traffic


# --- Counting what the fused kernels do


SMALL = ("loss_kernel", "combine_kernel")
"""Kernels that read a few numbers a sample: of these the bytes stand apart, and registers, shared
memory and occupancy are not told."""


def loop_trips(launch: Launch) -> int:
    """How often the loop of a kernel runs in a program, from what it is launched with."""
    values: dict[str, int] = dict(launch.constants) | dict(launch.integers)
    if "SUM_TILE" in values:
        return -(-values["tiles"] // values["SUM_TILE"])
    if launch.name == "combine_kernel":
        return -(-values["slabs"] // min(values["SLABS"], 8))
    if "ROWS" in values:
        tiles = -(-values["slab_pixels"] // values["ROWS"])
        # The first tile, which the others are summed relative to, is taken before the loop.
        return tiles - 1 if launch.name == "moments_kernel" else tiles
    return 1


def fused_launches(
    operation: Operation, dtype: torch.dtype, target: str
) -> tuple[list[Launch], Traffic]:
    """The kernels of an operation on a target, and what torch does around them."""
    with recorded_launches(target) as launches:
        traffic = eager_traffic(operation.fused(dtype, "cpu"))
    return launches, traffic


@dataclass
class Row:
    """An operation's kernels on a target; all but the last five are counts. Per element."""

    operation: str
    dtype: str
    target: str
    kernels: list[str]
    compulsory_bytes: int
    bytes: float
    """Of images and activations, loaded and stored."""
    other_bytes: float
    """Of seeds, tables, weights, partial sums: at most, as masked lanes are counted too."""
    instructions: float
    by_kind: dict[str, float]
    registers: int
    """A thread, in the kernel that uses most."""
    shared_bytes: int
    """A program, likewise."""
    occupancy: float
    """Of resident warps, in the kernel that has fewest."""
    issue_ps: float
    """Picoseconds an element, modelled."""
    memory_ps: float
    bound: str
    """Memory, or the busiest pipe."""


def fused_row(operation: Operation, dtype: str, target: str) -> tuple[Row, Traffic]:
    """Compile an operation's kernels and count; also what torch does around them."""
    device, elements = DEVICES[target], math.prod(operation.shape)
    launches, around = fused_launches(operation, getattr(torch, dtype), target)
    lanes = dict.fromkeys(KINDS, 0.0)
    moved, other, seconds, codes = 0.0, 0.0, 0.0, []
    for launch in launches:
        code = compile_launch(launch, target)
        path = code.path(loop_trips(launch))
        tiles, beside = code.tile_bytes(path), code.other_bytes()
        if launch.name in SMALL:
            tiles, beside = 0, beside + tiles
        moved += tiles * launch.programs / elements
        other += beside * launch.programs / elements
        scale = code.threads * launch.programs / elements
        kinds = {kind: count * scale for kind, count in count_kinds(path).items()}
        lanes = {kind: lanes[kind] + kinds[kind] for kind in KINDS}
        seconds += device.issue(kinds)[0]
        codes += [code] if launch.name not in SMALL else []
    memory = moved / device.bandwidth
    row = Row(
        operation=operation.name,
        dtype=dtype,
        target=target,
        kernels=[launch.name for launch in launches],
        compulsory_bytes=operation.compulsory(getattr(torch, dtype).itemsize),
        bytes=moved,
        other_bytes=other,
        instructions=sum(lanes.values()),
        by_kind=lanes,
        registers=max(code.registers for code in codes),
        shared_bytes=max(code.shared_bytes for code in codes),
        occupancy=min(device.occupancy(code, TARGETS[target][2]) for code in codes),
        issue_ps=seconds * 1e12,
        memory_ps=memory * 1e12,
        bound=device.issue(lanes)[1] if seconds > memory else "memory",
    )
    return row, around


# --- Results

GOALS = {"q_sample": (3.0, 45), "denoising_loss eps": (4.0, 50), "reverse_step": (10.0, 55)}
"""On sm_90 in bfloat16: bytes, rounded to a tenth, and instructions an element."""
LEAST_RATIO = 10
"""Times fewer bytes than eager."""
TOGETHER = ("q_sample", "denoising_loss eps", "reverse_step")
"""A training step's noising, loss and gradient, and a sampler's step."""


def print_rows(rows: list[Row]) -> None:
    """One table a target and dtype."""
    for target, dtype in dict.fromkeys((row.target, row.dtype) for row in rows):
        device = DEVICES[target]
        print(f"\n{target} ({device.name}), {dtype}; an element:")
        kinds = " ".join(f"{kind[:5]:>5}" for kind in KINDS)
        print(
            f"{'':27}least  bytes other  instr | {kinds} | regs shared occup | "
            "issue ps memory ps bound"
        )
        for row in rows:
            if (row.target, row.dtype) != (target, dtype):
                continue
            counts = " ".join(f"{count:5.1f}" for count in row.by_kind.values())
            print(
                f"{row.operation:27} {row.compulsory_bytes:4} {row.bytes:6.2f} "
                f"{row.other_bytes:5.2f} {row.instructions:6.1f} | {counts} | "
                f"{row.registers:4} {row.shared_bytes:6} {row.occupancy:5.0%} | "
                f"{row.issue_ps:8.3f} {row.memory_ps:9.3f} {row.bound}"
            )


def compare(operation: Operation, dtype: str, row: Row, around: Traffic) -> dict[str, Any]:
    """The bytes, kernels and allocations of the fused operation and the textbook's, an element."""
    kind = getattr(torch, dtype)
    elements = math.prod(operation.shape)
    fused = Traffic(
        round(row.bytes * elements) + around.bytes,
        len(row.kernels) + around.kernels,
        around.allocations,
        around.allocated_bytes,
    )
    ways = {
        "eager": eager_traffic(operation.textbook(kind, "meta")),
        "compile": compiled_traffic(operation.textbook(kind, "cpu")),
        "fused": fused,
    }
    return {
        "operation": operation.name,
        "dtype": dtype,
        "fused_kernels_bytes": row.bytes,
        **{
            way: {
                "bytes": traffic.bytes / elements,
                "kernels": traffic.kernels,
                "allocations": traffic.allocations,
                "allocated_bytes": traffic.allocated_bytes / elements,
            }
            for way, traffic in ways.items()
        },
    }


def print_comparisons(comparisons: list[dict[str, Any]]) -> None:
    """The textbook's traffic beside ours."""
    print("\nbytes an element / kernels / allocations, bytes of them an element")
    for found in comparisons:
        cells = [
            f"{way} {found[way]['bytes']:6.1f} / {found[way]['kernels']:2} / "
            f"{found[way]['allocations']:2}, {found[way]['allocated_bytes']:5.1f}"
            for way in ("eager", "compile", "fused")
        ]
        print(
            f"{found['operation']:27}{found['dtype']:9} {'   '.join(cells)}   "
            f"(its kernels {found['fused_kernels_bytes']:.2f})"
        )


def check_goals(rows: list[Row]) -> list[dict[str, Any]]:
    """What the goals ask, and what was found."""
    goals = []
    for row in rows:
        if row.target == "sm_90" and row.dtype == "bfloat16" and row.operation in GOALS:
            moved, instructions = GOALS[row.operation]
            for what, found, most in (
                ("bytes", round(row.bytes, 1), moved),
                ("instructions", round(row.instructions, 1), instructions),
            ):
                goals.append(
                    {"goal": f"{row.operation} {what}", "at_most": most, "found": found,
                     "met": found <= most}
                )  # fmt: skip
    return goals


def together(comparisons: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes an element of training's noising, loss and gradient and one step of sampling."""
    found = [one for one in comparisons if one["operation"] in TOGETHER]
    found = [one for one in found if one["dtype"] == found[0]["dtype"]]
    eager = sum(one["eager"]["bytes"] for one in found)
    kernels = sum(one["fused_kernels_bytes"] for one in found)
    whole = sum(one["fused"]["bytes"] for one in found)
    return {
        "eager_bytes": eager,
        "compile_bytes": sum(one["compile"]["bytes"] for one in found),
        "fused_kernels_bytes": kernels,
        "fused_bytes": whole,
        "kernels_ratio": eager / kernels,
        "ratio": eager / whole,
    }


def draw(path: Path, rows: list[Row], comparisons: list[dict[str, Any]]) -> None:
    """Bytes of each way of computing, and the modelled times of one target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtype = comparisons[0]["dtype"]
    target = "sm_90" if any(row.target == "sm_90" for row in rows) else rows[0].target
    comparisons = [one for one in comparisons if one["dtype"] == dtype]
    rows = [row for row in rows if (row.target, row.dtype) == (target, dtype)]
    names = [row.operation for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), sharey=True)
    # Okabe and Ito's colours, which the colour-blind can tell apart.
    bytes_of = {
        ("eager torch", "#999999"): [one["eager"]["bytes"] for one in comparisons],
        ("torch.compile", "#56B4E9"): [one["compile"]["bytes"] for one in comparisons],
        ("engine", "#D55E00"): [one["fused"]["bytes"] for one in comparisons],
        ("engine, its kernels alone", "#E69F00"): [row.bytes for row in rows],
    }
    times = {
        ("issue", "#0072B2"): [row.issue_ps for row in rows],
        ("memory", "#E69F00"): [row.memory_ps for row in rows],
    }
    _bars(left, names, bytes_of, "bytes an element, counted", "{:.0f}")
    _bars(right, names, times, f"ps an element on {DEVICES[target].name}, modelled", "{:.1f}")
    left.invert_yaxis()
    figure.suptitle(f"Fused kernels and the same work in torch, {dtype}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(
    axes: Any, names: list[str], series: dict[tuple[str, str], list[float]], label: str, form: str
) -> None:
    height = 0.8 / len(series)
    for index, ((name, colour), values) in enumerate(series.items()):
        places = [row + (index - (len(series) - 1) / 2) * height for row in range(len(names))]
        bars = axes.barh(places, values, height, label=name, color=colour)
        axes.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")


@exit_on_user_error()
def main() -> None:
    """Count, print, and write the results."""
    options = parse_options(Options)
    targets, dtypes = options.targets.split(","), options.dtypes.split(",")
    unknown = [target for target in targets if target not in DEVICES]
    if unknown:
        raise UserError(f"--targets has {unknown[0]!r}; there are {', '.join(DEVICES)}")
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise UserError(f"--dtypes has {unknown[0]!r}; there are {', '.join(DTYPES)}")
    rows: list[Row] = []
    comparisons: list[dict[str, Any]] = []
    for dtype in dtypes:
        for operation in OPERATIONS:
            found = [fused_row(operation, dtype, target) for target in targets]
            rows += [row for row, _ in found]
            comparisons.append(compare(operation, dtype, *found[0]))
    goals, total = check_goals(rows), together(comparisons)

    print(MODEL)
    print_rows(rows)
    print_comparisons(comparisons)
    print()
    for goal in goals:
        verdict = "met" if goal["met"] else "missed"
        print(f"{verdict:6} {goal['goal']}: {goal['found']}, at most {goal['at_most']}")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {
        "model": MODEL,
        "devices": {target: asdict(DEVICES[target]) for target in targets},
        "rows": [asdict(row) for row in rows],
        "comparisons": comparisons,
        "goals": goals,
        "together": total,
    }
    (options.out / "kernel_roofline.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(options.out / "kernel_roofline.png", rows, comparisons)
    verdict = "met" if total["ratio"] >= LEAST_RATIO else "missed"
    print(
        f"noising, loss, gradient and a sampler's step: eager {total['eager_bytes']:.0f} bytes an "
        f"element, fused {total['fused_kernels_bytes']:.1f} in kernels "
        f"({total['kernels_ratio']:.1f} times fewer), {total['fused_bytes']:.1f} with what torch "
        f"does around them ({total['ratio']:.1f} times; at least {LEAST_RATIO}: {verdict})"
    )


if __name__ == "__main__":
    main()
