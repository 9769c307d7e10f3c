"""The reverse process of one batch shape: its memory, and one step of it.

A step is the network and one `reverse_step` (guided in one pass: and a copy that doubles the
state). Everything that a step reads is on the device, and everything that it writes was allocated
before the first, so on a GPU a step is captured as a graph when it is taken for the second time and
replayed from then on, for every batch of the shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ddpm_engine.diffusion.guidance import Guidance, dynamic_threshold, rescale_factor
from ddpm_engine.errors import UserError
from ddpm_engine.networks.conditioning import Conditioning
from ddpm_engine.samplers.table import CoefficientTable
from ddpm_kernels import Column, reverse_step

logger = logging.getLogger(__name__)

Model = Callable[..., Tensor]
"""`model(x, noise_level, conditioning)` → output, `[B, C, H, W]`; see `networks.base.Network`."""

Kind = tuple[bool, bool]
"""Of a step: whether it is guided, and whether it recomputes the network's deep features."""


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Capture work on the current CUDA device as a graph; nothing is run. Returns its replay."""
    graph = torch.cuda.CUDAGraph()
    # Weights that autocast has converted are kept until it ends, and the graph may live longer.
    torch.clear_autocast_cache()
    with torch.cuda.graph(graph):
        step()
    torch.clear_autocast_cache()
    return graph.replay


class StepRunner:
    """One batch shape's reverse process on a device.

    Args:
        model: called with x float32 `[B, C, H, W]` channels-last, timesteps `[B]`, labels int64
            `[B]` if there are any, and if it enlarges, the enlarged images `[B, C, H, W]` and their
            augmentation levels int64 `[B]`.
        table: the sampler.
        shape: (B, C, H, W).
        device: of everything.
        labelled: whether `begin` is given labels.
        enlarging: whether it is given small images that have been enlarged.
        null_class: the label of no class, needed for guidance.
        guidance: or None.
        alpha_bar: ᾱ of the state that each step begins with, float64 `[S]`; for guidance.
        clip: clip each estimate of x_0 to [-1, 1].
        threshold: quantile of dynamic thresholding, which then replaces clipping, or None.
        cache_interval: recompute the network's deep features at every so many-th step (`UNet`
            alone offers that); 1: always.
        keep_x0: make `x0` available even if the sampler does not look back on it.
        capture: makes a replayable graph of a step; None: steps are run one by one.
    """

    def __init__(
        self,
        model: Model,
        table: CoefficientTable,
        shape: tuple[int, int, int, int],
        device: torch.device,
        *,
        labelled: bool = False,
        enlarging: bool = False,
        null_class: int | None = None,
        guidance: Guidance | None = None,
        alpha_bar: Tensor | None = None,
        clip: bool = True,
        threshold: float | None = None,
        cache_interval: int = 1,
        keep_x0: bool = True,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self.model = model
        self.table = table
        self.guidance = guidance
        self.clip = clip
        self.threshold = threshold
        self.cache_interval = cache_interval
        self._null_class = null_class
        self._two_passes = guidance is not None and bool(guidance.two_passes)
        self._capture = capture

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
        self._timesteps = table.noise_input.to(device)
        if self._timesteps.is_floating_point():
            self._timesteps = self._timesteps.to(torch.float32)

        self.x = torch.empty(shape, device=device, memory_format=torch.channels_last)
        self._history = None
        if slots:
            # Each slot is channels-last, as the state is.
            ring = self.x.new_zeros(slots, *self.x.permute(0, 2, 3, 1).shape)
            self._history = ring.permute(0, 1, 4, 2, 3)
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._labels = self._null_labels = self._all_labels = None
        if labelled:
            # Conditional labels, then null labels: those of one doubled batch, or of two.
            self._all_labels = torch.full((2 * batch,), null_class or 0, device=device)
            self._labels, self._null_labels = self._all_labels.split(batch)
        self._enlarged = self._levels = None
        if enlarging:
            # As often as the largest batch of the network has them: once for each prediction.
            copies = 1 if guidance is None else 2
            self._enlarged = torch.zeros((copies * batch, *shape[1:]), device=device).contiguous(
                memory_format=torch.channels_last
            )
            self._levels = torch.zeros(copies * batch, dtype=torch.int64, device=device)
        self._doubled: Tensor | None = None
        self._features: dict[str, Tensor] = {}
        self._row = self._indices[0].clone()
        self._timestep = self._timesteps[0].clone()
        self._replays: dict[Kind, Callable[[], None] | None] = {}

    def begin(
        self,
        x: Tensor,
        seed: int,
        sample_ids: Tensor,
        labels: Tensor | None = None,
        enlarged: Tensor | None = None,
        level: int = 0,
    ) -> None:
        """Take up a batch.

        Args:
            x: the state to start from, `[B, C, H, W]`; copied.
            seed: of all noise.
            sample_ids: int64 `[B]`.
            labels: int64 `[B]`, if and only if the process is labelled.
            enlarged: small images enlarged to `[B, C, H, W]`, if and only if it is enlarging.
            level: of their augmentation.
        """
        self.x.copy_(x)
        if self._history is not None:
            # Weighted with zero at first, but zero times the infinity of a chain that diverged is
            # no number: nothing of the batch before may stay.
            self._history.zero_()
        self._seed.fill_(seed)
        self._ids.copy_(sample_ids)
        if self._labels is not None and labels is not None:
            self._labels.copy_(labels)
        if self._enlarged is not None and self._levels is not None and enlarged is not None:
            self._enlarged.unflatten(0, (-1, len(x))).copy_(enlarged[None])
            self._levels.fill_(level)

    def warm_up(self) -> None:
        """Take one step of each kind, from whatever the state is; `begin` a batch afterwards."""
        kinds: set[Kind] = set()
        for index in range(self.steps):
            if (kind := self._kind(index)) not in kinds:
                kinds.add(kind)
                self.step(index)

    @property
    def steps(self) -> int:
        """S: rows of the table."""
        return len(self.rows)

    def x0(self, index: int) -> Tensor:
        """The estimate of x_0 that step `index` was made from, shaped as `x`.

        It is overwritten by a later step.
        """
        assert self._history is not None, "made with keep_x0=False"
        return self._history[index % len(self._history)]

    def step(self, index: int) -> None:
        """Take one step: `x` becomes the next state. Neither waits for the device nor allocates.

        Raises:
            UserError: a learned variance that the network does not predict.
        """
        kind = self._kind(index)
        if self._capture is None:
            self._run(kind, self._indices[index], self._timesteps[index])
            return
        self._row.copy_(self._indices[index])
        self._timestep.copy_(self._timesteps[index])
        if kind not in self._replays:
            # Taken once as it is: compilers and libraries set themselves up, which no graph may.
            self._replays[kind] = None
            self._run(kind, self._row, self._timestep)
            return
        replay = self._replays[kind]
        if replay is None:
            replay = self._capture(partial(self._run, kind, self._row, self._timestep))
            self._replays[kind] = replay
        replay()

    def _kind(self, index: int) -> Kind:
        guided = self._guided[index]
        # Where guidance begins or ends, what is kept is of other evaluations, or of another batch.
        changed = index > 0 and guided != self._guided[index - 1]
        return guided, changed or index % self.cache_interval == 0

    def _run(self, kind: Kind, row: Tensor, timestep: Tensor) -> None:
        guided, refresh = kind
        output, unconditional = self._evaluate(guided, refresh, timestep)
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

    def _estimate(
        self, output: Tensor, unconditional: Tensor | None, rescale: Tensor | None, row: Tensor
    ) -> Tensor:
        """The estimate of x_0 before it is bounded, as `reverse_step` makes it."""
        coefficients = self.rows.index_select(0, row.reshape(1))[0]
        output = output[:, : self.x.shape[1]].float()
        if unconditional is not None:
            u = unconditional[:, : self.x.shape[1]].float()
            output = u + coefficients[Column.GUIDANCE] * (output - u)
        if rescale is not None:
            output = output * rescale[:, None, None, None]
        return (
            coefficients[Column.X0_FROM_X] * self.x + coefficients[Column.X0_FROM_OUTPUT] * output
        )

    def _evaluate(
        self, guided: bool, refresh: bool, timestep: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, and that for the null class if the step is guided."""
        if not guided:
            return self._network("alone", self.x, timestep, self._labels, refresh), None
        if not self._two_passes:
            try:
                return self._evaluate_together(timestep, refresh)
            except torch.OutOfMemoryError:
                if self.guidance is None or self.guidance.two_passes is not None:
                    raise
                logger.warning("guidance in two passes from here on: one needs too much memory")
                self._two_passes, self._doubled = True, None
        conditional = self._network("conditional", self.x, timestep, self._labels, refresh)
        return conditional, self._network("null", self.x, timestep, self._null_labels, refresh)

    def _evaluate_together(self, timestep: Tensor, refresh: bool) -> tuple[Tensor, Tensor]:
        batch = len(self.x)
        if self._doubled is None:
            shape = (2 * batch, *self.x.shape[1:])
            self._doubled = torch.empty(
                shape, device=self.x.device, memory_format=torch.channels_last
            )
        self._doubled.unflatten(0, (2, batch)).copy_(self.x[None])
        output = self._network("both", self._doubled, timestep, self._all_labels, refresh)
        return output[:batch], output[batch:]

    def _network(
        self, branch: str, x: Tensor, timestep: Tensor, labels: Tensor | None, refresh: bool
    ) -> Tensor:
        """One evaluation; `branch` names the features that it may keep or take."""
        conditioning = Conditioning(labels)
        if self._enlarged is not None and self._levels is not None:
            conditioning = Conditioning(labels, self._enlarged[: len(x)], self._levels[: len(x)])
        arguments = (x, timestep.expand(len(x)), conditioning)
        if self.cache_interval == 1:
            return self.model(*arguments)
        kept = self._features.get(branch)
        if refresh or kept is None:
            output, features = self.model(*arguments, return_features=True)
            if kept is None:
                kept = self._features.setdefault(branch, torch.empty_like(features))
            kept.copy_(features)
            return output
        return self.model(*arguments, features=kept)
