"""Scripts that a launcher has told another precision than they compute in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.forked import run_script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --out out", "but --training.precision is no; set --training.precision to bf16"),
        ("sample --checkpoint run --out out", "but --precision is no; set --precision to bf16"),
        ("evaluate --checkpoint run --out out", "but --precision is no; set --precision to bf16"),
        ("evaluate --samples run --data set --out out", "always computed in float32"),
        ("visualize --toy moons --out out", "always computed in float32"),
    ],
)
def test_a_script_refuses_it(words: str, message: str, tmp_path: Path) -> None:
    script, *arguments = words.split()
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    ended = run_script(f"launch/{script}.py", *arguments, cwd=tmp_path, environment=environment)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: the launcher asks for ACCELERATE_MIXED_PRECISION=bf16")
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []
