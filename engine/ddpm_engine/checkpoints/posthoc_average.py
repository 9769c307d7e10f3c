"""Averaging the weights of several checkpoints, or the averages of several snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_engine.checkpoints.power_ema import Profile, combine, gamma_of, part_of
from ddpm_engine.checkpoints.store import Checkpoint, CheckpointStore, load_part
from ddpm_engine.config import RunConfig, from_dict
from ddpm_engine.errors import UserError
from ddpm_engine.networks.unet.unet import UNet


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
    _check_free(out)
    parts = sorted(zip(checkpoints, shares, strict=True), key=lambda part: part[0].step)
    newest = parts[-1][0]
    mean = _weighted_sum([(one, weights, share / sum(shares)) for one, share in parts])
    of = [[checkpoint.path.name, checkpoint.hash] for checkpoint in checkpoints]
    return _write(out, newest, mean, {"of": of, "shares": shares})


@dataclass(frozen=True)
class Reconstruction:
    """An average that was made of snapshots."""

    path: Path
    """The checkpoint written."""
    step: int
    """Of which optimizer step it is the average."""
    averages: int
    """How many averages it was made of."""
    misfit: float
    """How far its profile is from the one asked for: the L2 norm of the difference, as a share of
    that of the profile."""


def reconstruct_average(
    snapshots: Sequence[Checkpoint], length: float, out: Path, step: int | None = None
) -> Reconstruction:
    """Write the power-function average of any length, made of those that a run kept snapshots of.

    The sum is taken in float64 and stored in float32 (EDM2, section 3.2; see `combine`).

    Args:
        snapshots: verified ones of one run.
        length: σ_rel, the deviation of the profile as a share of the training so far.
        out: folder to make; a network is loaded from it as from a run. The average is its `ema`.
        step: at the end of which step, one that there is a snapshot of; None: the newest.

    Raises:
        UserError: no snapshot of that step, a length that no average has, or `out` is there or
            cannot be made.
    """
    steps = sorted(snapshot.step for snapshot in snapshots)
    step = steps[-1] if step is None and steps else step
    if step is None or step not in steps:
        raise UserError(
            f"there is no snapshot of step {step}; those that can be used are of "
            f"{', '.join(map(str, steps)) or 'no step at all'}"
        )
    wanted = Profile(gamma_of(length), step)
    _check_free(out)
    # Later ones know of weights that this average must not.
    known = [
        (snapshot, kept) for snapshot in snapshots if snapshot.step <= step
        for kept in _config_of(snapshot).training.ema_sigma_rel
    ]  # fmt: skip
    combination = combine(
        [Profile(gamma_of(kept), snapshot.step) for snapshot, kept in known], wanted
    )
    mean = _weighted_sum(
        [
            (snapshot, part_of(kept), weight)
            for (snapshot, kept), weight in zip(known, combination.weights, strict=True)
        ]
    )
    newest = next(snapshot for snapshot in snapshots if snapshot.step == step)
    facts = {
        "length": length,
        "misfit": combination.misfit,
        "of": [
            [snapshot.path.name, snapshot.hash, kept, weight]
            for (snapshot, kept), weight in zip(known, combination.weights, strict=True)
        ],
    }
    path = _write(out, newest, mean, facts)
    return Reconstruction(path, step, len(known), combination.misfit)


def _check_free(out: Path) -> None:
    """Nothing may be there, but what is left of an average that was interrupted."""
    store = CheckpointStore(out / "checkpoints")
    rest = {store.directory, *store.leftovers()}
    if out.exists() and (not out.is_dir() or {*out.iterdir(), *store.directory.glob("*")} - rest):
        raise UserError(f"{out} exists; choose another folder for the average")


def _config_of(checkpoint: Checkpoint) -> RunConfig:
    return from_dict(checkpoint.state.get("config", {}), f"the configuration in {checkpoint.path}")


def _weighted_sum(parts: Sequence[tuple[Checkpoint, str, float]]) -> dict[str, Tensor]:
    """Σ weight · part of a checkpoint, in float64, as float32 weights; buffers of the last."""
    model = UNet(_config_of(parts[-1][0]).model)
    total = {
        name: torch.zeros_like(weight, dtype=torch.float64)
        for name, weight in model.named_parameters()
    }
    for checkpoint, part, share in parts:
        load_part(checkpoint.path, part, model.state_dict())
        for name, weight in model.named_parameters():
            total[name] += weight.detach().double() * share
    return {name: total.get(name, tensor).to(tensor) for name, tensor in model.state_dict().items()}


def _write(out: Path, newest: Checkpoint, mean: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """A run directory with one checkpoint, whose `ema` is the mean."""
    store = CheckpointStore(out / "checkpoints")
    state = {"config": newest.state["config"], "average": facts}
    try:
        store.save(newest.step, {"ema": mean}, state)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return store.path(newest.step)
