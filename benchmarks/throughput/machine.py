"""The machine: facts without which a figure means nothing, and its peak."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.report import commit
from benchmarks.throughput.timing import timed


def processor() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def facts(device: torch.device) -> dict[str, Any]:
    """What a report begins with."""
    try:
        import diffusers

        peer = diffusers.__version__
    except ImportError:
        peer = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": peer,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def peak_works(device: torch.device) -> dict[str, Callable[[], float]]:
    """Two works that keep every multiplier busy; each call returns float operations a second.

    A large matrix product, and a convolution of the kind the paper's networks are made of:
    3×3, 256 to 256 channels, at 32×32 pixels.
    """
    side, batch, channels, pixels = 1536, 4, 256, 32
    a, b = torch.randn(2, side, side, device=device).unbind()
    images = torch.randn(batch, channels, pixels, pixels, device=device)
    images = images.to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device)
    kernel = kernel.to(memory_format=torch.channels_last)
    matmul_flops = 2 * side**3
    convolution_flops = 2 * batch * channels**2 * 9 * pixels**2

    def convolve() -> torch.Tensor:
        return torch.nn.functional.conv2d(images, kernel, padding=1)

    return {
        "matrix product": lambda: matmul_flops / timed(lambda: a @ b, device),
        "convolution": lambda: convolution_flops / timed(convolve, device),
    }
