"""Streams of what is captured: stand-ins for CUDA note what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddpm_engine import graphs
from ddpm_engine.graphs import as_captured, captured
from ddpm_engine.training.capture import warm_up

GPU = torch.device("cuda", 0)


class Streams:
    """Streams by their names: "main" is the current one at first."""

    def __init__(self) -> None:
        self.made = 0
        self.current = self.named("main")
        self.log: list[str] = []

    def named(self, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, device_index=0, wait_stream=wait_stream)

    def make(self, device: int) -> Any:
        self.made += 1
        return self.named(f"side {device}.{self.made}")

    @contextmanager
    def entered(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.log.append("capture")
        with self.entered(stream):
            yield

    def work(self) -> None:
        self.log.append(f"work on {self.current.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    streams = Streams()
    cuda = SimpleNamespace(
        Stream=streams.make,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        current_device=lambda: 0,
        current_stream=lambda device: streams.current,
        stream=streams.entered,
        graph=streams.graph,
    )
    monkeypatch.setattr(
        graphs, "torch", SimpleNamespace(cuda=cuda, clear_autocast_cache=lambda: None)
    )
    graphs._stream.cache_clear()
    yield streams
    graphs._stream.cache_clear()


def test_what_is_captured_has_run_on_the_same_stream(streams: Streams) -> None:
    for _ in range(2):
        warm_up(streams.work, GPU)
        captured(streams.work)
    once = [
        "side 0.1 waits for main", *["work on side 0.1"] * 3, "main waits for side 0.1",
        "capture", "work on side 0.1",
    ]  # fmt: skip
    assert streams.log == once * 2


def test_what_fails_is_waited_for_all_the_same(streams: Streams) -> None:
    with pytest.raises(torch.OutOfMemoryError), as_captured(GPU):
        raise torch.OutOfMemoryError
    assert streams.log[-1] == "main waits for side 0.1"
    assert streams.current.name == "main"


def test_there_are_no_streams_elsewhere(streams: Streams) -> None:
    warm_up(streams.work, torch.device("cpu"))
    assert streams.log == ["work on main"] * 3
