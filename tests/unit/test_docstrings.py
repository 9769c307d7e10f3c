"""Every public docstring gives the shapes of arrays and the errors a user can act on.

Read from the source, so that no module need be importable. The body of a Triton kernel is not
public: only its launcher calls it. (That everything public has a docstring, ruff's D1 checks.)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "engine" / "ddpm_engine", ROOT / "kernels" / "ddpm_kernels")
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
COMMANDS = set((ROOT / "engine" / "ddpm_engine" / "cli").glob("*.py"))
"""Their docstrings are help texts, and whatever they raise is printed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

ARRAY = re.compile(r"\b(Tensor|ndarray|NDArray|Pixels|Indices)\b")
"""In an annotation: an array, whose shape must be said."""
OPAQUE = re.compile(r"Callable|dict\[|Mapping\[|Iterable\[|Iterator\[")
"""In an annotation: arrays inside something that has no one shape."""
SHAPE = re.compile(
    r"""
    `?\[[^\]`]*\]`?              # `[B, C, H, W]`
    | 0-dim | [Aa]ny\ shape | same\ shape | shaped\ (as|like) | broadcast | likewise
    | [Ee]lementwise | an\ element\b
    | \b([Ss]ee|[Ww]hat|[Aa]s|as\ in|as\ of|given\ to|arguments\ of)\ `
    """,
    re.VERBOSE,
)
"""A shape, or another function that says it."""
OF_ALL = re.compile(r"\b(All tensors are|Every array is)\b[^.]*`\[")
"""In the docstring of a module: the shape of everything in it."""


@dataclass(frozen=True)
class Public:
    """A public function or method, and the docstring of it or of the class it constructs."""

    module: Path
    name: str
    node: Function
    docstring: str

    def __str__(self) -> str:
        return f"{self.module.relative_to(ROOT)}:{self.node.lineno} {self.name}"


def definitions(module: Path) -> Iterator[Public]:
    """Public functions, methods and constructors of a module."""

    def visit(body: list[ast.stmt], owner: ast.ClassDef | None, prefix: str) -> Iterator[Public]:
        for node in body:
            if isinstance(node, ast.If):
                yield from visit([*node.body, *node.orelse], owner, prefix)
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, node, f"{prefix}{node.name}.")
            if not isinstance(node, Function):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            constructor = owner is not None and node.name == "__init__"
            if any(name == "overload" or name.startswith("triton.jit") for name in decorators):
                continue
            if constructor or not node.name.startswith("_"):
                documented = owner if constructor and owner is not None else node
                docstring = ast.get_docstring(documented) or ""
                yield Public(module, prefix + node.name, node, docstring)

    yield from visit(tree_of(module).body, None, "")


@cache
def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


PUBLIC = [function for module in MODULES for function in definitions(module)]


def sections(docstring: str) -> dict[str, str]:
    """Text of each section: `Args`, `Returns`, `Raises`; what comes before them is under `""`."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in docstring.splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields):", line)
        if heading:
            current = heading[1]
            found[current] = []
        else:
            found[current].append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def entries(section: str) -> dict[str, str]:
    """Text of each `name: …` of a section, whose names are indented by four."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r"    (\w+): ?(.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def is_array(annotation: ast.expr | None) -> bool:
    text = "" if annotation is None else ast.unparse(annotation)
    return bool(ARRAY.search(text)) and not OPAQUE.search(text)


def unshaped(function: Public) -> list[str]:
    """What a docstring leaves out about the shapes of arrays."""
    if OF_ALL.search(ast.get_docstring(tree_of(function.module)) or ""):
        return []
    parts = sections(function.docstring)
    described = entries(parts.get("Args", ""))
    missing = []
    arguments = function.node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        if not is_array(argument.annotation):
            continue
        name = argument.arg
        text = described.get(name)
        if text is None:
            # A docstring may say it in its sentence, or of several arguments together.
            together = [entry for entry in described.values() if "what follows" in entry]
            text = "\n".join([parts[""], *together])
        if not SHAPE.search(text):
            missing.append(f"the shape of `{name}`")
    if is_array(function.node.returns):
        text = parts.get("Returns", parts.get("Yields", parts[""]))
        if not SHAPE.search(text):
            missing.append("the shape of what it returns")
    return missing


def own_statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything in a function but what is in functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (Function, ast.Lambda, ast.ClassDef)):
            yield from own_statements(child)


def raised(node: ast.AST) -> set[str]:
    """Names of the errors that a function's own statements raise."""
    found = set()
    for child in own_statements(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            found.add(ast.unparse(child.exc.func))
    return found


def called(node: ast.AST) -> set[str]:
    """Names of functions and of own methods that a function calls."""
    found = set()
    for child in own_statements(node):
        if isinstance(child, ast.Call):
            if isinstance(child.func, ast.Name):
                found.add(child.func.id)
            elif isinstance(child.func, ast.Attribute) and ast.unparse(child.func.value) == "self":
                found.add(child.func.attr)
    return found


def raising_helpers(module: Path) -> set[str]:
    """Private functions and methods of a module that raise a `UserError`, or call one that does."""
    private = {
        node.name: node
        for node in ast.walk(tree_of(module))
        if isinstance(node, Function) and node.name.startswith("_") and node.name != "__init__"
    }
    raising = {name for name, node in private.items() if "UserError" in raised(node)}
    while more := {n for n, node in private.items() if called(node) & raising} - raising:
        raising |= more
    return raising


def test_arrays_have_shapes() -> None:
    assert {str(f): lacks for f in PUBLIC if (lacks := unshaped(f))} == {}


def test_user_errors_are_documented() -> None:
    missing = []
    helpers = {module: raising_helpers(module) for module in MODULES}
    for function in PUBLIC:
        if function.module in COMMANDS:
            continue
        raises = (
            "UserError" in raised(function.node) or called(function.node) & helpers[function.module]
        )
        if raises and "UserError" not in sections(function.docstring).get("Raises", ""):
            missing.append(str(function))
    assert missing == []
