"""The documents: every link leads somewhere, and names what it leads to.

Images are small enough for a page; mathematics and code blocks are closed.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "launch").rglob("*.md")),
]  # fmt: skip
THEORY = ROOT / "docs" / "ddpm.md"

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
SOURCE = re.compile(r"\b(equations?|algorithms?|sections?|appendix|tables?) [\w.]+|\(\d{4}\)")
YEAR = re.compile(r"\b(19|20)\d\d[a-z]?\b")


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


def links(document: Path) -> list[tuple[str, str]]:
    """Text and target of the links and images of a document that lead to files here."""
    found = [(text, target) for _, text, target in LINK.findall(prose(document))]
    return [(text, target) for text, target in found if "://" not in target]


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(document), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def docstring_chain(file: Path, name: str) -> list[str] | None:
    """Docstrings of a module, of the class that a dotted name begins with, and of its last part.

    None if there is no such thing in the file.
    """
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    found = [ast.get_docstring(node) or ""]  # type: ignore[arg-type]
    for part in name.split("."):
        inside = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and child.name == part
        ]
        if not inside:
            return None
        node = inside[-1]
        found.append(ast.get_docstring(inside[-1]) or "")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for text, target in links(document):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"[{text}]({target})"
        assert ROOT in file.parents, f"[{text}]({target}) leaves the repository"
        if anchor:
            assert anchor in anchors(file), f"[{text}]({target})"


def test_functions_are_where_the_links_say() -> None:
    found = {
        ((document.parent / target).resolve(), text.strip("`"))
        for document in DOCUMENTS
        for text, target in links(document)
        if target.endswith(".py") and re.fullmatch(r"`[\w.]+`", text)
    }
    # A link may also name the module itself.
    named = sorted((file, name) for file, name in found if name not in (file.name, file.stem))
    assert len(named) >= 40
    missing = [(file.name, name) for file, name in named if docstring_chain(file, name) is None]
    assert missing == []


def test_functions_of_the_theory_name_their_sources() -> None:
    unsourced = []
    for text, target in links(THEORY):
        if target.endswith(".py"):
            assert re.fullmatch(r"`[\w.]+`", text), target
            chain = docstring_chain((THEORY.parent / target).resolve(), text.strip("`")) or [""]
            cited = "\n".join(chain)
            if not (SOURCE.search(cited) and YEAR.search(cited)):
                unsourced.append(f"{text} in {target}")
    assert unsourced == []


def test_images_are_there_and_not_too_large() -> None:
    pictures = ROOT / "docs" / "pictures"
    used = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for _, target in links(document)
        if target.endswith((".png", ".gif"))
    }
    assert set(pictures.iterdir()) - used == set(), "in no document"
    for path in used:
        assert path.stat().st_size < 400_000, path
        with Image.open(path) as image:
            image.verify()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_mathematics_and_code_are_closed(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```", text, flags=re.M)
    assert len(fences) % 2 == 0
    plain = re.sub(r"`(?:[^`\n]|\n(?!\s*\n))+`", "", prose(document))
    assert "`" not in plain, "an open code span"
    displays = plain.split("$$")
    assert len(displays) % 2 == 1, "an open display"
    formulas = displays[1::2]
    for paragraph in re.split(r"\n\s*\n", "".join(displays[::2])):
        parts = paragraph.split("$")
        assert len(parts) % 2 == 1, paragraph
        formulas += parts[1::2]
    for formula in formulas:
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula
        assert not re.search(r"[^\x00-\x7f]", formula), formula
