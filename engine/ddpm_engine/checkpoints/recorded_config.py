"""A run's configuration as it is recorded: in its directory, and in each of its checkpoints.

A path that was given relative counts from the folder that the run was started in, which is recorded
too, wherever the record is read. If the run has been moved together with what it names, the paths
count from where that folder is now; and if there is nothing at either, from the current folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm_engine.config import RECORDED_IN, RunConfig, from_dict, read_values, to_dict
from ddpm_engine.locations import is_location

CONFIG = "config.json"
"""Name of the configuration in a run directory."""


def record(config: RunConfig) -> dict[str, Any]:
    """Convert a configuration to JSON values, with the folder that its relative paths count from.

    Raises:
        OSError: the current folder has been removed.
    """
    return {**to_dict(config), RECORDED_IN: os.getcwd()}


def of_record(values: Any, run: Path, origin: str) -> RunConfig:
    """Invert `record`, with its paths as they are from here.

    Args:
        values: what `record` returned, or `to_dict`.
        run: where the run is now.
        origin: where the values come from, for messages.

    Raises:
        UserError: naming `origin` and the entries at fault.
    """
    config = from_dict(values, origin)
    return _located(config, _bases(config.out, run, values.get(RECORDED_IN)))


def load_record(file: Path) -> tuple[RunConfig, bool]:
    """Read a file of a configuration, with its paths as they are from here.

    Returns:
        The configuration, and whether a run recorded it: not a person or `--print-config`.

    Raises:
        UserError: no such file, not JSON, or not a run configuration.
    """
    values = read_values(file)  # once: a pipe has nothing more to read
    return of_record(values, file.parent, str(file)), RECORDED_IN in values


def located_beside(values: Any, run: Path, place: str) -> str:
    """A place that was recorded beside a configuration, as it is from here.

    Args:
        values: what `record` returned, or `to_dict`.
        run: where the run is now.
        place: a path as it was given, or the name of something else.
    """
    return str(_if_path(_locator(_bases(Path(values["out"]), run, values.get(RECORDED_IN))), place))


def _bases(out: Path, run: Path, recorded_in: Any) -> list[Path]:
    """The folders that relative paths may count from, the likeliest first."""
    bases = []
    parts, here = out.parts, run.resolve().parts
    if parts and not out.is_absolute() and here[-len(parts) :] == parts:
        bases.append(Path(*here[: -len(parts)]))
    if isinstance(recorded_in, str):
        bases.append(Path(recorded_in))
    return bases


def _locator(bases: list[Path]) -> Callable[[Path], Path]:
    def locate(path: Path) -> Path:
        for base in bases:
            if not path.is_absolute() and os.path.exists(base / _fixed(path)):
                return path if base == Path.cwd() else base / path
        return path

    return locate


def _located(config: RunConfig, bases: list[Path]) -> RunConfig:
    locate = _locator(bases)
    data, plan = config.data, config.distillation
    return replace(
        config,
        data=replace(
            data,
            path=_if_path(locate, data.path),
            source=_if_path(locate, data.source),
            mix_with=tuple(_if_path(locate, other) for other in data.mix_with),
            cache=_if_path(locate, data.cache),
            text_encoder=_if_path(locate, data.text_encoder),
        ),
        training=replace(config.training, init=_if_path(locate, config.training.init)),
        distillation=replace(
            plan,
            teacher=_if_path(locate, plan.teacher),
            student=_if_path(locate, plan.student),
        ),
    )


def _if_path(locate: Callable[[Path], Path], value: Any) -> Any:
    """Locate a path, or a string that is one; the type stays, and so does what is not moved."""
    if isinstance(value, Path):
        return locate(value)
    if isinstance(value, str) and not is_location(value) and value not in ("digits", "photos"):
        located = locate(Path(value))
        return value if located == Path(value) else str(located)
    return value


def _fixed(path: Path) -> Path:
    """The part of a path before any pattern, as in `shards/{000..009}.tar`."""
    for n, part in enumerate(path.parts):
        if "{" in part:
            return Path(*path.parts[:n])
    return path
