"""`python -m benchmarks.gpu`, with engine and kernels on the path: see the package."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from benchmarks.gpu import loop, timing
from benchmarks.gpu.report import ROOT, Failure, Recorder, machine_of, sized
from benchmarks.gpu.timing import Extent, Measurement, named

from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.triton_shim import HAS_TRITON, triton

FAILED, NO_GPU = 1, 3
STATUS = f"""exit status:
  0  everything was measured
  {FAILED}  something could not be measured
  {NO_GPU}  there is no GPU, or no Triton: nothing was run
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measure the kernels, and a sampling loop, on this machine's GPU.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure one size of each (default: all)"
    )
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        meant = get_close_matches(unknown[0], ["--out", "--quick"], n=1)
        advice = f"; did you mean {meant[0]}?" if meant else ""
        parser.error(f"there is no option {unknown[0]}{advice}")
    return options


def measurements(
    device: torch.device, extent: Extent
) -> Iterator[tuple[str, Callable[[], list[Measurement]]]]:
    """List the measurements, the operations first."""
    timer = timing.timer_of(device)
    repeats, beyond = (2, 1) if extent == "tiny" else (timing.REPEATS, timing.BEYOND_CACHES)
    for jobs in timing.JOBS:
        for job in jobs(device, extent):
            name = f"{job.operation} {sized(job.shape)} {named(job.dtype)}"
            yield name, partial(timing.measure, job, device, timer, repeats, beyond)
    yield "sampling loop", partial(loop.measure_loop, device, extent, timer)


def measure(device: torch.device, extent: Extent, recorder: Recorder) -> None:
    """Measure everything; what fails is recorded, and the next goes on."""
    with force_ops():
        for name, run in measurements(device, extent):
            try:
                for measured in run():
                    recorder.add(measured)
            except Exception as error:
                recorder.add(Failure(name, f"{type(error).__name__}: {error}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results; returns the exit status."""
    options = parse(arguments)
    if not HAS_TRITON or not torch.cuda.is_available():
        missing = "torch sees none here" if HAS_TRITON else "Triton is not installed"
        version = triton.__version__ if HAS_TRITON else "none"
        print(f"no GPU: {missing} (torch {torch.__version__}, triton {version}); nothing was run")
        return NO_GPU
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    given = sys.argv[1:] if arguments is None else arguments
    machine = machine_of(device, shlex.join(["python", "-m", "benchmarks.gpu", *given]))
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    recorder = Recorder(options.out, machine)
    measure(device, "quick" if options.quick else "full", recorder)
    print(f"wrote {recorder.lines} and {recorder.page}")
    return FAILED if recorder.failures else 0


if __name__ == "__main__":
    sys.exit(main())
