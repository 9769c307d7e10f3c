"""A server on the loopback, and a run small enough to train at once."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tests.tiny import TINY

from ddpm_engine.config import LogConfig, RunConfig, TrainingConfig
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.remote import fetch


class Server:
    """Serves a folder, and misbehaves on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.faults: dict[str, list[str]] = {}
        """For a path, what goes wrong with the next requests: 503, cut, flip."""
        handler = partial(Handler, directory=str(folder))
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Server = self.server.owner  # type: ignore[attr-defined]
        server.requests.append(self.path)
        faults = server.faults.get(self.path)
        fault = faults.pop(0) if faults else None
        if fault is None:
            super().do_GET()
        elif fault.isdecimal():
            self.send_error(int(fault))
        else:
            content = (server.folder / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = len(content) // 2
            if fault == "flip":
                self.wfile.write(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
            else:
                self.wfile.write(content[:half])
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    started = Server(folder)
    yield started
    started.close()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        out=tmp_path / "run",
        data=DataConfig(workers=0),
        model=replace(
            TINY,
            block_out_channels=(4, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ),
        training=TrainingConfig(steps=4, batch_size=4),
        log=LogConfig(every=1, checkpoint_every=2, sample_every=0, tracker="none"),
    )
