"""The machine, and what was found on it, as JSON and Markdown."""

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
from benchmarks.gpu.checks import sized
from benchmarks.gpu.sections import Finding
from benchmarks.gpu.timing import Measurement

from ddpm_kernels.triton_shim import triton

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Report:
    """Everything that the files hold."""

    machine: dict[str, str]
    findings: list[Finding]
    measurements: list[Measurement]

    @property
    def failures(self) -> list[Finding]:
        """The checks that did not pass."""
        return [finding for finding in self.findings if not finding.passed]


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit that is checked out, and whether files differ from it."""
    head = output_of("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+changes" if output_of("git", "status", "--porcelain") else head


def machine_of(device: torch.device, command: str) -> dict[str, str]:
    """Facts without which a figure means nothing."""
    facts = {"device": "CPU (interpreter)"}
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
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def file_name(device: str) -> str:
    """`nvidia-h200` of "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def line_of(result: Finding | Measurement) -> str:
    """A result on one line."""
    if isinstance(result, Measurement):
        rate = f", {result.bandwidth:.0f} GB/s" if result.bytes else ""
        what = f"{result.operation} {sized(result.shape)} {result.dtype}"
        return f"time  {what}, {result.way}: {result.median:.1f} µs{rate}"
    verdict = "ok   " if result.passed else "FAIL "
    return f"{verdict} {result.section}, {result.name}{figures_of(result)}"


def figures_of(finding: Finding) -> str:
    """The figures of a check: of its worst comparison, of all that failed, or what it raised."""
    if finding.message:
        return f": {finding.message.splitlines()[0]}"
    failed = [c for c in finding.comparisons if not c.passed]
    worst = finding.worst
    shown = failed or ([worst] if worst else [])
    listed = "; ".join(f"{c.what}: error {c.error:.3g}, allowed {c.allowed:.3g}" for c in shown)
    return f": {listed}" if listed else ""


def to_json(report: Report) -> str:
    """The whole report. Figures that are not numbers are written as null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    findings = [
        {
            "section": f.section,
            "name": f.name,
            "passed": f.passed,
            "message": f.message,
            "comparisons": [
                {"what": c.what, "error": number(c.error), "allowed": number(c.allowed)}
                for c in f.comparisons
            ],
        }
        for f in report.findings
    ]
    values = {
        "machine": report.machine,
        "failures": len(report.failures),
        "checks": findings,
        "measurements": [asdict(m) for m in report.measurements],
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def checks_table(report: Report) -> list[str]:
    """How many checks of each section passed."""
    rows = []
    for section, group in groupby(report.findings, key=lambda f: f.section):
        found = list(group)
        rows.append([section, str(len(found)), str(sum(f.passed for f in found))])
    return table(["section", "checks", "passed"], rows)


def bandwidth_table(report: Report) -> list[str]:
    """A row for each way of each job; the copy's rate is that of as many bytes."""
    rows = []
    jobs = [m for m in report.measurements if m.bytes]
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


def loop_table(report: Report) -> list[str]:
    """A row for each way of running the sampling loop."""
    rows = [
        [f"{m.operation}, {sized(m.shape)} {m.dtype}", m.way, f"{m.median:.0f}", f"{m.least:.0f}",
         f"{m.shape[0] / m.median * 1e6 / m.calls:.2f}"]
        for m in report.measurements if not m.bytes
    ]  # fmt: skip
    header = ["loop", "way", "µs a step, median", "µs a step, least", "pictures/s"]
    return table(header, rows)


def to_markdown(report: Report) -> str:
    """The report for people."""
    machine, failures = report.machine, report.failures
    lines = [f"# {machine['device']}", ""]
    lines += table(["what", "value"], [[k, v] for k, v in machine.items()])
    lines += ["", "## Checks", ""]
    lines += checks_table(report)
    lines += [""]
    if failures:
        lines += ["Failed:", ""]
        lines += [f"- {f.section}, {f.name}{figures_of(f)}" for f in failures]
    else:
        lines += ["All passed."]
    if any(m.bytes for m in report.measurements):
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
            *bandwidth_table(report),
        ]
    if any(not m.bytes for m in report.measurements):
        lines += ["", "## Sampling", "", *loop_table(report)]
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Write both files, named by the device; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / file_name(report.machine["device"])
    written = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md")]
    for path, text in zip(written, (to_json(report), to_markdown(report)), strict=True):
        path.write_text(text, encoding="utf-8")
    return written
