"""Everything that is decided about a training batch before its noise, in one launch.

For each sample, from the first words w, w′ of its counter in a stream of its own (`philox`):

| drawn              | value                                     | stream               |
|--------------------|-------------------------------------------|----------------------|
| integers           | floor(w n / 2³²), uniform in [0, n)       | `TRAINING_TIMESTEP`  |
| flip               | w < 2³¹, true with probability one half   | `HORIZONTAL_FLIP`    |
| dropped            | w < p 2³², true with probability p        | `LABEL_DROPOUT`      |
| labels             | the null class where dropped              | `LABEL_DROPOUT`      |
| augmentation level | as the integers, with the number of levels| `AUGMENTATION_LEVEL` |
| dropout key        | w + 2³² w′, 64 bits                       | `DROPOUT`            |

Only integers are computed with, so the results are the same to the bit on every device, and those
of `random_integers` and `bernoulli`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_kernels.dispatch import on_device_of, runs_triton, skips_dispatcher, takes_op
from ddpm_kernels.philox import Stream, first_pair, first_pairs
from ddpm_kernels.tiles import Tile
from ddpm_kernels.tiling import as_scalar, check_per_sample, packed
from ddpm_kernels.triton_shim import tl, triton

WORDS = 2**32
"""As the number of integers: the words themselves."""
_TILE = Tile(128, 4)
"""Samples of a program, one a thread: the ten rounds of one are what a launch waits for."""


class Draws(NamedTuple):
    """What was drawn for a batch; None: it was not asked for."""

    integers: Tensor | None
    """int64 `[B]`."""
    flip: Tensor | None
    """bool `[B]`: whether a sample is mirrored."""
    labels: Tensor | None
    """int64 `[B]`, some of them the null class."""
    augmentation_levels: Tensor | None
    """int64 `[B]`."""
    dropout_key: Tensor | None
    """int64 `[B]`, any 64 bits: what `dropout` follows from."""
    dropped: Tensor | None
    """bool `[B]`: whether a sample loses its conditions, of which the label is one."""


def training_draws(
    seed: int | Tensor,
    positions: Tensor,
    *,
    integers: int | None = None,
    flip: bool = False,
    labels: Tensor | None = None,
    label_dropout: float = 0.0,
    null_class: int = 0,
    augmentation_levels: int | None = None,
    dropout_key: bool = False,
    dropped: bool = False,
    step: int = 0,
) -> Draws:
    """Draw what is asked for, for each sample of a batch.

    Args:
        seed: 64-bit integer, or 0-dim int64 tensor on the device of `positions`.
        positions: int64 `[B]` in [0, 2⁵⁶), which everything follows from.
        integers: number n of equally likely integers, 1 to 2³²; None: none are drawn.
        flip: whether to draw which samples are mirrored.
        labels: int64 `[B]`, or None.
        label_dropout: probability of dropping a sample's conditions, to 2⁻³².
        null_class: what replaces the label then.
        augmentation_levels: number of equally likely levels, 1 to 2³²; None: none are drawn.
        dropout_key: whether to draw keys of dropout.
        dropped: whether to draw whose conditions are dropped, for those that are not labels.
        step: counter step, in [0, 2³²).

    Raises:
        ValueError: `labels` does not have one value per sample.
    """
    check_per_sample(len(positions), labels=labels)
    asked = (
        integers is not None, flip, labels is not None, augmentation_levels is not None,
        dropout_key, dropped,
    )  # fmt: skip
    if not any(asked):
        return Draws(None, None, None, None, None, None)
    call: Callable[..., list[Tensor]] = training_draws_reference
    if takes_op(positions):
        direct = skips_dispatcher(positions)
        call = _training_draws if direct else torch.ops.ddpm.training_draws.default
    threshold = round(label_dropout * 2**32)
    drawn = iter(
        call(
            as_scalar(seed, positions.device), positions, labels, integers, flip, threshold,
            null_class, augmentation_levels, dropout_key, dropped, step,
        )
    )  # fmt: skip
    return Draws(*(next(drawn) if is_asked else None for is_asked in asked))


# --- Reference


def training_draws_reference(
    seed: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    integers: int | None,
    flip: bool,
    threshold: int,
    null_class: int,
    augmentation_levels: int | None,
    dropout_key: bool,
    dropped: bool,
    step: int,
) -> list[Tensor]:
    """Compute what `training_draws` specifies, by one pass of Philox over all streams.

    Arguments as there; `threshold` is that of dropped conditions. The results are those asked for,
    in the order of `Draws`.
    """
    wanted = {
        Stream.TRAINING_TIMESTEP: integers is not None,
        Stream.HORIZONTAL_FLIP: flip,
        Stream.LABEL_DROPOUT: labels is not None or dropped,
        Stream.AUGMENTATION_LEVEL: augmentation_levels is not None,
        Stream.DROPOUT: dropout_key,
    }
    streams = [stream for stream, is_wanted in wanted.items() if is_wanted]
    first, second = first_pairs(seed, positions, step, streams)
    words = dict(zip(streams, first, strict=True))
    drawn = []
    if integers is not None:
        drawn.append(_scaled(words[Stream.TRAINING_TIMESTEP], integers))
    if flip:
        drawn.append(words[Stream.HORIZONTAL_FLIP] < 2**31)
    if labels is not None:
        drawn.append(labels.masked_fill(words[Stream.LABEL_DROPOUT] < threshold, null_class))
    if augmentation_levels is not None:
        drawn.append(_scaled(words[Stream.AUGMENTATION_LEVEL], augmentation_levels))
    if dropout_key:
        drawn.append(words[Stream.DROPOUT] | second[-1] << 32)
    if dropped:
        drawn.append(words[Stream.LABEL_DROPOUT] < threshold)
    return drawn


def _scaled(words: Tensor, count: int) -> Tensor:
    """floor(w · count / 2³²): words int64 `[B]` to integers in [0, count), likewise."""
    # Of more than 2³¹ integers, the product may pass 2⁶³; its high half is right, but signed.
    return words * count >> 32 & 0xFFFFFFFF


# --- Triton


@triton.jit
def _scaled_words(word, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    return ((word.to(tl.uint64) * COUNT) >> 32).to(tl.int64)


@triton.jit
def _training_draws_kernel(  # type: ignore[no-untyped-def]
    integers_out,
    flip_out,
    labels_out,
    levels_out,
    keys_out,
    dropped_out,
    seed,
    positions,
    labels,
    batch,
    INTEGERS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    NULL_CLASS: tl.constexpr,
    LEVELS: tl.constexpr,
    STEP: tl.constexpr,
    OF_INTEGERS: tl.constexpr,
    OF_FLIP: tl.constexpr,
    OF_LABELS: tl.constexpr,
    OF_LEVELS: tl.constexpr,
    OF_KEYS: tl.constexpr,
    TILE: tl.constexpr,
):
    sample = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = sample < batch
    position = tl.load(positions + sample, mask=inside, other=0)
    key = tl.load(seed)
    if integers_out is not None:
        word, _ = first_pair(key, position, STEP, OF_INTEGERS)
        tl.store(integers_out + sample, _scaled_words(word, INTEGERS), mask=inside)
    if flip_out is not None:
        word, _ = first_pair(key, position, STEP, OF_FLIP)
        tl.store(flip_out + sample, 1 - (word >> 31).to(tl.uint8), mask=inside)
    if labels_out is not None or dropped_out is not None:
        word, _ = first_pair(key, position, STEP, OF_LABELS)
        dropped = word.to(tl.int64) < THRESHOLD
        if labels_out is not None:
            label = tl.load(labels + sample, mask=inside, other=0)
            tl.store(labels_out + sample, tl.where(dropped, NULL_CLASS, label), mask=inside)
        if dropped_out is not None:
            tl.store(dropped_out + sample, dropped.to(tl.uint8), mask=inside)
    if levels_out is not None:
        word, _ = first_pair(key, position, STEP, OF_LEVELS)
        tl.store(levels_out + sample, _scaled_words(word, LEVELS), mask=inside)
    if keys_out is not None:
        low, high = first_pair(key, position, STEP, OF_KEYS)
        tl.store(keys_out + sample, low.to(tl.int64) | high.to(tl.int64) << 32, mask=inside)


# --- Launcher


def _empty(
    seed: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    integers: int | None,
    flip: bool,
    threshold: int,
    null_class: int,
    augmentation_levels: int | None,
    dropout_key: bool,
    dropped: bool,
    step: int,
) -> list[Tensor]:
    """Memory for the results, in their order."""
    wanted = (
        (integers is not None, torch.int64),
        (flip, torch.bool),
        (labels is not None, torch.int64),
        (augmentation_levels is not None, torch.int64),
        (dropout_key, torch.int64),
        (dropped, torch.bool),
    )
    return [
        torch.empty(positions.shape, dtype=dtype, device=positions.device)
        for is_wanted, dtype in wanted
        if is_wanted
    ]


def _launch(*arguments: Any) -> list[Tensor]:
    (
        seed, positions, labels, integers, flip, threshold, null_class, levels, keys, dropped, step
    ) = arguments  # fmt: skip
    drawn = _empty(*arguments)
    left = iter(drawn)
    batch = len(positions)
    with on_device_of(positions):
        _training_draws_kernel[(triton.cdiv(batch, _TILE.elements),)](
            None if integers is None else next(left),
            packed(next(left)) if flip else None,
            None if labels is None else next(left),
            None if levels is None else next(left),
            next(left) if keys else None,
            packed(next(left)) if dropped else None,
            seed,
            packed(positions),
            packed(labels),
            batch,
            INTEGERS=integers or 0,
            THRESHOLD=threshold,
            NULL_CLASS=null_class,
            LEVELS=levels or 0,
            STEP=step,
            OF_INTEGERS=int(Stream.TRAINING_TIMESTEP),
            OF_FLIP=int(Stream.HORIZONTAL_FLIP),
            OF_LABELS=int(Stream.LABEL_DROPOUT),
            OF_LEVELS=int(Stream.AUGMENTATION_LEVEL),
            OF_KEYS=int(Stream.DROPOUT),
            TILE=_TILE.elements,
            **_TILE.options(),
        )
    return drawn


# --- Registration


def _training_draws(seed: Tensor, positions: Tensor, *rest: Any) -> list[Tensor]:
    run = _launch if runs_triton(positions) else training_draws_reference
    return run(seed, positions, *rest)


_op = torch.library.custom_op(
    "ddpm::training_draws",
    _training_draws,
    mutates_args=(),
    schema=torch.library.infer_schema(training_draws_reference, mutates_args=()),
)
_op.register_fake(_empty)
