"""The figures as a table on the terminal, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput.measuring import Measured, Operations, Row
from benchmarks.throughput.timing import Spread

from ddpm_engine.atomic_io import atomic_write
from ddpm_engine.errors import UserError

LEGEND = """\
images/s: median [quartiles]. ×ref: over the reference, median [quartiles] of paired repetitions.
MiB: peak of tensors beyond the weights. outside: share of the time outside the U-Net. of peak: what
the U-Net computes a second, of the faster of a matrix product and a convolution timed in the same
round. ops: outside + inside the U-Net a step, views and allocations apart, as run here (compiled
networks: before compilation) and where the engine's kernels take over, as on a GPU; (n) host waits.
error: largest difference at any step from the sampler's standard (cached: from caching by hand),
relative where values exceed one."""


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
    median, lower, upper = (
        f"{value:.{digits}f}" for value in (spread.median, spread.lower, spread.upper)
    )
    return f"{median} [{lower} {upper}]"


def percent(spread: Spread | None) -> str:
    """The median alone."""
    return "–" if spread is None else f"{spread.median:.1%}"


def counted(operations: Operations | None) -> str:
    """`outside+inside (waits)`."""
    if operations is None:
        return "–"
    waits = operations.waits_outside + operations.waits_inside
    return f"{operations.outside:g}+{operations.inside:g} ({waits:g})"


def cells(row: Row) -> list[str]:
    """A row of the table; a way that must not be timed has no figures."""
    name = f"{row.sampler}: {row.name}"
    parity = row.parity
    if parity.problem is not None:
        return [name, *["–"] * 7, "FAILED"]
    error = "standard" if parity.difference is None else f"{parity.difference:.0e}"
    return [
        name,
        figure(row.images_per_second, 1 if row.images_per_second.median >= 10 else 3)
        if row.images_per_second
        else "–",
        figure(row.speed_up, 2),
        "–" if row.peak_mib is None else f"{row.peak_mib:.1f}",
        percent(row.outside_share),
        percent(row.peak_share),
        counted(row.operations),
        counted(row.gpu_operations),
        error,
    ]


def table(measured: Measured) -> list[str]:
    """All rows, the failures in words, and what the columns mean."""
    header = [
        "way", "images/s", "×ref", "MiB", "outside", "of peak", "ops", "on a GPU", "error",
    ]  # fmt: skip
    lines = aligned(header, [cells(row) for row in measured.rows])
    lines.append("")
    for row in measured.rows:
        if row.parity.problem is not None:
            lines.append(f"FAILED {row.sampler}: {row.name}: {row.parity.problem}")
    peaks = ", ".join(
        f"{name} {figure(spread and scaled(spread, 1e-9), 0)} GFLOP/s"
        for name, spread in measured.peak_flops.items()
    )
    lines.append(f"U-Net: {measured.flops_per_image / 1e9:.3g} GFLOP an image. Peak: {peaks}.")
    return [*lines, *LEGEND.splitlines()]


def scaled(spread: Spread, factor: float) -> Spread:
    """In other units."""
    return Spread(spread.median * factor, spread.lower * factor, spread.upper * factor)


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries, for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1, default=plain, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def write_between_marks(document: Path, script: str, lines: list[str]) -> None:
    """Put what a script has found into a document, between its marks.

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
    """Images a second of each way, with quartiles."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(named) + 1.5))
    names, spreads = list(named)[::-1], list(named.values())[::-1]
    medians = [spread.median for spread in spreads]
    errors = [
        [spread.median - spread.lower for spread in spreads],
        [spread.upper - spread.median for spread in spreads],
    ]
    colours = ["#D55E00" if "engine" in name else "#999999" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, ecolor="#000000")
    axes.set_xlabel("images/s, median and quartiles")
    axes.set_title(title)
    finish(figure, path)


def plot_quality(path: Path, title: str, points: list[dict[str, Any]]) -> None:
    """Images a second against the Fréchet distance, a line for each method.

    Args:
        path: of the picture.
        title: above it.
        points: each with name, steps, images_per_second and distance; one name is one line, and the
            first point is what to reach. What follows a comma in a name is a variant: of the same
            colour, with open marks.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5))
    names = list(dict.fromkeys(point["name"] for point in points))
    looks = looks_of(names)
    standard = points[0]
    axes.axhline(standard["distance"], color="#000000", linestyle=":", linewidth=1)
    for name in names:
        line = sorted(
            (point for point in points if point["name"] == name), key=lambda p: p["steps"]
        )
        speeds = [point["images_per_second"] for point in line]
        axes.plot(speeds, [point["distance"] for point in line], label=name, **looks[name])
        for point, speed in zip(line, speeds, strict=True):
            axes.annotate(
                str(point["steps"]), (speed, point["distance"]),
                textcoords="offset points", xytext=(4, 5), fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:.2g}")
    axes.set_xlabel("images/s; beside each point, evaluations of the network a picture")
    axes.set_ylabel("Fréchet distance to the real digits")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path)


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colours and marks: black the textbook, grey the peers, orange the distilled."""
    colours = iter(["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442"])
    marks = {"diffusers": iter("os^v<>"), "distilled": iter("Dv^s")}
    fixed = {"reference": "#000000", "diffusers": "#888888", "distilled": "#D55E00"}
    found: dict[str, dict[str, Any]] = {}
    families: dict[str, str] = {}
    for name in names:
        family = name.partition(",")[0]
        kind = family.split()[0]
        if family not in families:
            families[family] = fixed[kind] if kind in fixed else next(colours)
        colour = families[family]
        variant = name != family and kind not in marks
        found[name] = {
            "color": colour,
            "marker": next(marks[kind], "x") if kind in marks else "*" if kind in fixed else "o",
            "markerfacecolor": "white" if variant else colour,
            "markersize": 12 if kind == "reference" else 6,
        }
    return found


def pyplot() -> Any:
    """Matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def finish(figure: Any, path: Path) -> None:
    """Write and forget a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
