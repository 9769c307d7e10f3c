"""Figures as a table on the terminal, as JSON, in a document, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput.timing import Spread

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError
from ddpm_engine.plots.style import COLOURS, saved


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def figure(spread: Spread | None, digits: int) -> str:
    """`median [lower upper]`."""
    if spread is None:
        return "–"
    values = (spread.median, spread.lower, spread.upper)
    median, lower, upper = (f"{value:.{digits}f}" for value in values)
    return f"{median} [{lower} {upper}]"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a report; dataclasses become dictionaries."""

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        raise TypeError(f"{type(value).__name__} is no JSON value")

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1, default=plain, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def write_between_marks(document: Path, script: str, lines: list[str]) -> None:
    """Put the result of a script into a document, between its marks.

    Raises:
        UserError: there are no marks.
    """
    begin, end = f"<!-- begin: {script} -->", "<!-- end -->"
    text = document.read_text(encoding="utf-8")
    before, mark, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not mark or not closed:
        raise UserError(f"{document} has no place for the table: {begin} … {end}")
    with atomic_write(document) as file:
        file.write("\n".join([before + begin, "", *lines, "", end + after]).encode())


def plot_bars(path: Path, title: str, named: dict[str, Spread]) -> None:
    """Images per second of each way, with quartiles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names, spreads = list(named)[::-1], list(named.values())[::-1]
    medians = [spread.median for spread in spreads]
    errors = [
        [spread.median - spread.lower for spread in spreads],
        [spread.upper - spread.median for spread in spreads],
    ]
    colours = [COLOURS[1] if "engine" in name else "#999999" for name in names]
    with saved(path, 8, 0.4 * len(named) + 1.5) as (_, axes):
        axes[0, 0].barh(names, medians, xerr=errors, color=colours, ecolor="#000000")
        axes[0, 0].set(xlabel="images per second, median and quartiles", title=title)


def plot_quality(path: Path, title: str, points: list[dict[str, Any]]) -> None:
    """Images per second against the Fréchet distance, a line for each method.

    Args:
        path: of the PNG.
        title: above it.
        points: each with name, steps, images_per_second and distance; one name is one line, and the
            first point is what to reach. What follows a comma in a name is a variant, with open
            marks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(point["name"] for point in points))
    families = list(dict.fromkeys(name.partition(",")[0] for name in names))
    with saved(path, 8, 5) as (_, grid):
        axes = grid[0, 0]
        axes.axhline(points[0]["distance"], color="#000000", linestyle=":", linewidth=1)
        for name in names:
            line = sorted((p for p in points if p["name"] == name), key=lambda p: p["steps"])
            family = name.partition(",")[0]
            colour = COLOURS[families.index(family) % len(COLOURS)]
            axes.plot(
                [p["images_per_second"] for p in line], [p["distance"] for p in line],
                label=name, color=colour, marker="o",
                markerfacecolor="white" if name != family else colour,
            )  # fmt: skip
            for point in line:
                axes.annotate(
                    str(point["steps"]), (point["images_per_second"], point["distance"]),
                    textcoords="offset points", xytext=(4, 5), fontsize=8,
                )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", title=title, ylabel="Fréchet distance to the real digits",
            xlabel="images per second; beside each point, network evaluations per sample",
        )  # fmt: skip
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
