"""Averaging the weights of several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ddpm_engine.config import from_dict
from ddpm_engine.errors import UserError
from ddpm_engine.training.checkpoint import Checkpoint, CheckpointStore, load_part
from ddpm_engine.unet import UNet


def average_checkpoints(
    checkpoints: Sequence[Checkpoint],
    out: Path,
    shares: Sequence[float] | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> Path:
    """Write the mean of the weights of several checkpoints of one architecture.

    The sum is taken in float64 and stored as the weights were. Buffers are those of the newest.

    Args:
        checkpoints: verified ones.
        out: folder to make; a network is loaded from it as from a run. The mean is its `ema`.
        shares: of each checkpoint, any positive scale; None: equal.
        weights: whether to average the averaged weights, or those of the steps themselves.

    Returns:
        The checkpoint written.

    Raises:
        UserError: other architectures, shares that do not fit, or `out` is there or cannot be made.
    """
    shares = [1.0] * len(checkpoints) if shares is None else list(shares)
    if not checkpoints or len(shares) != len(checkpoints) or not all(0 < s < 1e9 for s in shares):
        raise UserError(
            f"{len(checkpoints)} checkpoints and the shares {shares}: give at least one checkpoint "
            "and a positive share for each"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; choose another folder for the average")
    parts = sorted(zip(checkpoints, shares, strict=True), key=lambda part: part[0].step)
    newest = parts[-1][0]
    config = from_dict(newest.state.get("config", {}), f"the configuration in {newest.path}")
    model = UNet(config.model)
    total = {
        name: torch.zeros_like(weight, dtype=torch.float64)
        for name, weight in model.named_parameters()
    }
    for checkpoint, share in parts:
        load_part(checkpoint.path, weights, model.state_dict())
        for name, weight in model.named_parameters():
            total[name] += weight.detach().double() * (share / sum(shares))
    mean = {name: total.get(name, tensor).to(tensor) for name, tensor in model.state_dict().items()}
    of = [[checkpoint.path.name, checkpoint.hash] for checkpoint in checkpoints]
    state = {"config": newest.state["config"], "average": {"of": of, "shares": shares}}
    store = CheckpointStore(out / "checkpoints")
    try:
        store.save(newest.step, {"ema": mean}, state)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return store.path(newest.step)
