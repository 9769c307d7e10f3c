"""Items for tests of the runner, which finds them as `benchmarks.gpu.items.fakes`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.gpu.item import Context, FailedError, Item, NotHereError


def item(
    name: str, function: str, estimate: float = 0, limit: float = 60, **options: object
) -> Item:
    together = options.pop("together", None)
    assert together is None or isinstance(together, str)
    return Item(name, "Fakes", f"fakes.{function}", estimate, limit, options, together)


def good(context: Context, value: int = 1) -> None:
    print("noise of a library")
    context.add({"what": "value", "is": value})


def bad(context: Context) -> None:
    context.add({"what": "before"})
    raise FailedError("it does not hold")


def absent(context: Context) -> None:
    raise NotHereError("no such field")


def slow(context: Context, marker: str) -> None:
    """Sleep, with a process of its own that sleeps longer."""
    context.add({"what": "began"})
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(marker, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def meet(context: Context, own: str, other: str) -> None:
    """End when another item of the group is there too."""
    open(own, "w").close()
    deadline = time.monotonic() + 60
    while not os.path.exists(other):
        if time.monotonic() > deadline:
            raise FailedError("the other did not come")
        time.sleep(0.01)
