"""Average weights after training: of several checkpoints, or of the averages in snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_engine.checkpoints.parts import check_finite, load_part
from ddpm_engine.checkpoints.power_ema import Profile, combine, gamma_from_sigma_rel, part_of
from ddpm_engine.checkpoints.store import Checkpoint, CheckpointStore
from ddpm_engine.errors import UserError
from ddpm_engine.hidden_files import is_hidden
from ddpm_engine.networks.build import build_network

_EMBEDDERS = ("text_encoder", "image_embeddings")
"""Entries of a state that say what the network's conditions were embedded by."""


def average_checkpoints(
    checkpoints: Sequence[Checkpoint],
    out: Path,
    shares: Sequence[float] | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> Path:
    """Write the mean of the weights of several checkpoints of one architecture.

    The sum is taken in float64 and stored in the dtype of the weights. Buffers are those of the
    newest checkpoint.

    Args:
        checkpoints: verified checkpoints.
        out: folder to make; it loads like a run, with the mean as its `ema`.
        shares: weight of each checkpoint, at any positive scale; None: equal.
        weights: part to average: `ema`, or `model` for the weights without averaging.

    Returns:
        Path of the checkpoint written.

    Raises:
        UserError: the architectures differ, shares do not fit, or `out` exists or cannot be made.
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
    """Checkpoint written."""
    step: int
    """Optimizer step at which the average ends."""
    averages: int
    """Number of averages that it was made of."""
    relative_error: float
    """L2 norm of the difference between its profile and the wanted one, relative to the latter."""


def reconstruct_average(
    snapshots: Sequence[Checkpoint], sigma_rel: float, out: Path, step: int | None = None
) -> Reconstruction:
    """Write the power-function average of any relative width, made of a run's snapshots.

    The sum is taken in float64 and stored in float32 (EDM2, section 3.2; see `combine`).

    Args:
        snapshots: verified snapshots of one run.
        sigma_rel: standard deviation of the profile as a share of the training so far, in
            (0, 12^-½].
        out: folder to make; it loads like a run, with the average as its `ema`.
        step: step at which the average ends, one with a snapshot; None: the newest.

    Raises:
        UserError: no snapshot of that step, a width out of range, or `out` exists or cannot be
            made.
    """
    steps = sorted(snapshot.step for snapshot in snapshots)
    step = steps[-1] if step is None and steps else step
    if step is None or step not in steps:
        raise UserError(
            f"there is no snapshot of step {step}; those that can be used are of "
            f"{', '.join(map(str, steps)) or 'no step at all'}"
        )
    wanted = Profile(gamma_from_sigma_rel(sigma_rel), step)
    _check_free(out)
    # Later snapshots include weights that this average must not.
    known = [
        (snapshot, kept) for snapshot in snapshots if snapshot.step <= step
        for kept in snapshot.config.training.ema_sigma_rel
    ]  # fmt: skip
    combination = combine(
        [Profile(gamma_from_sigma_rel(kept), snapshot.step) for snapshot, kept in known], wanted
    )
    mean = _weighted_sum(
        [
            (snapshot, part_of(kept), weight)
            for (snapshot, kept), weight in zip(known, combination.weights, strict=True)
        ]
    )
    newest = next(snapshot for snapshot in snapshots if snapshot.step == step)
    facts = {
        "length": sigma_rel,
        "misfit": combination.relative_error,
        "of": [
            [snapshot.path.name, snapshot.hash, kept, weight]
            for (snapshot, kept), weight in zip(known, combination.weights, strict=True)
        ],
    }
    path = _write(out, newest, mean, facts)
    return Reconstruction(path, step, len(known), combination.relative_error)


def _check_free(out: Path) -> None:
    """Refuse a folder that holds anything but what is left of an interrupted average."""
    store = CheckpointStore(out / "checkpoints")
    rest = {store.directory, *store.leftovers()}
    present = {*out.iterdir(), *store.directory.glob("*")} if out.is_dir() else set()
    foreign = [path for path in present - rest if not is_hidden(path.name)]
    if out.exists() and (not out.is_dir() or foreign):
        raise UserError(f"{out} exists; choose another folder for the average")


def _weighted_sum(parts: Sequence[tuple[Checkpoint, str, float]]) -> dict[str, Tensor]:
    """Sum weight · part of each checkpoint in float64; buffers are those of the last."""
    model = build_network(parts[-1][0].config.model)
    total = {
        name: torch.zeros_like(weight, dtype=torch.float64)
        for name, weight in model.named_parameters()
    }
    for checkpoint, part, share in parts:
        load_part(checkpoint.path, part, model.state_dict())
        check_finite(str(checkpoint.path / part), model.state_dict())
        for name, weight in model.named_parameters():
            total[name] += weight.detach().double() * share
    return {name: total.get(name, tensor).to(tensor) for name, tensor in model.state_dict().items()}


def _write(out: Path, newest: Checkpoint, mean: dict[str, Tensor], facts: dict[str, Any]) -> Path:
    """Write a run directory with one checkpoint, whose `ema` is the mean."""
    store = CheckpointStore(out / "checkpoints")
    state = {
        "config": newest.state["config"],
        "classes": newest.state.get("classes"),
        "average": facts,
        **{name: newest.state[name] for name in _EMBEDDERS if name in newest.state},
    }
    try:
        store.save(newest.step, {"ema": mean}, state)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return store.path(newest.step)
