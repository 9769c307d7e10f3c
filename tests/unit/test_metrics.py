"""The log of a run on a disk that is full for a while."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

import pytest

from ddpm_engine.training.callbacks.metrics_file import JsonLines

VALUES = {"loss": 1.0, "grad_norm": 1.0}


def test_rows_that_find_no_room_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl", 0)
    log.append(1, VALUES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for half a row.
    size = os.path.getsize(log.path) + 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        log.append(2, VALUES)
        log.append(3, VALUES)
        assert os.path.getsize(log.path) == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "metrics.jsonl cannot be written" in errors[0].getMessage()
    log.append(4, VALUES)
    log.close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
