"""Triton where there is one. Its wheels are for Linux; elsewhere the references serve.

Kernels are decorated when their module is imported, so without Triton a stand-in takes its place
that accepts the decorations and is never launched.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Absent:
        """Stands for any attribute of Triton, and returns what it decorates."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, decorated: Any = None, *_: Any, **__: Any) -> Any:
            return self if decorated is None else decorated

    triton = tl = _Absent()

__all__ = ["HAS_TRITON", "tl", "triton"]
