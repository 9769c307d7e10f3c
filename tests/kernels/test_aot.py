"""Every kernel compiles for every target, without spills, and moves memory in wide pieces.

What is compiled is what the operations would launch (`ddpm_kernels.aot`). The default run covers
one target of each vendor in bfloat16; the rest of the matrix is marked slow.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_kernels.triton_shim import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)

from ddpm_kernels.aot import TARGETS, Launch, compile_launch, production_launches

KERNELS = {
    "q_sample_kernel", "error_kernel", "loss_kernel", "reverse_step_kernel", "moments_kernel",
    "forward_kernel", "sums_kernel", "combine_kernel", "dx_kernel",
}  # fmt: skip

# Kernels that read and write whole images or activations. The others move a few numbers a sample.
STREAMING = {
    "q_sample_kernel",
    "error_kernel",
    "reverse_step_kernel",
    "forward_kernel",
    "dx_kernel",
}

DTYPES = ("bfloat16", "float16", "float32")
MATRIX = [
    pytest.param(
        target,
        dtype,
        id=f"{target}-{dtype}",
        marks=() if target in ("sm_90", "gfx942") and dtype == "bfloat16" else pytest.mark.slow,
    )
    for target in TARGETS
    for dtype in DTYPES
]


def describe(launch: Launch) -> str:
    return f"{launch.name} {dict(launch.signature)} {dict(launch.constants)}"


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(("target", "dtype"), MATRIX)
def test_compiles_without_spills(target: str, dtype: str, aligned: bool) -> None:
    launches = production_launches(getattr(torch, dtype), aligned, target)
    assert {launch.name for launch in launches} >= KERNELS - {"moments_kernel"}
    for launch in launches:
        code = compile_launch(launch, target)
        assert code.instructions > 0
        assert code.local_bytes == 0, describe(launch)
        assert code.spills == 0, describe(launch)
        # A predicted variance lies between the pixels of the mean: four channels at a time.
        together = not (launch.name == "error_kernel" and dict(launch.constants)["LEARNED"])
        if aligned and launch.name in STREAMING and together:
            assert code.widest_store == 128, describe(launch)
            assert code.widest_load == 128 or not target.startswith("sm_"), describe(launch)


def test_the_matrix_covers_every_kernel() -> None:
    launches = production_launches(torch.bfloat16, aligned=True, target="sm_90")
    assert {launch.name for launch in launches} == KERNELS


def test_alignment_is_told_apart() -> None:
    aligned = production_launches(torch.bfloat16, aligned=True, target="sm_90")
    unaligned = production_launches(torch.bfloat16, aligned=False, target="sm_90")

    def aligned_pointers(launches: list[Launch]) -> set[str]:
        return {
            launch.signature[index][0]
            for launch in launches
            for index in launch.aligned
            if launch.signature[index][1].startswith("*")
        }

    assert {"images", "x", "output_ptr", "prediction"} <= aligned_pointers(aligned)
    assert not {"images", "output_ptr", "prediction"} & aligned_pointers(unaligned)
