"""Dropout as a pure function: the same bits in kernels as in the reference."""

from __future__ import annotations

import math

import pytest
import torch
from tests.kernels.comparing import assert_equal
from tests.kernels.conftest import ON_KERNELS, Backend, Guarded

from ddpm_kernels import cpu_dropout
from ddpm_kernels.dropout import Dropout, dropout, keep_scale, keep_scale_of, random_bits
from ddpm_kernels.philox import philox4x32
from ddpm_kernels.triton_shim import tl, triton

KEY = torch.tensor([5, -(2**63), 2**40 + 17, 5])


@triton.jit
def _write_scales(  # type: ignore[no-untyped-def]
    out,
    key,
    pixels,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """One tile of `[N, pixels, CHANNELS]`: program numbers are sample, tile and chunk."""
    sample, first = tl.program_id(0), tl.program_id(1) * ROWS
    channel = tl.program_id(2) * CHUNK
    scales = keep_scale(
        tl.load(key + sample), first, channel, CHANNELS, CHUNK, ROWS, WIDTH, THRESHOLD
    )
    pixel, lane = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (pixel < pixels) & (lane < CHUNK) & (channel + lane < CHANNELS)
    tl.store(out + (sample * pixels + pixel) * CHANNELS + channel + lane, scales, inside)


@ON_KERNELS
@pytest.mark.parametrize(
    ("channels", "chunk", "width"),
    [(16, 16, 16), (40, 16, 16), (24, 12, 16), (7, 7, 8), (9, 5, 8), (12, 12, 16), (3, 1, 1)],
)
def test_tiles_multiply_by_what_the_reference_does(
    backend: Backend, guarded: Guarded, channels: int, chunk: int, width: int
) -> None:
    how = Dropout(0.3, KEY.to(backend.device))
    expected = keep_scale_of(torch.empty(len(KEY), channels, 3, 3, device=backend.device), how)
    out = guarded(torch.zeros(len(KEY), 9, channels))
    _write_scales[(len(KEY), 3, -(-channels // chunk))](
        out, how.key, 9,
        CHANNELS=channels, CHUNK=chunk, ROWS=4, WIDTH=width, THRESHOLD=how.threshold,
    )  # fmt: skip
    assert_equal(out, expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_an_element_has_its_half_of_a_word() -> None:
    bits = random_bits(KEY, 21)
    for sample, key in enumerate(KEY.tolist()):
        for element in (0, 1, 6, 7, 8, 20):
            counter = torch.tensor([element // 8, 0, 0, 0])
            halves = torch.tensor([key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF])
            words = philox4x32(counter, halves, rounds=7).tolist()
            half = words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF
            assert int(bits[sample, element]) == half


def test_a_sample_is_its_key_alone_in_any_batch_and_layout() -> None:
    x = torch.randn(4, 10, 3, 5)
    whole = dropout(x, Dropout(0.4, KEY))
    one = dropout(x[2:3], Dropout(0.4, KEY[2:3]))
    assert_equal(one, whole[2:3])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert_equal(dropout(channels_last, Dropout(0.4, KEY)), whole)
    assert_equal(whole[0] != 0, whole[3] != 0, "of one key")


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_kept(probability: float) -> None:
    n, shape = 16, (16, 32, 16, 16)
    key = torch.arange(n) * 2**33 + 7
    kept = torch.stack(
        [keep_scale_of(torch.empty(shape), Dropout(probability, key + layer)) for layer in range(4)]
    )
    mean = kept.double().mean((2, 3, 4))  # of a key
    deviation = math.sqrt(probability / (1 - probability) / (32 * 16 * 16))
    assert (mean - 1).abs().max() < 4.5 * deviation
    assert (mean - 1).square().mean().sqrt() == pytest.approx(deviation, rel=0.35)


def test_samples_and_elements_are_independent() -> None:
    """Correlations of 2¹⁵ elements' masks, which are within 4.5 / sqrt(2¹⁵) of zero."""
    x = torch.empty(8, 32, 32, 32)
    # Keys as close as they can be: of one bit's difference.
    key = torch.tensor([0, 1, 2, 3, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)])
    keys = [key + (k << 8) for k in range(3)]
    masks = torch.cat([(keep_scale_of(x, Dropout(0.5, own)) - 1).flatten(1) for own in keys])
    shifted = torch.cat([masks, *(masks[:1].roll(by, 1) for by in (1, 2, 4, 8, 32, 1024))])
    correlation = torch.corrcoef(shifted) - torch.eye(len(shifted))
    assert correlation.abs().max() < 4.5 / math.sqrt(masks.shape[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(5, 8, 3, 7), (3, 16, 1, 1), (2, 24, 9, 8), (0, 8, 2, 2)])
def test_a_cpu_takes_blocks_to_the_same_values(
    monkeypatch: pytest.MonkeyPatch, threads: int, shape: tuple[int, ...]
) -> None:
    """Whole samples, parts of one, and one plane of eight channels that is larger than a block."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    key = torch.cat([KEY, -KEY])[: shape[0]]
    x = torch.empty(shape)
    for block in (2**15, 72, 7):
        monkeypatch.setattr(cpu_dropout, "COUNTERS_A_THREAD", block)
        for probability in (0.0, 0.1, 0.5, 0.99999):
            how = Dropout(probability, key)
            scales = keep_scale_of(x, how)
            assert scales.is_contiguous()
            assert_equal(scales.double(), keep_scale_of(x.double(), how).float().double())


def test_the_gradient_is_that_of_a_product() -> None:
    x = torch.randn(4, 10, 3, 5, dtype=torch.float64, requires_grad=True)
    how = Dropout(0.4, KEY)
    (gradient,) = torch.autograd.grad(dropout(x, how).square().sum(), x)
    scales = keep_scale_of(x, how)
    assert_equal(gradient, (2 * x * scales * scales).detach())


def test_half_precision_rounds_once() -> None:
    x = torch.randn(4, 8, 3, 5).to(torch.bfloat16)
    how = Dropout(0.1, KEY)
    assert_equal(dropout(x, how), (x.float() * keep_scale_of(x, how)).to(torch.bfloat16))


def test_probabilities_at_the_ends() -> None:
    x = torch.ones(4, 8, 3, 5)
    assert_equal(dropout(x, Dropout(0.0, KEY)), x)
    assert dropout(x, Dropout(1 - 1e-9, KEY)).isfinite().all()
    with pytest.raises(ValueError, match=r"probability is 1\.0; it must be in \[0, 1\)"):
        Dropout(1.0, KEY)


def test_keys_of_another_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"key has shape \(4,\); it must be \(2,\)"):
        dropout(torch.ones(2, 8, 3, 5), Dropout(0.1, KEY))
