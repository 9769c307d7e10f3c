"""What messages tell people to do can be done to the letter without losing anything."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[2] / "engine" / "ddpm_engine"
DESTROYS = re.compile(
    r"\b(or|and|then|;|:|,) (delete|remove|empty|erase|overwrite|rm|clear) (it|them|the|[{]|-r)",
    re.IGNORECASE,
)


def messages(file: Path) -> list[str]:
    """All texts of a module but its docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for argument in node.args:
                if isinstance(argument, ast.JoinedStr | ast.Constant):
                    texts.append(ast.unparse(argument))
    return texts


@pytest.mark.parametrize(
    "advice",
    ["choose another, or empty it", "another folder, or delete it", "x; delete {path} and index"],
)
def test_advice_that_destroys_is_found(advice: str) -> None:
    assert DESTROYS.search(advice)


def test_no_message_advises_to_destroy_what_it_names() -> None:
    found = {
        f"{file.relative_to(ENGINE)}: {text}"
        for file in ENGINE.rglob("*.py")
        for text in messages(file)
        if DESTROYS.search(text)
    }
    assert found == set()
