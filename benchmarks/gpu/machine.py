"""The facts without which a figure means nothing."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from ddpm_kernels.triton_shim import HAS_TRITON, triton

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")
"""What `nvidia-smi` is asked for."""


def output_of(*command: str) -> str | None:
    """Return what a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def asked(*fields: str) -> dict[str, str]:
    """Return fields of the first card as `nvidia-smi` has them; nothing where there is none."""
    found = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    if not found:
        return {}
    values = (value.strip() for value in found.splitlines()[0].split(","))
    return dict(zip(fields, values, strict=False))


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""
    bundled = ROOT / "COMMIT"
    if bundled.is_file():
        return bundled.read_text().strip()
    head = output_of("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+changes" if output_of("git", "status", "--porcelain") else head


def machine_of(device: torch.device, command: str) -> dict[str, str]:
    """Collect the facts; on a GPU, in a process that may use it.

    Raises:
        RuntimeError: the GPU cannot be used.
    """
    facts = {"device": "CPU"}
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees none here")
        torch.ones(1, device=device).add_(1).item()
        properties = torch.cuda.get_device_properties(device)
        asked_for = asked("driver_version", *CLOCKS)
        facts = {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "L2 cache": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
            "driver": asked_for.pop("driver_version", "unknown"),
            **{f"{name}, at the start": value for name, value in asked_for.items()},
            "CUDA": torch.version.cuda or "none",
            "ROCm": torch.version.hip or "none",
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return {
        **facts,
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
