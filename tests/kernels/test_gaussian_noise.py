"""Noise in one launch: that of the counter map, for every stream, step and place."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.comparing import (
    EPS32,
    assert_equal,
    assert_within,
    reference_noise,
)
from tests.kernels.conftest import ON_OPERATIONS, Backend, Guarded
from tests.watching import OnTheHost
from torch import Tensor

from ddpm_kernels import Stream, gaussian_noise
from ddpm_kernels.dispatch import force_ops
from ddpm_kernels.tiles import TILES

IDS = torch.tensor([0, 2**32 - 1, 2**56 - 1])
TILE = TILES["default"]["q_sample"].elements
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 1, TILE - 1), (2, 3, TILE // 6), (1, 2, TILE + 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_that_of_the_counter_map(
    backend: Backend, poisoned: list[Tensor], shape: tuple[int, int, int]
) -> None:
    ids = IDS.to(backend.device)
    for seed, step, stream in (
        (2**63 - 1, 0, Stream.INITIAL_NOISE),
        (-5, 2**32 - 1, Stream.KNOWN_NOISE),
    ):
        noise = gaussian_noise(seed, ids, shape, step, stream)
        expected = reference_noise(seed, IDS, shape, step, stream).double()
        assert_within(noise, expected, 4 * EPS32 * expected.abs())
        assert noise.stride() == expected.stride()


def test_seed_and_step_may_be_on_the_device(backend: Backend, guarded: Guarded) -> None:
    shape, ids = (3, 4, 5), IDS.to(backend.device)
    expected = gaussian_noise(7, ids, shape, 31, Stream.RESAMPLING_NOISE)
    seed, step = guarded(torch.tensor([7, 9]))[0], guarded(torch.tensor([30, 31]))[1]
    strided = guarded(torch.stack([IDS, IDS + 1], dim=1))[:, 0]
    noise = gaussian_noise(seed, strided, shape, step, Stream.RESAMPLING_NOISE)
    assert_equal(noise, expected)


def test_a_sample_does_not_depend_on_its_batch(backend: Backend) -> None:
    ids = IDS.to(backend.device)
    whole = gaussian_noise(3, ids, (3, 17, 23), 1, Stream.INITIAL_NOISE)
    one = gaussian_noise(3, ids[1:2], (3, 17, 23), 1, Stream.INITIAL_NOISE)
    assert_equal(one[0], whole[1])
    assert gaussian_noise(3, ids[:0], (3, 4, 5), 1, Stream.INITIAL_NOISE).shape == (0, 3, 4, 5)


@ON_OPERATIONS
def test_opcheck(backend: Backend) -> None:
    seed, step = (torch.tensor(k, device=backend.device) for k in (3, 1))
    torch.library.opcheck(
        torch.ops.ddpm.gaussian_noise.default,
        (seed, IDS.to(backend.device), 3, 4, 5, step, int(Stream.INITIAL_NOISE)),
    )


def test_it_takes_nothing_from_the_host() -> None:
    """Meta tensors stand for those of a GPU."""
    ids = torch.zeros(4, dtype=torch.int64, device="meta")
    with force_ops(), OnTheHost() as host:
        gaussian_noise(3, ids, (3, 4, 5), 0, Stream.INITIAL_NOISE)
    assert host.found == []
