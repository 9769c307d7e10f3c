"""What a step works on, brought to the device without waiting for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_engine.data.dataset import Batch


@dataclass(frozen=True)
class Numbers:
    """The numbers of one step: those that follow from its index, and what this rank has met."""

    learning_rate: float
    """Learning rate of the step."""
    ema_weights: Sequence[float]
    """1 − decay of each average, in the order of `ema.decays`."""
    stop: bool = False
    """Whether a signal has asked this rank to stop."""
    replaced: int = 0
    """Unreadable samples of this rank's micro-batches that were replaced."""


class DeviceNumbers:
    """The same on the device, floats; views of one `vector`, so that they are one copy.

    Args:
        vector: `[4 + K]`, for K averages.
    """

    def __init__(self, vector: Tensor) -> None:
        self.vector = vector
        self.skip = vector[0]
        """0-dim: if not zero, the step changes nothing."""
        self.learning_rate = vector[1]
        """0-dim."""
        self.counts = vector[2:4]
        """`[2]`: `stop` and `replaced`, in the order of `reports.Column`."""
        self.ema_weights = vector[4:]
        """`[K]`."""

    @staticmethod
    def packed(numbers: Numbers) -> Tensor:
        """Return the `vector` of a step's numbers, `[4 + K]` with `skip` zero, on the host."""
        counts = (float(numbers.stop), float(numbers.replaced))
        values = [0.0, numbers.learning_rate, *counts, *numbers.ema_weights]
        return torch.tensor(values, dtype=torch.float64)


class Inputs(ABC):
    """The micro-batches and numbers of the step that comes next, on the device.

    Args:
        device: where steps run.
        averages: K, the number of averages.
    """

    def __init__(self, device: torch.device, averages: int) -> None:
        self.device = device
        # AdamW on a CPU computes with a rate in double precision; a GPU has no use for that.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self.numbers = DeviceNumbers(torch.zeros(4 + averages, dtype=dtype, device=device))
        self.batches: list[Batch] = []

    @abstractmethod
    def load(self, batches: list[Batch], numbers: Numbers) -> None:
        """Bring the inputs of a step to the device, behind the steps before it.

        Args:
            batches: its micro-batches, in page-locked memory if the device is a GPU.
            numbers: its numbers.
        """


class DirectInputs(Inputs):
    """Batches are used where they are, or copied if the device is not the host."""

    def load(self, batches: list[Batch], numbers: Numbers) -> None:
        """See `Inputs`."""
        self.batches = [batch.to(self.device, non_blocking=True) for batch in batches]
        self.numbers.vector.copy_(DeviceNumbers.packed(numbers))


class StaticInputs(Inputs):
    """Batches and numbers are always at the same place, so that a step can be captured."""

    def load(self, batches: list[Batch], numbers: Numbers) -> None:
        """See `Inputs`."""
        self._make_room(batches)
        given = [*_tensors(batches), DeviceNumbers.packed(numbers)]
        for ours, theirs in zip(self._tensors(), given, strict=True):
            ours.copy_(theirs)

    def _make_room(self, batches: list[Batch]) -> None:
        """Allocate, for the first step, what micro-batches like these need."""
        if not self.batches:
            self.batches = [_empty_like(batch, self.device) for batch in batches]

    def _tensors(self) -> list[Tensor]:
        return [*_tensors(self.batches), self.numbers.vector]


class StagedInputs(StaticInputs):
    """The same on a GPU: copied to one of two other places while the step before still runs.

    A stream of its own copies from page-locked memory, and the step begins with a copy within the
    device's memory. Nothing is waited for but by one stream for the other.
    """

    def __init__(self, device: torch.device, averages: int) -> None:
        super().__init__(device, averages)
        self._stream = torch.cuda.Stream(device)
        self._stages: list[_Stage] = []
        self._loads = 0

    def load(self, batches: list[Batch], numbers: Numbers) -> None:
        """See `Inputs`."""
        if not self._stages:
            self._make_room(batches)
            self._stages = [_Stage.like(self._tensors()) for _ in range(2)]
            # The memory is new: what it was used for before must have ended.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        stage = self._stages[self._loads % 2]
        self._loads += 1
        # Its last copy has ended: the report of the step before the last has been read.
        stage.numbers.copy_(DeviceNumbers.packed(numbers))
        given = [*_tensors(batches), stage.numbers]
        if computed := [tensor for tensor in given if tensor.is_cuda]:
            # Captions encoded there, after the step before.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            for tensor in computed:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(stage.free)
            for staged, one in zip(stage.tensors, given, strict=True):
                staged.copy_(one, non_blocking=True)
            stage.filled.record(self._stream)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(stage.filled)
        for ours, staged in zip(self._tensors(), stage.tensors, strict=True):
            ours.copy_(staged)
        stage.free.record(stream)


@dataclass(frozen=True, eq=False)
class _Stage:
    """Where the inputs of every other step are put first."""

    tensors: list[Tensor]
    """On the device, one for each that the step works on."""
    numbers: Tensor
    """`DeviceNumbers.vector` in page-locked memory."""
    filled: torch.cuda.Event
    """The copies to the device have ended."""
    free: torch.cuda.Event
    """The step has taken them from here."""

    @staticmethod
    def like(tensors: list[Tensor]) -> _Stage:
        numbers = torch.empty(len(tensors[-1]), pin_memory=True)
        staged = [torch.empty_like(tensor) for tensor in tensors]
        return _Stage(staged, numbers, torch.cuda.Event(), torch.cuda.Event())


def make_inputs(device: torch.device, averages: int, static: bool) -> Inputs:
    """Choose how inputs reach a device.

    Args:
        device: where steps run.
        averages: number of averages of the weights.
        static: whether steps are captured.
    """
    if device.type == "cuda":
        return StagedInputs(device, averages)
    return StaticInputs(device, averages) if static else DirectInputs(device, averages)


def _tensors(batches: list[Batch]) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.tensors().values()


def _empty_like(batch: Batch, device: torch.device) -> Batch:
    """Memory for such a batch, in the same memory format."""
    return replace(
        batch.map(lambda tensor: torch.empty_like(tensor, device=device)), captions=None, faults=[]
    )
