"""Names of files that are not text in any encoding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.report import write_report
from ddpm_engine.printable import check_utf8, printable

NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("café", "café"), (NOT_UTF8, r"caf\xe9"), ("\ud800", r"\ud800"), (r"caf\xe9", r"caf\xe9")],
)
def test_text_can_be_written_in_every_encoding_of_unicode(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).encode("utf-8")


def test_a_report_of_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    measured = {"kid": {"mean": 0.1, "error": 0.1}}
    inputs = {"pictures": {"count": 1}}
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    path = write_report(folder, inputs, measured, {"samples": NOT_UTF8})
    assert json.loads(path.read_bytes())["found_at"]["samples"] == NOT_UTF8
    assert "caf" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_weights_are_not_sought_where_they_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / NOT_UTF8
    folder.mkdir()
    with pytest.raises(UserError, match=r"`out` .*caf\\xe9 is not UTF-8.* another name"):
        check_utf8(folder, "out")
    with pytest.raises(UserError, match=r"caf\\xe9 is not UTF-8"):
        load_model(folder)
    check_utf8(tmp_path / "café")
