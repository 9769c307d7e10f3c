"""Which modules import which: what import-linter does not see of the floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ("ddpm_engine", "ddpm_kernels")
MODULES = [
    path
    for package in (ROOT / "engine" / "ddpm_engine", ROOT / "kernels" / "ddpm_kernels")
    for path in sorted(package.rglob("*.py"))
]


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""]


def test_no_function_imports_a_module_of_ours() -> None:
    """Inside a function it would hide a circle; optional libraries may be imported there."""
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and any(name.split(".")[0] in OWN for name in imported(node))
    ]
    assert hidden == []


def test_packages_export_nothing() -> None:
    """`__init__` modules hold a docstring, but for the faces of the two distributions."""
    faces = {ROOT / "engine/ddpm_engine/__init__.py", ROOT / "kernels/ddpm_kernels/__init__.py"}
    full = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.name == "__init__.py"
        and path not in faces
        and path.parent.parent != ROOT / "kernels/ddpm_kernels"
        and len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
    ]
    assert full == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("dir(ddpm_engine)", {"torch", "ddpm_engine.errors", "ddpm_engine.config"}),
        (
            "import ddpm_engine.config",
            {"ddpm_kernels", "ddpm_engine.samplers.sampler", "tyro"},
        ),
        (
            "ddpm_engine.UNet",
            {f"ddpm_engine.{name}" for name in ("samplers", "config", "data", "training")},
        ),
    ],
)
def test_imports_are_light(code: str, absent: set[str]) -> None:
    code = f"import sys, ddpm_engine; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "ddpm_engine" in found
    assert not absent & found
