"""An interpreter in which only some packages can be imported."""

from __future__ import annotations

from collections.abc import Iterable

_FINDER = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

THERE = {there} | {{"benchmarks", "ddpm_kernels", "ddpm_engine"}} | set(sys.stdlib_module_names)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in THERE or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
for name in ("mypy", "ruff", "diffusers", "datasets"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} is there")
"""


def only(packages: Iterable[str]) -> str:
    """Return code that hides every package but these, the standard library and our own.

    Args:
        packages: names of top-level modules.
    """
    return _FINDER.format(there=set(packages) or "set()")
