"""What inductor makes of a plain residual block on a GPU: `python benchmarks/inductor_block.py`.

Nothing is run and no GPU is needed. A block of `F.group_norm`, SiLU, convolutions, embedding,
dropout and residual sum, in bfloat16 and channels-last, is traced with its gradient, and inductor
generates the code of both for an H100. Of each kernel the bytes are printed that it reads and
writes, as inductor itself counts them, for an element of the block's output; what convolutions
and matrix products move is left out, as `step_traffic.py` leaves it out.

torch without CUDA traces no CUDA tensors through autograd, so the graphs are traced for a CPU with
CUDA's decompositions, and their tensors are then declared to be a GPU's, laid out as cuDNN lays
them out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import view_to_reshape
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from ddpm_engine.cli.options import Positive, exit_on_error, parse_options

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    total_memory=80 * 2**30, gcnArchName="",
)  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@dataclass(frozen=True)
class Options:
    """Kernels that inductor generates for a residual block, and what they move."""

    batch: Positive = 128
    """Samples."""
    channels: Positive = 256
    """Channels of the block's output."""
    size: Positive = 16
    """Pixels a side."""
    source: Path | None = None
    """Folder for the generated code."""


class Block(nn.Module):
    """A residual block as a textbook writes it; of one map, or of two that are concatenated."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs), nn.GroupNorm(32, channels)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.projection = nn.Linear(512, channels)
        self.shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, embedding: Tensor, *maps: Tensor) -> tuple[Tensor]:
        """`[B, 512]`, and maps of `[B, C_i, H, W]` each, to `[B, C, H, W]`."""
        x = torch.cat(maps, 1) if len(maps) > 1 else maps[0]
        h = self.conv1(F.silu(self.norm1(x))) + self.projection(embedding)[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), 0.1))
        return (self.shortcut(x) + h,)


def graphs_of(block: Any, mode: FakeTensorMode, *inputs: Tensor) -> dict[str, Any]:
    """Trace a block: graph and inputs of "forward" and "backward", as inductor is given them."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., Any]:
        return lambda graph, given: found.update({name: (graph, given)}) or graph

    def partition(graph: Any, given: Any, **options: Any) -> Any:
        graph = joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, given, compiler="inductor", **options)

    for module in block.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(FakeTensor(mode, weight.detach(), CPU))
    fakes = tuple(FakeTensor(mode, each, CPU).requires_grad_() for each in inputs)
    with (
        mode, V.set_fake_mode(mode), patch("torch._inductor.decomposition.is_gpu", lambda _: True),
        # cuDNN answers in the layout it is given
        patch("torch._C._conv_determine_backend_memory_format", lambda *_: torch.channels_last),
    ):  # fmt: skip
        compiled = aot_module_simplified(
            block, fakes, keep("forward"), keep("backward"), partition_fn=partition,
            decompositions=select_decomp_table(),
        )  # fmt: skip
        if "backward" not in found:
            compiled(*fakes)[0].sum().backward()
    return found


@contextmanager
def an_h100(mode: FakeTensorMode) -> Iterator[None]:
    """Let inductor believe that there is an H100."""

    def properties(*_: Any) -> Any:
        return H100

    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": properties, "current_device": lambda: 0, "device_count": lambda: 1
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
            stack.enter_context(patch.object(CudaInterface, name, staticmethod(answer)))
        elsewhere: dict[str, Callable[..., Any]] = {
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch._inductor.scheduler.has_triton": lambda *_: True,
            "torch.utils._triton.triton_hash_with_backend": lambda: "",
            "torch._C._conv_determine_backend_memory_format": lambda *_: torch.channels_last,
        }
        for name, answer in elsewhere.items():
            stack.enter_context(patch(name, answer))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        stack.enter_context(V.set_fake_mode(mode))
        yield


def generate(graph: Any, given: Any, mode: FakeTensorMode) -> tuple[list[tuple[str, int]], str]:
    """Return each kernel's name and bytes, and the code of all."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
            return FakeTensor(mode, value, CUDA)
        return CUDA if isinstance(value, torch.device) else value

    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map(moved, node.args), tree_map(moved, dict(node.kwargs))
        node.meta = {**node.meta, "val": tree_map(moved, node.meta.get("val"))}
    given = [moved(each) for each in given]
    with an_h100(mode):
        view_to_reshape(graph)
        post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, example_inputs=given)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]):
            lowered.run(*given)
            source: str = lowered.codegen()[0].value
            own = [node for node in lowered.scheduler.nodes if not node.is_extern()]
            sizes = [node.get_read_write_buffers_sizes() for node in own]
    names = re.findall(r"^\s+triton_(\w+)\.run\(", source, re.M)
    return list(zip(names, sizes, strict=True)), source


def main() -> None:
    """Generate and print."""
    with exit_on_error(Options):
        options = parse_options(Options)
        shape = options.batch, options.channels, options.size, options.size
        elements = options.batch * options.channels * options.size**2
        print(f"torch {torch.__version__}; output {list(shape)}; bytes an element of it")
        for maps in (1, 2):
            mode = FakeTensorMode()
            with torch.device("meta"):
                block = Block(maps * options.channels, options.channels).to(torch.bfloat16)
                block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
                embedding = torch.empty(options.batch, 512, dtype=torch.bfloat16)
            found = graphs_of(block, mode, embedding, *(x.clone() for _ in range(maps)))
            for name, (graph, given) in found.items():
                kernels, source = generate(graph, given, mode)
                print(f"\n{name} of {maps} map{'s'[: maps - 1]}")
                for kernel, size in (*kernels, ("all", sum(size for _, size in kernels))):
                    print(f"{size / elements:7.2f}  {kernel}")
                if options.source is not None:
                    options.source.mkdir(parents=True, exist_ok=True)
                    (options.source / f"{name}-{maps}.py").write_text(source)


if __name__ == "__main__":
    main()
