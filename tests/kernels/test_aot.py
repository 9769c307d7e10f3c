"""Every kernel compiles for every target, without spills, and moves memory in wide pieces.

What is compiled is what the operations would launch (`ddpm_kernels.aot`). The default run covers
one target in bfloat16; the rest of the matrix is marked slow.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_kernels.triton_shim import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)

from ddpm_kernels import group_norm_silu
from ddpm_kernels.aot import (
    TARGETS,
    Launch,
    compile_launch,
    production_launches,
    recorded_launches,
)

KERNELS = {
    "training_draws_kernel", "q_sample_kernel", "error_kernel", "loss_kernel",
    "reverse_step_kernel", "moments_kernel", "forward_kernel", "sums_kernel", "combine_kernel",
    "dx_kernel", "squares_kernel", "root_kernel", "begin_kernel", "update_kernel",
    "gaussian_noise_kernel",
}  # fmt: skip
STREAMING = {
    "q_sample_kernel", "error_kernel", "reverse_step_kernel", "forward_kernel", "dx_kernel",
    "update_kernel",
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
    for dtype in ("bfloat16", "float16", "float32")
    for aligned in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(("target", "dtype", "aligned"), MATRIX)
def test_compiles_without_spills(target: str, dtype: str, aligned: bool) -> None:
    launches = production_launches(getattr(torch, dtype), aligned, target)
    names = {launch.name for launch in launches}
    assert names == KERNELS if aligned else names >= KERNELS - {"moments_kernel", "combine_kernel"}
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
            assert code.widest_load == 128 or not target.startswith("sm_"), what


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


def norm_launches(shape: tuple[int, ...], x_needs_gradient: bool) -> list[str]:
    """Names of the kernels that a norm and its gradient launch, in their order."""
    x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    affine = torch.ones(shape[1], requires_grad=True)
    with recorded_launches("sm_90") as launches:
        group_norm_silu(x.requires_grad_(x_needs_gradient), 32, affine, affine).sum().backward()
    return [launch.name for launch in launches]


def test_what_a_norm_launches() -> None:
    two = ["forward_kernel", "sums_kernel", "dx_kernel"]
    assert norm_launches((128, 64, 4, 4), True) == two
    assert norm_launches((128, 64, 4, 4), False) == two  # of dx, the programs that sum over samples
    assert norm_launches((2, 64, 32, 32), True) == [
        "moments_kernel", "forward_kernel", "sums_kernel", "combine_kernel", "dx_kernel"
    ]  # fmt: skip
