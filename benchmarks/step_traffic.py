"""Launches, bytes and FLOP of a step, by pass: `python benchmarks/step_traffic.py`.

Nothing is run: this engine's code, and a textbook's beside it, are traced on tensors without
memory, and what they would launch on a GPU is counted. Bytes are those beside convolutions and
matrix products. The time is a **model**, not a measurement: each operation takes the longer of what
its launches take at least and what its bytes and FLOP take at the card's rates.

`textbook` is torch's group norm and SiLU, channels-last, autocast over float32 weights,
`clip_grad_norm_`, `AdamW(fused=True)` and a `_foreach` average.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks` itself

from benchmarks.traffic.steps import STEPS, with_precision
from benchmarks.traffic.trace import Entry, Trace, tracing

from ddpm_engine.cli.options import exit_on_error, parse_options
from ddpm_engine.errors import UserError
from ddpm_engine.presets import PRESETS


@dataclass(frozen=True)
class Card:
    """What a card reaches: by default an H100, as published benchmarks find it."""

    name: str = "H100"
    """Name, for the report."""
    flops: float = 6e14
    """FLOP per second of convolutions and matrix products in half precision."""
    bandwidth: float = 3e12
    """Bytes per second of reading and writing memory."""
    launch: float = 2e-6
    """Seconds that a kernel takes at least."""

    def seconds(self, entries: Iterable[Entry]) -> float:
        """Model the device's time."""
        return sum(
            max(e.launches * self.launch, e.bytes / self.bandwidth + e.flop / self.flops)
            for e in entries
        )


@dataclass(frozen=True)
class Options:
    """Launches, bytes and FLOP of a step, by pass, traced; and a model of its time."""

    networks: tuple[str, ...] = ("digits:64", "cifar10:128", "cifar10-edm:512", "celebahq256:64")
    """Presets, each with a batch size."""
    steps: tuple[Literal["training", "sampling"], ...] = ("training", "sampling")
    """What is traced."""
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the network."""
    card: Card = field(default_factory=Card)
    """Card of the model."""
    json: bool = False
    """Whether to print rows of JSON instead of tables."""


def trace_step(network: str, batch: int, what: str, whose: str, precision: str) -> Trace:
    """Trace one step of a preset; the second, as the first may allocate.

    Args:
        network: preset.
        batch: batch size.
        what: "training" or "sampling".
        whose: "engine" or "textbook".
        precision: of the network.
    """
    config = with_precision(PRESETS[network](), precision, batch)
    trace = Trace()
    step = STEPS[what, whose](config, trace)
    with tracing(trace):
        step()
        trace.entries.clear()
        trace.unknown.clear()
        trace.host_reads = 0
        step()
    return trace


def by_pass(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Group entries, in the order of their first appearance."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.step_pass, []).append(entry)
    return found


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """Yield one row for each network, step, implementation and pass, and one for their sum."""
    for each in options.networks:
        network, _, batch = each.partition(":")
        if network not in PRESETS or not batch.isdigit():
            raise UserError(
                f"`networks` has {each}; it must be a preset and a batch size, as cifar10:128",
                "networks",
            )
        for what in options.steps:
            for whose in ("engine", "textbook"):
                trace = trace_step(network, int(batch), what, whose, options.precision)
                named = {"network": network, "batch": int(batch), "step": what, "code": whose}
                for step_pass, entries in by_pass(trace.entries).items():
                    yield {**named, "pass": step_pass, **summary(entries, options.card)}
                total = summary(trace.entries, options.card)
                unknown: Counter[str] = trace.unknown
                yield {
                    **named, "pass": "all", **total, "host_reads": trace.host_reads,
                    "counted_as_one": dict(unknown),
                }  # fmt: skip


def summary(entries: list[Entry], card: Card) -> dict[str, float]:
    """Sums of some entries."""
    return {
        "launches": sum(e.launches for e in entries),
        "gigabytes": sum(e.bytes for e in entries) / 1e9,
        "teraflop": sum(e.flop for e in entries) / 1e12,
        "model_ms": 1e3 * card.seconds(entries),
    }


def print_table(table: list[dict[str, Any]], card: Card) -> None:
    """Print both implementations of one step side by side."""
    first = table[0]
    print(f"\n{first['network']}, batch {first['batch']}, one {first['step']} step")
    head = "launches      GB    TFLOP  model ms"
    print(f"{'':24}{'engine':>36}{'textbook':>38}\n{'pass':24}  {head}    {head}")
    passes = dict.fromkeys(row["pass"] for row in table if row["pass"] != "all")
    for step_pass in (*passes, "all"):
        line = f"{step_pass:24}"
        for whose in ("engine", "textbook"):
            found = [r for r in table if (r["code"], r["pass"]) == (whose, step_pass)]
            if found:
                row = found[0]
                line += (
                    f"  {row['launches']:8} {row['gigabytes']:8.3f} {row['teraflop']:8.3f} "
                    f"{row['model_ms']:9.3f}"
                )
            else:
                line += " " * 38
        print(line)
    for row in table:
        if row["pass"] == "all":
            unknown = ", ".join(row["counted_as_one"]) or "none"
            print(
                f"{row['code']}: {row['host_reads']} host reads; counted as one launch: {unknown}"
            )
    print(f"model: {card.name}, {card.flops:.3g} FLOP/s, {card.bandwidth:.3g} bytes/s")


def main() -> None:
    """Trace and print."""
    with exit_on_error(Options):
        options = parse_options(Options)
        table: list[dict[str, Any]] = []
        for row in rows(options):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            table.append(row)
            if (row["code"], row["pass"]) == ("textbook", "all"):
                print_table(table, options.card)
                table = []


if __name__ == "__main__":
    main()
