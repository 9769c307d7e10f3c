"""`python -m benchmarks.gpu`, with engine and kernels on the path: see the package."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from benchmarks.gpu.item import Item
from benchmarks.gpu.processes import Running, Settings, preload, probe
from benchmarks.gpu.registry import ITEMS
from benchmarks.gpu.report import write_page
from benchmarks.gpu.results import End, Results
from benchmarks.gpu.schedule import pending, run

from ddpm_engine.runtime import CACHES
from ddpm_kernels.triton_shim import HAS_TRITON, triton

INCOMPLETE, NO_GPU = 1, 3
STATUS = f"""exit status:
  0  every item is done, or is about something that is not here
  {INCOMPLETE}  an item has failed, or no longer fitted the budget
  {NO_GPU}  there is no GPU, or no Triton: nothing was run
"""
DRY_PATIENCE = 5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the engine on this machine's GPU, and measure it, within a time.",
        epilog=STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=float, default=520, help="seconds that it may take (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-results"),
        help="folder of results, or of those to go on with (default: %(default)s)",
    )
    parser.add_argument(
        "--only", metavar="WORDS", help="items whose names contain this (default: all)"
    )
    parser.add_argument(
        "--again", action="store_true", help="retry items however often they have failed"
    )
    parser.add_argument(
        "--dry", action="store_true", help="rehearse on the CPU at tiny sizes; nothing is measured"
    )
    parser.add_argument("--list", action="store_true", help="list the items and end")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = ["--budget", "--out", "--only", "--again", "--dry", "--list"]
        meant = get_close_matches(unknown[0], flags, n=1)
        advice = f"; did you mean {meant[0]}?" if meant else ""
        parser.error(f"there is no option {unknown[0]}{advice}")
    if not options.budget > 0:
        parser.error(f"--budget is {options.budget}; give seconds greater than 0")
    return options


def start(settings: Settings, command: str) -> tuple[Settings, dict[str, str]] | str:
    """Find how processes can use the device, and learn about the machine.

    Forked, if that works also once the libraries are loaded; otherwise from scratch.
    """
    if not settings.dry and not HAS_TRITON:
        return "Triton is not installed"
    scratch = replace(settings, method="spawn")
    told = probe(settings, command)
    if isinstance(told, dict):
        preload()
        if isinstance(probe(settings, command), dict):
            return settings, {**told, "processes": "forked"}
    told = probe(scratch, command)
    return told if isinstance(told, str) else (scratch, {**told, "processes": "from scratch"})


def main(arguments: Sequence[str] | None = None, items: Sequence[Item] = ITEMS) -> int:
    """Run what is left and fits; returns the exit status."""
    options = parse(arguments)
    chosen = [item for item in items if (options.only or "") in item.name]
    if options.list:
        for item in chosen:
            print(f"{item.estimate:5.0f} s, at most {item.limit:3.0f} s  {item.name}")
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    settings = Settings(options.out.resolve(), options.dry)
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    for variable, folder in CACHES.items():
        os.environ[variable] = str(settings.work / "cache" / folder)
    started = start(settings, shlex.join(["python", "-m", "benchmarks.gpu", *given]))
    if isinstance(started, str):
        version = triton.__version__ if HAS_TRITON else "none"
        print(f"no GPU: {started} (torch {torch.__version__}, triton {version}); nothing was run")
        return NO_GPU
    settings, machine = started
    results = Results(settings.out, settings.dry)
    results.append(machine=machine)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    return _run(chosen, items, settings, results, options)


def _run(
    chosen: Sequence[Item], items: Sequence[Item], settings: Settings, results: Results,
    options: argparse.Namespace,
) -> int:  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ends: dict[str, End] = {}

    def ended(end: End) -> None:
        ends[end.item] = end
        why = f": {end.message}" if end.message else f" in {end.seconds:.1f} s"
        print(f"{end.status:>8}  {end.item}{why}", flush=True)
        write_page(items, results)

    def launch(item: Item, attempt: int, limit: float) -> Running:
        return Running(item, settings, attempt, limit)

    jobs = max(2, (os.cpu_count() or 1) - 2)
    left = pending(chosen, results, options.again)
    if settings.dry:  # CPUs may be slow; the budget holds
        left = [replace(item, limit=DRY_PATIENCE * item.limit) for item in left]
    run(left, launch, results, options.budget, jobs, ended)
    page = write_page(items, results)
    last = results.ends()
    lacking = [
        item.name for item in chosen
        if item.name not in last or last[item.name].status not in ("done", "not here")
    ]  # fmt: skip
    for name in lacking:
        end = last.get(name)
        print(f"not done: {name}, {end.status + ': ' + end.message if end else 'not run'}")
    print(f"wrote {results.path} and {page}")
    return INCOMPLETE if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
