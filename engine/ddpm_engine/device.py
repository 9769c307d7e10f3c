"""Which device is this process's own."""

from __future__ import annotations

import os

import torch

from ddpm_engine.cpu import use_all_cores


def local_device() -> torch.device:
    """This process's GPU, as its launcher numbers them, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        use_all_cores()
        return torch.device("cpu")
    device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
    torch.accelerator.set_device_index(device)
    return device
