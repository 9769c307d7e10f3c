"""Inputs that are staged and reports that are read late, on a device whose streams run as they may.

Streams are simulated: what the host queues runs later, in an order that only events and the order
of each stream restrict. Another order each time, and as late as the host's waits permit.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddpm_engine.data.dataset import Batch
from ddpm_engine.training.inputs import Numbers, StagedInputs
from ddpm_engine.training.reports import Reports

GPU = torch.device("cuda", 0)


class Event:
    """As `torch.cuda.Event`: counts how often it was recorded, and how far that has been run."""

    def __init__(self, device: Device) -> None:
        self.device, self.recorded, self.reached = device, 0, 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded += 1
        number = self.recorded

        def reach() -> None:
            self.reached = number

        (stream or self.device.current).queue.append((lambda: True, reach))

    def synchronize(self) -> None:
        number = self.recorded
        self.device.run_until(lambda: self.reached >= number)


class Stream:
    """As `torch.cuda.Stream`: a queue of conditions and what is done once they hold."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.queue.append((lambda: event.reached >= number, lambda: None))

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.wait_event(event)


class Device(TorchFunctionMode):
    """Its tensors are the host's; copies are queued, but for those to page-locked memory."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.current = self.new_stream()

    def new_stream(self, _device: object = None) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            ready = [s for s in self.streams if s.queue and s.queue[0][0]()]
            assert ready, "all streams wait for one another"
            self.random.choice(ready).queue.popleft()[1]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == GPU:
            kwargs["device"] = "cpu"
        locked = kwargs.pop("pin_memory", False)
        if func is Tensor.copy_:
            to, source = args
            if not getattr(to, "locked", False):
                self.current.queue.append((lambda: True, lambda: copied(to, source)))
                return to
        made = func(*args, **kwargs)
        if locked:
            made.locked = True
        return made


def copied(to: Tensor, source: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        to.copy_(source)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Device]:
    device = Device(request.param)
    for name, stand_in in {
        "Stream": device.new_stream,
        "Event": lambda: Event(device),
        "current_stream": lambda _device: device.current,
        "stream": device.entered,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    with device:
        yield device


def batch_of(step: int) -> Batch:
    images = torch.full((2, 1, 2, 2), step, dtype=torch.uint8)
    return Batch(images, torch.tensor([step, 1]), torch.tensor([step, step + 1]))


def expected(step: int) -> list[float]:
    return [8.0 * step, step + 1.0, 2.0 * step + 1, 100.0 + step]


@pytest.mark.parametrize("device", range(20), indirect=True)
def test_every_step_finds_its_own_inputs(device: Device) -> None:
    inputs, reports = StagedInputs(GPU, averages=1), Reports(GPU)
    found = []

    def step() -> None:
        (batch,) = inputs.batches
        assert batch.labels is not None
        with torch._C.DisableTorchFunction():
            values = [batch.images.sum(), batch.labels.sum(), batch.positions.sum()]
            row = [float(v) for v in values] + [float(inputs.numbers.learning_rate)]
            reports.row.copy_(torch.tensor(row))

    for number in range(12):
        inputs.load([batch_of(number)], Numbers(100.0 + number, [0.5]))
        device.current.queue.append((lambda: True, step))
        reports.send(number + 1)
        if len(reports) > 1:
            found.append(reports.read())
    found.append(reports.read())
    assert [report.step for report in found] == list(range(1, 13))
    for number, report in enumerate(found):
        row = [report.loss_sum, report.stops, report.replaced, report.grad_norm]
        assert row == expected(number)
