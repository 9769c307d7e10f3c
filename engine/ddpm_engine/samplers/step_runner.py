"""One step of the reverse process, with the buffers it needs for one batch shape.

A step is one evaluation of the network and one `reverse_step`; guidance in one pass adds a copy
that doubles the state, inpainting the known pixels. Everything that a step reads is on the device,
and everything that it writes was allocated before the first step. On a GPU a step is captured as a
graph when it is taken for the second time, and replayed from then on for every batch of the shape:
the graph itself counts the steps, so that the host only starts it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_engine.diffusion.guidance import Guidance, combine, dynamic_threshold, rescale_factor
from ddpm_engine.errors import UserError
from ddpm_engine.graphs import Capture, Work, as_captured
from ddpm_engine.networks.conditioning import Conditioning, cat
from ddpm_engine.samplers.inpainting import KnownPixels
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column, reverse_step
from ddpm_kernels.tiling import as_scalar

logger = logging.getLogger(__name__)

Evaluate = Callable[..., Tensor]
"""`network(x, noise_level, conditioning)` → output, `[B, C, H, W]`; see `networks.base.Network`."""


class Kind(NamedTuple):
    """Kind of a step: steps of a kind launch the same work."""

    guided: bool
    refresh: bool
    """Whether it recomputes the network's deep features."""
    repeated: bool
    """Whether inpainting noises the state back, to take the step again."""


class StepRunner:
    """The reverse process of one batch shape on a device.

    Args:
        network: called with x float32 `[B, C, H, W]` channels-last, noise levels `[B]` and
            conditions.
        table: the sampler's coefficients.
        shape: (B, C, H, W).
        conditioning: conditions of some batch: those of all batches have the same layout.
        device: of everything.
        guidance: classifier-free guidance, or None.
        alpha_bar: ᾱ of the state before each step, float64 `[S]`; for guidance.
        clip: whether to clip each estimate of x_0 to [-1, 1].
        threshold: quantile of dynamic thresholding, which then replaces clipping, or None.
        cache_interval: number of steps for which the network's deep features are reused (networks
            with `caches_features`); 1: none.
        keep_x0: whether to make `x0` available even if the sampler does not look back on it.
        known: pixels that are put back after every step, or None.
        capture: makes a replayable graph of a step; None: steps are run one by one.
    """

    def __init__(
        self,
        network: Evaluate,
        table: CoefficientTable,
        shape: tuple[int, int, int, int],
        conditioning: Conditioning,
        device: torch.device,
        *,
        guidance: Guidance | None = None,
        alpha_bar: Tensor | None = None,
        clip: bool = True,
        threshold: float | None = None,
        cache_interval: int = 1,
        keep_x0: bool = True,
        known: KnownPixels | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.network = network
        self.table = table
        self.guidance = guidance
        self.clip = clip
        self.threshold = threshold
        self.cache_interval = cache_interval
        self.known = known
        self._two_passes = guidance is not None and bool(guidance.two_passes)
        self._capture, self._capturing = capture, False

        rows = table.rows.clone()
        self._learned = bool(rows[:, Column.LOG_VARIANCE_MAX].any())
        self._guided = [False] * len(rows)
        if guidance is not None and alpha_bar is not None:
            self._guided = guidance.guides(alpha_bar)
            rows[torch.tensor(self._guided), Column.GUIDANCE] = guidance.scale
        slots = max(table.history, int(keep_x0))
        rows = torch.nn.functional.pad(rows, (0, slots - table.history))
        batch = shape[0]
        self.rows = rows.to(device, torch.float32)
        self._indices = torch.arange(len(rows), device=device)
        self._noise_levels = table.noise_input.to(device)
        if self._noise_levels.is_floating_point():
            self._noise_levels = self._noise_levels.to(torch.float32)

        self.x = torch.empty(shape, device=device, memory_format=torch.channels_last)
        self._history = None
        if slots:
            # Each slot is channels-last, as the state is.
            ring = self.x.new_zeros(slots, *self.x.permute(0, 2, 3, 1).shape)
            self._history = ring.permute(0, 1, 4, 2, 3)
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        # The batch's conditions, and with guidance the null conditions behind them: those of one
        # doubled batch, or of two.
        rows_needed = conditioning if guidance is None else cat([conditioning, conditioning])
        self._all_conditions = rows_needed.map(partial(_buffer, device=device))
        self._conditions = self._all_conditions.select(slice(0, batch))
        self._null_conditions = self._all_conditions.select(slice(batch, None))
        self._doubled: Tensor | None = None
        self._features: dict[str, Tensor] = {}
        self._row = self._indices[0].clone()
        """The next step, as captured steps count it."""
        self._next = 0
        """The next step, as the host counts it, which knows of what kind it is."""
        self._replays: dict[Kind, Work | None] = {}

    def begin(
        self,
        x: Tensor,
        seed: int,
        sample_ids: Tensor,
        conditioning: Conditioning,
        null: Conditioning | None = None,
    ) -> None:
        """Begin a batch.

        Args:
            x: the state to start from, `[B, C, H, W]`; copied.
            seed: of all noise.
            sample_ids: int64 `[B]`.
            conditioning: of the batch; copied.
            null: null conditions of the batch, if it is guided; copied.

        Raises:
            ValueError: conditions of another layout than the buffers'.
        """
        self.x.copy_(x)
        if self._history is not None:
            # Its weight is zero at first, but zero times the infinity of a diverged trajectory is
            # NaN: nothing of the batch before may stay.
            self._history.zero_()
        self._seed.copy_(as_scalar(seed, self._seed.device))
        self._ids.copy_(sample_ids)
        self._conditions.copy_(conditioning)
        if null is not None:
            self._null_conditions.copy_(null)
        self._seek(0)

    def warm_up(self) -> None:
        """Take steps of each kind, from whatever the state is; `begin` a batch afterwards.

        Compilers run and graphs are captured now, and memory that is too small is too small now.
        """
        first = {self._kind(index): index for index in reversed(range(self.steps))}
        for index in sorted(first.values()):
            for _ in range(1 if self._capture is None else 2):
                self._seek(index)
                self.step()

    def _seek(self, index: int) -> None:
        self._next = index
        self._row.fill_(index)

    @property
    def steps(self) -> int:
        """S: rows of the table."""
        return len(self.rows)

    def x0(self, index: int) -> Tensor:
        """Return the estimate of x_0 of step `index`, shaped as `x`; a later step overwrites it."""
        assert self._history is not None, "made with keep_x0=False"
        return self._history[index % len(self._history)]

    def step(self) -> None:
        """Take the next step: `x` becomes the next state. The host neither reads nor writes.

        Raises:
            UserError: a learned variance that the network does not predict.
        """
        index, self._next = self._next, self._next + 1
        kind = self._kind(index)
        if self._capture is None:
            self._run(kind, self._indices[index], self._noise_levels[index])
        else:
            self._replay(kind, self._capture)

    def _replay(self, kind: Kind, capture: Capture) -> None:
        replay = self._replays.get(kind)
        if replay is None and kind in self._replays:
            self._capturing = True
            try:
                replay = self._replays[kind] = capture(partial(self._run_and_count, kind))
            except torch.OutOfMemoryError:
                if not (kind.guided and self._may_part):
                    raise
                self._part()
            finally:
                self._capturing = False
        if replay is None:
            # Run once uncaptured: compilers and libraries set themselves up, which no graph may.
            self._replays[kind] = None
            with as_captured(self.x.device):
                self._run_and_count(kind)
        else:
            replay()

    def _run_and_count(self, kind: Kind) -> None:
        """A step that finds its row by itself, and leaves the next one's."""
        row = self._row.reshape(1)
        self._run(kind, self._row, self._noise_levels.index_select(0, row))
        self._row.add_(1)

    def _kind(self, index: int) -> Kind:
        guided = self._guided[index]
        # Where guidance begins or ends, cached features are of other evaluations or another batch.
        changed = index > 0 and guided != self._guided[index - 1]
        refresh = changed or index % self.cache_interval == 0
        return Kind(guided, refresh, self.known is not None and self.known.repeated[index])

    def _run(self, kind: Kind, row: Tensor, noise_level: Tensor) -> None:
        output, unconditional = self._evaluate(kind.guided, kind.refresh, noise_level)
        if self._learned and output.shape[1] != 2 * self.x.shape[1]:
            raise UserError(
                f"variance is learned_range, but the network's output has {output.shape[1]} "
                f"channels; it would need {2 * self.x.shape[1]}. Use fixed_small or fixed_large"
            )
        rescale = threshold = None
        if unconditional is not None and self.guidance is not None and self.guidance.rescale:
            scale = self.rows.index_select(0, row.reshape(1))[0, Column.GUIDANCE]
            channels = self.x.shape[1]  # behind them, a predicted variance may follow
            rescale = rescale_factor(
                output[:, :channels], unconditional[:, :channels], scale, self.guidance.rescale
            )
        if self.threshold is not None:
            x0 = self._estimate(output, unconditional, rescale, row)
            threshold = dynamic_threshold(x0, self.threshold)
        reverse_step(
            self.x, output, self.rows, row, self._seed, self._ids, unconditional, rescale,
            threshold, self._history, clip=self.clip, in_place=True,
        )  # fmt: skip
        if self.known is not None:
            self.known.put_back(self.x, row, self._seed, self._ids, kind.repeated)

    def _estimate(
        self, output: Tensor, unconditional: Tensor | None, rescale: Tensor | None, row: Tensor
    ) -> Tensor:
        """The estimate of x_0 before it is bounded, as `reverse_step` makes it."""
        coefficients = self.rows.index_select(0, row.reshape(1))[0]
        output = output[:, : self.x.shape[1]].float()
        if unconditional is not None:
            u = unconditional[:, : self.x.shape[1]].float()
            output = combine(output, u, coefficients[Column.GUIDANCE])
        if rescale is not None:
            output = output * rescale[:, None, None, None]
        return (
            coefficients[Column.X0_FROM_X] * self.x + coefficients[Column.X0_FROM_OUTPUT] * output
        )

    def _evaluate(
        self, guided: bool, refresh: bool, noise_level: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, and that without conditions if the step is guided."""
        if not guided:
            return self._network("alone", self.x, noise_level, self._conditions, refresh), None
        if not self._two_passes:
            try:
                return self._evaluate_together(noise_level, refresh)
            except torch.OutOfMemoryError:
                # A capture that fails is over: what follows would be in no graph.
                if self._capturing or not self._may_part:
                    raise
                self._part()
        conditional = self._network("conditional", self.x, noise_level, self._conditions, refresh)
        null = self._network("null", self.x, noise_level, self._null_conditions, refresh)
        return conditional, null

    @property
    def _may_part(self) -> bool:
        """Whether guidance in one pass may become guidance in two."""
        guidance = self.guidance
        return guidance is not None and guidance.two_passes is None and not self._two_passes

    def _part(self) -> None:
        logger.warning("guidance in two passes from here on: one needs too much memory")
        self._two_passes, self._doubled = True, None
        self._features.pop("both", None)
        # Whatever was captured of guided steps evaluates both at once.
        self._replays = {kind: r for kind, r in self._replays.items() if not kind.guided}

    def _evaluate_together(self, noise_level: Tensor, refresh: bool) -> tuple[Tensor, Tensor]:
        batch = len(self.x)
        if self._doubled is None:
            shape = (2 * batch, *self.x.shape[1:])
            self._doubled = torch.empty(
                shape, device=self.x.device, memory_format=torch.channels_last
            )
        self._doubled.unflatten(0, (2, batch)).copy_(self.x[None])
        output = self._network("both", self._doubled, noise_level, self._all_conditions, refresh)
        return output[:batch], output[batch:]

    def _network(
        self, branch: str, x: Tensor, noise_level: Tensor, conditions: Conditioning, refresh: bool
    ) -> Tensor:
        """One evaluation; `branch` names the features that it keeps or takes."""
        arguments = (x, noise_level.expand(len(x)), conditions)
        if self.cache_interval == 1:
            return self.network(*arguments)
        kept = self._features.get(branch)
        if refresh or kept is None:
            output, features = self.network(*arguments, return_features=True)
            if kept is None:
                kept = self._features.setdefault(branch, torch.empty_like(features))
            kept.copy_(features)
            return output
        return self.network(*arguments, features=kept)


def _buffer(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory for tensors of this layout; images are channels-last, as the state is."""
    memory_format = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    if tensor.dtype == torch.bool:
        # Of a text: a softmax over no tokens would be NaN when a step is warmed up.
        return torch.ones_like(tensor, device=device, memory_format=memory_format)
    return torch.zeros_like(tensor, device=device, memory_format=memory_format)
