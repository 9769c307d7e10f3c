"""Memory of a training step on a GPU: `python benchmarks/step_memory.py [--preset NAME]`.

Every row but the last is a model, traced on meta tensors (`ddpm_engine.training.step_memory`), not
a measurement: what torch's allocator would hand out at the peak. A row for each precision, and for
what makes a preset fit a card if it does not. The last row is measured: what a step of the digits'
network adds to the resident memory of a process on this CPU, beside what the same counting makes of
that step.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from ddpm_engine.bounds import Gt
from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.presets import PRESETS
from ddpm_engine.runtime import Precision
from ddpm_engine.training.step_memory import RESERVED, step_memory, traced

_BATCH = 512  # of the measured row, so that a step outweighs what the process holds anyway
_MOST_PIECES = 64


@dataclass(frozen=True)
class Options:
    """Model the memory of a training step, and measure that of a small one."""

    preset: str | None = None
    """Only this preset; default: all."""
    card: Annotated[float, Gt(0)] = 85.0
    """Memory of the card, in GB of 10⁹ bytes; of those sold as 80 GB, torch reports 85."""


def rows(name: str, config: RunConfig, card: float) -> Iterator[dict[str, Any]]:
    """The preset in each precision, then with what each remedy makes of it if it does not fit."""
    precisions: tuple[Precision, ...] = ("bf16", "no")
    for precision in precisions:
        plain = _with(config, precision=precision)
        row = _row(name, plain, card)
        yield row
        if row["fits"]:
            continue
        pieces = 2
        while not _row(name, _with(plain, accumulation=pieces), card)["fits"]:
            pieces *= 2
            if pieces > _MOST_PIECES:
                break
        else:
            yield _row(name, _with(plain, accumulation=pieces), card)
        for recompute in ("norms", "blocks"):
            yield _row(name, _with(plain, recompute=recompute), card)


def _with(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **values))


def _row(name: str, config: RunConfig, card: float) -> dict[str, Any]:
    training, memory = config.training, step_memory(config)
    return {
        "preset": name,
        "precision": training.precision,
        "batch": training.batch_size,
        "accumulation": training.accumulation,
        "recompute": training.recompute,
        "state_gb": round(memory.state / 1e9, 2),
        "kept_gb": round(memory.kept / 1e9, 2),
        "backward_gb": round(memory.backward / 1e9, 2),
        "total_gb": round(memory.total / 1e9, 2),
        "fits": memory.total + RESERVED <= card * 1e9,
        "kind": "model",
    }


def measured() -> dict[str, Any]:
    """Resident memory that a step of the digits' network adds to a process of its own."""
    # Memory that is freed goes back to the system at once, and is not counted twice.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown, counted = pool.apply(_measure)
    return {
        "preset": "digits",
        "precision": "no",
        "batch": _BATCH,
        "counted_mb": round(counted / 1e6, 1),
        "resident_mb": round(grown / 1e6, 1),
        "kind": "measured on this CPU",
    }


def _measure() -> tuple[int, int]:
    torch.set_num_threads(1)
    network = build_network(PRESETS["digits"]().model).train()
    traced(network, 1, on_gpu=False)  # sets everything up
    network.zero_grad(set_to_none=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, counted = traced(network, _BATCH, on_gpu=False)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return 1024 * grown, counted


def main() -> None:
    """Print the rows as they come, as JSON."""
    with exit_on_error(Options):
        options = parse_options(Options)
        if options.preset is not None and options.preset not in PRESETS:
            raise UserError(f"`preset` is {options.preset}; there are {', '.join(PRESETS)}")
        for name, preset in PRESETS.items():
            if options.preset in (None, name):
                for row in rows(name, preset(), options.card):
                    print(json.dumps(row), flush=True)
        print(json.dumps(measured()))


if __name__ == "__main__":
    main()
