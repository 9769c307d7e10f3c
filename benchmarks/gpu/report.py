"""The machine, and what was measured on it: a line as each result comes, and a page."""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch
from benchmarks.gpu.timing import Measurement

from ddpm_kernels.triton_shim import HAS_TRITON, triton

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Failure:
    """Something that could not be measured."""

    what: str
    message: str


Result = Measurement | Failure


def sized(shape: tuple[int, ...]) -> str:
    """Return `4×3×64×64`."""
    return "×".join(map(str, shape))


def output_of(*command: str) -> str | None:
    """Return what a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Return the commit that is checked out, and whether files differ from it."""
    head = output_of("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+changes" if output_of("git", "status", "--porcelain") else head


def machine_of(device: torch.device, command: str) -> dict[str, str]:
    """Collect the facts without which a figure means nothing."""
    facts = {"device": "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts = {
            "device": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "L2 cache": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
            "driver": driver.splitlines()[0] if driver else "unknown",
            "CUDA": torch.version.cuda or "none",
            "ROCm": torch.version.hip or "none",
        }
    return {
        **facts,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def file_name(device: str) -> str:
    """Return `nvidia-h200` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def line_of(result: Result) -> str:
    """Return a result on one line."""
    if isinstance(result, Failure):
        return f"FAIL  {result.what}: {result.message.splitlines()[0]}"
    rate = f", {result.bandwidth:.0f} GB/s" if result.bytes else ""
    what = f"{result.operation} {sized(result.shape)} {result.dtype}"
    return f"time  {what}, {result.way}: {result.median:.1f} µs{rate}"


class Recorder:
    """Appends each result to a file as it comes, so that a run that is killed keeps what it has.

    Args:
        folder: of the files, which are named by the device.
        machine: see `machine_of`; the file's first line.
    """

    def __init__(self, folder: Path, machine: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.machine = machine
        self.results: list[Result] = []
        self.lines = folder / f"{file_name(machine['device'])}.jsonl"
        self.page = self.lines.with_suffix(".md")
        self.lines.write_text(json.dumps({"machine": machine}) + "\n", encoding="utf-8")

    def add(self, result: Result) -> None:
        """Print and write one result."""
        self.results.append(result)
        print(line_of(result), flush=True)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
        self.page.write_text(to_markdown(self.machine, self.results), encoding="utf-8")

    @property
    def failures(self) -> list[Failure]:
        """What could not be measured."""
        return [result for result in self.results if isinstance(result, Failure)]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Make a Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def bandwidth_table(measurements: list[Measurement]) -> list[str]:
    """Make a row for each way of each job; the copy's rate is that of as many bytes."""
    rows = []
    jobs = [m for m in measurements if m.bytes]
    for _, group in groupby(jobs, key=lambda m: (m.operation, m.shape, m.dtype)):
        ways = list(group)
        copy = next((m.bandwidth for m in ways if m.way == "copy"), math.nan)
        for m in ways:
            rows.append(
                [
                    f"{m.operation} {sized(m.shape)} {m.dtype}", m.way, f"{m.median:.1f}",
                    f"{m.least:.1f}", f"{m.launched:.1f}", f"{m.bandwidth:.0f}",
                    f"{m.bandwidth / copy:.0%}",
                ]
            )  # fmt: skip
    header = ["job", "way", "µs, median", "µs, least", "µs, launched", "GB/s", "of the copy"]
    return table(header, rows)


def loop_table(measurements: list[Measurement]) -> list[str]:
    """Make a row for each way of running the sampling loop."""
    rows = [
        [f"{m.operation}, {sized(m.shape)} {m.dtype}", m.way, f"{m.median:.0f}", f"{m.least:.0f}",
         f"{m.shape[0] / m.median * 1e6 / m.calls:.2f}"]
        for m in measurements if not m.bytes
    ]  # fmt: skip
    header = ["loop", "way", "µs a step, median", "µs a step, least", "samples/s"]
    return table(header, rows)


def to_markdown(machine: dict[str, str], results: list[Result]) -> str:
    """Return the results as a page for people."""
    measurements = [result for result in results if isinstance(result, Measurement)]
    failures = [result for result in results if isinstance(result, Failure)]
    lines = [f"# {machine['device']}", ""]
    lines += table(["what", "value"], [[k, v] for k, v in machine.items()])
    if failures:
        lines += ["", "Failed:", "", *(f"- {line_of(failure)}" for failure in failures)]
    if any(m.bytes for m in measurements):
        lines += [
            "",
            "## Bandwidth",
            "",
            "Bytes that the job cannot do without, over the time of one call. The time is the",
            "device's, from a CUDA graph of many calls on tensors that together exceed every",
            "cache; *launched* is one call after the other from the host. *copy* moves as many",
            "bytes; *textbook* is the same job of torch's own operations, *compiled* that by",
            "torch.compile.",
            "",
            *bandwidth_table(measurements),
        ]
    if any(not m.bytes for m in measurements):
        lines += ["", "## Sampling", "", *loop_table(measurements)]
    return "\n".join(lines) + "\n"
