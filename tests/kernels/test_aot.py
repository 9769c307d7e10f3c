"""Every kernel compiles for every target, without spills, and moves memory in wide pieces.

What is compiled is what the operations would launch (`ddpm_kernels.aot`). The default run covers
one target in bfloat16; the rest of the matrix is marked slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_kernels.triton_shim import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)

from ddpm_kernels import group_norm_silu, group_norm_silu_residual
from ddpm_kernels.aot import (
    TARGETS,
    Launch,
    compile_launch,
    production_launches,
    recorded_launches,
)

KERNELS = {
    "modulate_kernel", "modulate_backward_kernel", "modulate_sums_kernel",
    "training_draws_kernel", "q_sample_kernel", "error_kernel", "loss_kernel",
    "reverse_step_kernel", "moments_kernel", "forward_kernel", "sums_kernel", "combine_kernel",
    "dx_kernel", "on_chip_kernel", "totals_kernel", "squares_kernel", "root_kernel",
    "begin_kernel", "update_kernel", "gaussian_noise_kernel", "residual_sum_kernel",
}  # fmt: skip
STREAMING = {
    "modulate_kernel", "modulate_backward_kernel",
    "q_sample_kernel", "error_kernel", "reverse_step_kernel", "forward_kernel", "dx_kernel",
    "on_chip_kernel", "update_kernel", "residual_sum_kernel",
}  # fmt: skip
"""Read and write whole images or activations. The others move a few numbers per sample."""

MATRIX = [
    pytest.param(
        target, dtype, aligned,
        id=f"{target}-{dtype}-{'aligned' if aligned else 'unaligned'}",
        marks=() if target == "gfx942" and dtype == "bfloat16" and aligned
        else pytest.mark.slow,
    )
    for target in TARGETS
    # Every precision and both alignments; `python -m ddpm_kernels.aot` compiles all together.
    for dtype, aligned in (("bfloat16", True), ("float16", False), ("float32", True))
]  # fmt: skip


@pytest.mark.parametrize(("target", "dtype", "aligned"), MATRIX)
def test_compiles_without_spills(target: str, dtype: str, aligned: bool) -> None:
    launches = production_launches(getattr(torch, dtype), aligned, target)
    names = {launch.name for launch in launches}
    assert names == KERNELS
    for launch in launches:
        what = f"{launch.name} {dict(launch.signature)} {dict(launch.constants)}"
        code = compile_launch(launch, target)
        assert code.instructions > 0
        assert (code.local_bytes, code.spills) == (0, 0), what
        # A predicted variance lies between the pixels of the mean: four channels at a time.
        learned = launch.name == "error_kernel" and "bound_table" not in dict(launch.constants)
        if aligned and launch.name == "gaussian_noise_kernel":
            assert code.widest_store == 128, what
        if aligned and launch.name in STREAMING and not learned:
            assert code.widest_store == 128, what
            # Moments lie channels first, and the elements of a thread channels last.
            drawn = launch.name == "q_sample_kernel" and launch.variant == "latents"
            if target.startswith("sm_") and not drawn:
                assert code.widest_load == 128, what


def test_alignment_is_told_apart() -> None:
    def aligned_pointers(launches: list[Launch]) -> set[str]:
        return {
            launch.signature[index][0]
            for launch in launches
            for index in launch.aligned
            if launch.signature[index][1].startswith("*")
        }

    pointers = {"images", "output_ptr", "prediction"}
    assert pointers <= aligned_pointers(production_launches(torch.bfloat16, True, "sm_90"))
    assert not pointers & aligned_pointers(production_launches(torch.bfloat16, False, "sm_90"))


def norm_launches(
    shape: tuple[int, ...], skip: int = 0, before: bool = False, dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """Names of the kernels that a norm and its gradient launch, in their order.

    With residual gradients and owed biases, of x of a shape and skip of so many channels.
    """

    def map_of(channels: int) -> Tensor:
        size = (shape[0], channels, *shape[2:])
        x = torch.zeros(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return x.requires_grad_()

    affine, owed = torch.ones(shape[1] + skip, requires_grad=True), torch.zeros(shape[1])
    with recorded_launches("sm_90") as launches:
        outputs = group_norm_silu_residual(
            map_of(shape[1]), 32, affine, affine, skip=map_of(skip) if skip else None,
            before=torch.zeros(shape[0], shape[1] + skip, requires_grad=True) if before else None,
            owed=(owed.requires_grad_(), None),
        )  # fmt: skip
        given = [one for one in outputs if one is not None]
        torch.autograd.backward(given, [torch.ones_like(one) for one in given])
    return [launch.name for launch in launches]


def test_what_a_norm_launches() -> None:
    for fused in ({}, {"skip": 64}, {"before": True}):
        on_chip = ["forward_kernel", "on_chip_kernel", "totals_kernel"]
        assert norm_launches((128, 64, 4, 4), **fused) == on_chip
        assert norm_launches((2, 64, 32, 32), **fused) == on_chip
        once = ["forward_kernel", "sums_kernel", "dx_kernel", "totals_kernel"]
        assert norm_launches((300, 64, 33, 32), **fused) == once
        assert norm_launches((2, 64, 64, 64), **fused) == [
            "moments_kernel", "forward_kernel", "sums_kernel", "combine_kernel", "dx_kernel",
            "totals_kernel",
        ]  # fmt: skip


def test_a_norm_whose_input_needs_no_gradient_does_not_write_one() -> None:
    x = torch.zeros(2, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    affine = torch.ones(64, requires_grad=True)
    with recorded_launches("sm_90") as launches:
        group_norm_silu(x, 32, affine, affine).sum().backward()
    assert "dx_kernel" not in {launch.name for launch in launches}
