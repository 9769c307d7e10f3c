"""A stand-in for a CUDA graph: records the operations of some work, and runs exactly these again.

What a graph would freeze is frozen here: the operations, their order, the tensors and the numbers
they are given. Python is not run again, so whatever it decided, or read from a tensor, stays as it
was when the work was recorded. Unlike a graph's capture, recording runs the work: let it change
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_engine.graphs import Work
from ddpm_engine.training.callbacks.callback import Callback
from ddpm_engine.training.run import Run
from ddpm_kernels.dispatch import force_ops

READS = ("aten._local_scalar_dense.", "aten.nonzero.", "aten.is_nonzero.", "aten.equal.")
"""Operations by which the host reads a tensor's values or learns their number."""


class Recording(TorchDispatchMode):
    """Every operation below autograd, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func).startswith(READS):
            self.reads.append(str(func))
        result = func(*args, **kwargs)
        given = {memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(result))
            if isinstance(leaf, Tensor) and memory(leaf) not in given
        ]
        # What may be a view can be a copy, such as a reshape.
        if fresh or not func.is_view:
            self.operations.append((func, args, kwargs, fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run the recorded operations on the same memory."""
        for func, args, kwargs, fresh in self.operations:
            leaves = tree_leaves(func(*args, **kwargs))
            for leaf in leaves:
                if is_work(leaf):
                    torch.distributed.Work.unbox(leaf).wait()
            for place, ours in fresh:
                ours.copy_(leaves[place])


class Recorder:
    """A `graphs.Capture` that keeps what it has recorded."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def __call__(self, work: Work) -> Work:
        recording = Recording()
        with recording:
            work()
        assert recording.reads == [], "the host reads in the middle of what is recorded"
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay


def memory(tensor: Tensor) -> int:
    """Where the memory behind a tensor begins."""
    return tensor.untyped_storage()._cdata


def is_work(value: Any) -> bool:
    """Whether an operation returned something to wait for."""
    return isinstance(value, torch.ScriptObject) and value._type().name() == "Work"  # type: ignore[attr-defined]


class AsOnAGpu(Callback):
    """Let a run take the registered operations, which round otherwise than what a CPU takes."""

    def __init__(self) -> None:
        self._forced = force_ops()

    def on_start(self, run: Run) -> None:
        self._forced.__enter__()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        self._forced.__exit__(None, None, None)


class Recorded(AsOnAGpu):
    """Let a run record its first step and replay it from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        run.capture = self.recorder
