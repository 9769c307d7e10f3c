"""How much work one program of each kernel takes, by architecture: the one table of tile shapes.

The table is static. The order in which a kernel adds depends on its tile, so a choice made by
timing could differ between two runs, or between the ranks of one. To try others on a GPU at hand is
a separate step, whose result is a file that a run has to name:

    python -m ddpm_kernels.autotune --out tiles.json
    DDPM_TILES=tiles.json accelerate launch launch/train.py

Architectures are `sm_90` and the like for NVIDIA, `gfx942` and the like for AMD.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import assumed_architecture

LEAST = 128
"""Elements of the smallest tile: four for each thread of a warp of 32."""


class Tile(NamedTuple):
    """The work of one program."""

    elements: int
    """A power of two, so a multiple of four: all normals of a counter block are used."""
    warps: int
    """Of 32 threads, or 64 on AMD."""
    stages: int = 1
    """Tiles that a program of a norm has under way at a time: those that it loads while it
    computes on one. One leaves that to the other programs of a multiprocessor."""
    programs: int = 512
    """Slabs of `group_norm_silu`, and blocks of tokens of `modulate`, are cut until there are this
    many: a wave of four per multiprocessor on 132, which keeps enough loads in flight. More would
    only repeat a program's fixed work."""

    def fitted(self, count: int) -> Tile:
        """No larger than samples of `count` elements need, with as much work a thread."""
        if count >= self.elements:
            return self
        elements = max(LEAST, 1 << (count - 1).bit_length())
        warps = max(1, self.warps * elements // self.elements)
        return self._replace(elements=elements, warps=warps)

    def options(self) -> dict[str, int | bool]:
        """Compiler options of a launch.

        Fused multiply-add is asked for, not left to a default: the last bit of a result depends
        on it.
        """
        return {"num_warps": self.warps, "enable_fp_fusion": True}


Table = dict[str, Tile]

# 16 elements a thread in the noise kernels: the work of finding a program's place is small beside
# theirs, and as they need 40 to 56 registers, half of a multiprocessor's threads still fit.
TILES: dict[str, Table] = {
    "default": {
        "q_sample": Tile(1024, 2),
        "denoising_loss": Tile(1024, 2),
        "reverse_step": Tile(1024, 2),
        # Twice as many spill on sm_100. The next is loaded while one is computed on: as many
        # programs as there are keep too little under way by themselves.
        "group_norm_silu": Tile(2048, 4, stages=2),
        # Half as many programs: each reads two tensors.
        "group_norm_silu_backward": Tile(2048, 4, stages=2, programs=256),
        # Eight elements a thread, as below; sixteen spill on sm_120.
        "residual_sum": Tile(2048, 8),
        # Eight elements a thread: 16 bytes of a gradient in half precision.
        "gradient_norm": Tile(1024, 4),
        "adamw_step": Tile(1024, 4),
        # Likewise of each tensor. Each program of the backward pass leaves sums to be added: few
        # and large ones, two a multiprocessor.
        "modulate": Tile(1024, 4, programs=1024),
        "modulate_backward": Tile(2048, 8, programs=256),
    },
    # The same work a thread, with 64 threads a warp.
    "gfx": {
        "q_sample": Tile(1024, 1),
        "denoising_loss": Tile(1024, 1),
        "reverse_step": Tile(1024, 1),
        "residual_sum": Tile(2048, 4),
        "gradient_norm": Tile(1024, 2),
        "adamw_step": Tile(1024, 2),
        "modulate": Tile(1024, 2, programs=2048),
        "modulate_backward": Tile(2048, 4, programs=512),  # of 304 units
    },
}
"""By architecture, most general first: `default`, then the letters of its name, then its name."""

_tried: Table = {}


def tile_for(operation: str, tensor: Tensor) -> Tile:
    """The tile of an operation on the device of `tensor`, of any shape.

    Raises:
        ValueError: `DDPM_TILES` names a file that is no table of tiles.
    """
    return _tried.get(operation) or _table(architecture(tensor))[operation]


@contextmanager
def trying(operation: str, tile: Tile) -> Iterator[None]:
    """Use a tile in place of the table's."""
    before = dict(_tried)
    _tried[operation] = tile
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def architecture(tensor: Tensor) -> str:
    """`sm_90`, `gfx942` or the like, of a tensor of any shape; `cpu` where there is no GPU."""
    return _architecture(tensor.get_device()) if tensor.is_cuda else assumed_architecture() or "cpu"


@lru_cache
def _architecture(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


@lru_cache
def _table(name: str) -> Table:
    family = name.rstrip("0123456789abcdef") if name.startswith("gfx") else name.split("_")[0]
    tables = (TILES["default"], TILES.get(family, {}), TILES.get(name, {}), _measured(name))
    return {operation: tile for table in tables for operation, tile in table.items()}


def _measured(name: str) -> Table:
    """What `DDPM_TILES` says of this architecture."""
    path = os.environ.get("DDPM_TILES")
    return read_tiles(Path(path)).get(name, {}) if path else {}


def read_tiles(path: Path) -> dict[str, Table]:
    """Read what `write_tiles` wrote.

    Raises:
        ValueError: there is no such file, or it is no table of tiles.
    """
    try:
        tables = {
            name: {operation: _read_tile(tile) for operation, tile in table.items()}
            for name, table in json.loads(path.read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"DDPM_TILES: {path} is no table of tiles: {error}") from error
    for table in tables.values():
        for operation, tile in table.items():
            _check_tile(path, operation, tile)
    return tables


def _read_tile(stored: Any) -> Tile:
    """From the fields of `Tile` by name, or by position, as earlier versions wrote them."""
    return Tile(*stored) if isinstance(stored, list) else Tile(**stored)


def _check_tile(path: Path, operation: str, tile: Tile) -> None:
    known = TILES["default"]
    if operation not in known:
        raise ValueError(f"DDPM_TILES: {path} names {operation!r}; choose from {', '.join(known)}")
    for field, value in tile._asdict().items():
        if not isinstance(value, int) or value < 1:
            what = "must be a positive integer"
        elif field in ("elements", "warps") and value & (value - 1):
            what = "must be a power of 2"
        elif field == "elements" and value < LEAST:
            what = f"must be at least {LEAST}"
        else:
            continue
        raise ValueError(f"DDPM_TILES: {path} has {value!r} {field} for {operation}; it {what}")


def write_tiles(path: Path, tables: dict[str, Table]) -> None:
    """Write a file for `DDPM_TILES`; an earlier one is replaced whole or not at all."""
    stored = {
        name: {operation: tile._asdict() for operation, tile in table.items()}
        for name, table in tables.items()
    }
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(stored, indent=2) + "\n")
    beside.replace(path)
