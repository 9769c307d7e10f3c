"""`python -m benchmarks.gpu`, with engine and kernels on the path: what `make gpu` runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from benchmarks.gpu import report as reports
from benchmarks.gpu.sections import SECTIONS, Finding, Plan, Result, isolated
from benchmarks.gpu.timing import Measurement

from ddpm_kernels.triton_shim import HAS_TRITON, triton

FAILED, NO_GPU = 1, 3
STATUS = f"""exit status:
  0  every check passed
  {FAILED}  a check failed, or something could not be measured
  {NO_GPU}  there is no GPU, or no Triton: nothing was run
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the kernels on this machine's GPU, and measure them.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=reports.ROOT / "benchmarks" / "results",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="about a minute's worth of it (default: all)"
    )
    parser.add_argument(
        "--checks-only", action="store_true", help="measure nothing (default: measure, too)"
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        meant = get_close_matches(unknown[0], ["--out", "--quick", "--checks-only"], n=1)
        advice = f"; did you mean {meant[0]}?" if meant else ""
        parser.error(f"there is no option {unknown[0]}{advice}")
    return options


def run(plan: Plan, results_of: Callable[[str, Plan], Iterator[Result]]) -> list[Result]:
    """Run every section, printing each result as it comes."""
    found = []
    for section in SECTIONS:
        for result in results_of(section, plan):
            print(reports.line_of(result), flush=True)
            found.append(result)
    return found


def main(
    arguments: Sequence[str] | None = None,
    plan: Plan | None = None,
    results_of: Callable[[str, Plan], Iterator[Result]] = isolated,
) -> int:
    """Check, measure, write the results; returns the exit status.

    Args:
        arguments: of the command line; None for the process's own.
        plan: what to run and where; None for a GPU, as the command line says.
        results_of: how a section is run.
    """
    options = parse(arguments)
    if plan is None:
        if not HAS_TRITON or not torch.cuda.is_available():
            missing = "torch sees none here" if HAS_TRITON else "Triton is not installed"
            print(
                f"no GPU: {missing} (torch {torch.__version__}, triton "
                f"{triton.__version__ if HAS_TRITON else 'none'}); every module of the engine that "
                "is needed could be imported, nothing was run"
            )
            return NO_GPU
        plan = Plan("cuda:0", "quick" if options.quick else "full", not options.checks_only)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.gpu", *given])
    machine = reports.machine_of(torch.device(plan.device), command)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    found = run(plan, results_of)
    report = reports.Report(
        machine,
        [result for result in found if isinstance(result, Finding)],
        [result for result in found if isinstance(result, Measurement)],
    )
    for path in reports.write(report, options.out):
        print(f"wrote {path}")
    for failure in report.failures:
        print(reports.line_of(failure))
    print(f"{len(report.findings)} checks, {len(report.failures)} failed")
    return FAILED if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
