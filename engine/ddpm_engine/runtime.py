"""What this process runs on: device, threads, precision, rounding and the compilers' caches."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ddpm_engine.cache_directories import node_cache
from ddpm_engine.errors import UserError
from ddpm_engine.threads import share_of_cores

Precision = Literal["auto", "no", "bf16", "fp16"]
"""Precision of a network's arithmetic; see `choose_precision` for auto."""


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision that is meant on a device; for `auto`, bf16 or no.

    It is bf16 on GPUs with matrix units for it: NVIDIA's of compute capability 8.0 or more (Ampere)
    and AMD's from MI200 on. Anything else, CPUs with bfloat16 instructions too, computes in
    float32, so that what a CPU computes depends on no extension that it happens to have.
    """
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "no"


def has_precision(precision: Precision, device: torch.device) -> bool:
    """Whether a device computes in a precision without emulating it slowly."""
    if precision == "bf16":
        return has_fast_bf16(device)
    return precision != "fp16" or device.type != "cpu"


@dataclass(frozen=True)
class Numerics:
    """How torch rounds on GPUs, and whether it does so alike each time.

    The defaults are for sampling and evaluation: float32 means IEEE's, where torch's own default is
    TF32 in convolutions, and what is chosen does not depend on timing.
    """

    tf32: bool = False
    """TF32 in float32 products of matrices and in convolutions."""
    cudnn_benchmark: bool = False
    """Choice of convolution algorithms by timing them."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, whatever `cudnn_benchmark` says."""

    def apply(self) -> None:
        """Set torch up like this, for the whole process, before it has used a GPU.

        What is deterministic raises a RuntimeError where an operation has no such algorithm.
        """
        # Not the newer `fp32_precision`, which some of torch's own modules do not look at.
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        # The fastest algorithm may differ from start to start, and so would the bits.
        torch.backends.cudnn.benchmark = self.cudnn_benchmark and not self.deterministic
        torch.backends.cudnn.deterministic = self.deterministic
        if torch.are_deterministic_algorithms_enabled() != self.deterministic:
            torch.use_deterministic_algorithms(self.deterministic)  # loads the compiler, too
        # It would fill whatever is allocated, to show what is read before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.deterministic:
            # cuBLAS is deterministic with a workspace of a known size for each stream only.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # Nor may the compiler choose between kernels by timing them.
            os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")

    @classmethod
    def in_force(cls) -> Numerics:
        """Read how torch is set up."""
        return cls(
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
        )

    def __str__(self) -> str:
        choice = "deterministic algorithms"
        if not self.deterministic:
            choice = f"cuDNN's benchmark {'on' if self.cudnn_benchmark else 'off'}"
        return f"TF32 {'on' if self.tf32 else 'off'}, {choice}"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products of NVIDIA GPUs in float32, not in TF32.

    For what must not depend on `Numerics`, such as the features that a Fréchet distance is made of:
    TF32 keeps ten bits of each factor. Afterwards everything is as it was.
    """
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def check_precision(precision: str, name: str, remedy: str = "") -> None:
    """Refuse half precisions that this processor does not have or runs a hundred times slower.

    Args:
        precision: no, bf16 or fp16.
        name: name of the field that it was chosen by, in backticks.
        remedy: what else can be done about slow bf16.

    Raises:
        UserError: fp16, or bf16 on a processor without instructions for it.
    """
    if precision == "fp16":
        raise UserError(
            f"{name} is fp16, which needs a GPU; on this CPU use no"
            + (" or bf16" if has_fast_bf16() else "")
        )
    if precision == "bf16" and not has_fast_bf16():
        raise UserError(
            f"{name} is bf16, but this CPU has no bfloat16 instructions (AVX512 BF16 or AMX): "
            f"convolutions would be a hundred times slower. Use no{remedy}"
        )


def use_all_cores() -> None:
    """Undo `accelerate launch`'s default of one thread, sharing the cores among local ranks."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(share_of_cores())


def has_fast_bf16(device: torch.device = torch.device("cpu")) -> bool:  # noqa: B008
    """Whether a device has bfloat16 instructions: a GPU, for products of matrices."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type != "cuda":
        return False
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # gfx90a is MI200, gfx942 MI300; RDNA's have four digits, as gfx1100.
    family = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "gfx90a" <= family <= "gfx9ff" and len(family) == len("gfx90a")


def local_device() -> torch.device:
    """This process's GPU, as its launcher numbers them, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        use_all_cores()
        return torch.device("cpu")
    device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device)
    if device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        use_nearest_cores(device)
    return device


_PCI = Path("/sys/bus/pci/devices")


def use_nearest_cores(device: torch.device) -> None:
    """Keep this process on the cores that its GPU is attached to, as far as it may use them.

    Its batches are copied from memory, and its work handed out by threads, that are then on the
    GPU's side of the machine; threads and data workers that it starts inherit that. Nothing changes
    where the system does not say which cores these are, or has given the process none of them.
    """
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's types leave some out
    with suppress(AttributeError, OSError, ValueError):  # nor has every torch, or system, them all
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        listed = (_PCI / address / "local_cpulist").read_text().strip()
        near = set()
        for part in filter(None, listed.split(",")):  # such as 0-15,32-47
            first, _, last = part.partition("-")
            near |= set(range(int(first), int(last or first) + 1))
        if mine := near & os.sched_getaffinity(0):
            os.sched_setaffinity(0, mine)


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU; None for any other device."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


logger = logging.getLogger(__name__)

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Environment variables of the compilers, and the folders they get."""


def use_local_compile_cache() -> None:
    """Point Triton and inductor at a folder of this user under the temporary directory.

    Triton's own default is the home directory, which on a cluster is a network file system that
    every rank of every node would write to. Variables that are set stay as they are. Compiled code
    is executed when it is found, so a folder that others may write to is not used.
    """
    if not hasattr(os, "getuid"):  # a system without Triton
        return
    try:
        folders = {variable: str(node_cache(name)) for variable, name in CACHES.items()}
    except OSError as error:
        logger.warning(
            "%s: compiled code is kept where the compilers keep it by default. Rename the "
            "folder, or set %s",
            error,
            " and ".join(CACHES),
        )
        return
    for variable, folder in folders.items():
        os.environ.setdefault(variable, folder)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the network's arithmetic; any other precision means that of the weights."""


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute in a precision within the block."""
    if precision in DTYPES:
        return torch.autocast(device.type, DTYPES[precision])
    return nullcontext()


def autocast_forward(model: nn.Module, precision: str, device: torch.device) -> None:
    """Let every call of a model compute in a precision, whatever surrounds the call."""
    if precision in DTYPES:
        model.forward = torch.autocast(device.type, DTYPES[precision])(model.forward)
