"""The log of a run on a disk that is full for a while."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path

import pytest

from ddpm_engine.training.meters import MetricsLog

VALUES = {
    "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "images_per_second": 1.0,
    "data_wait_percent": 1.0, "samples_seen": 1.0,
}  # fmt: skip


def test_rows_that_find_no_room_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, 10, active=True)
    log.record(1, VALUES, 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for half a row.
    size = os.path.getsize(log.path) + 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        log.record(2, VALUES, 1.0)
        log.record(3, VALUES, 1.0)
        assert os.path.getsize(log.path) == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 2
    assert "metrics.jsonl cannot be written" in told[0].getMessage()
    log.record(4, VALUES, 1.0)
    log.close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
