"""What the roofline counts: instructions and bytes in assembly, and what torch moves.

Everything here is a count, the same on every machine.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ddpm_kernels.triton_shim import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton has no wheels for this platform", allow_module_level=True)

from ddpm_kernels.assembly import (
    Access,
    count_kinds,
    executed,
    read_accesses,
    read_amdgcn,
    read_sass,
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_roofline.py"

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
	//## File "/somewhere/step.py", line 7
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR6][R8.64] ;
        /*0020*/                   BSSY B0, `(.L_x_1) ;
        /*0030*/              @!P1 BRA `(.L_x_0) ;
        /*0040*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*0060*/                   MUFU.RSQ R3, R2 ;
.L_x_1:
	//## File "/somewhere/noise.py", line 9 inlined at "/somewhere/step.py", line 8
        /*0070*/                   IMAD.HI.U32 R5, R4, 0x7, RZ ;
        /*0080*/                   LOP3.LUT R6, R5, 0xff, RZ, 0xc0, !PT ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R8, R9, R8 ;
        /*00a0*/                   FFMA R1, R1, R2, R3 ;
        /*00b0*/                   STS.128 [R0+UR4], R8 ;
        /*00c0*/              @!P2 BRA `(.L_x_1) ;
	//## File "/somewhere/step.py", line 11
        /*00d0*/                   STG.E.U16 desc[UR6][R34.64], R12 ;
        /*00e0*/               @P0 EXIT ;
        /*00f0*/                   STG.E desc[UR6][R34.64+0x40], R12 ;
        /*0100*/                   EXIT ;
.L_x_2:
        /*0110*/                   BRA `(.L_x_2);
        /*0120*/                   NOP;
"""

AMDGCN = """
	.file	1 "/somewhere" "step.py"
	.loc	1 7 20                          ; step.py:7:20
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_1
	global_load_dwordx4 v[2:5], v[2:3], off
.LBB0_1:
	s_nop 0
	s_branch .LBB0_3
.LBB0_2:
	s_add_i32 s16, s16, 32
	s_cbranch_scc0 .LBB0_4
.LBB0_3:
	s_cbranch_execz .LBB0_2
	v_mul_hi_u32 v1, v2, v3
	v_xor_b32_e32 v1, v2, v3
	v_cvt_f32_u32_e32 v1, v2
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	v_sqrt_f32_e32 v1, v2
	ds_write_b32 v2, v0
	s_branch .LBB0_2
.LBB0_4:
	.loc	1 11 5
	buffer_store_short v1, v2, s[4:7], 0 offen
	s_endpgm
"""

TTGIR = """
#loc1 = loc("/somewhere/step.py":7:20)
#loc2 = loc("/somewhere/noise.py":3:4)
    %seed = tt.load %seed_ptr : !tt.ptr<i64> loc(#loc6)
    %x = tt.load %x_at, %inside, %zero : tensor<32x64x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %w = amdg.buffer_load %weight[%lane], %real {contiguity = 4 : i32} : tensor<64xf32> loc(#loc1)
#loc4 = loc("seed"(#loc2))
#loc5 = loc("/somewhere/step.py":1:1)
#loc6 = loc(callsite(#loc4 at #loc5))
"""


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_roofline", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_sass_kinds_and_bits() -> None:
    path = executed(read_sass(SASS))
    # The slow square root is passed by, and what pads the end is not reached.
    assert [i.name for i in path][:5] == ["LDC", "LDG.E.128", "BSSY", "BRA", "MUFU.RSQ"]
    assert path[-1].name == "EXIT"
    assert count_kinds(path) == {
        "integer": 1, "multiply": 1, "float": 1, "conversion": 1, "special": 1, "global": 3,
        "shared": 1, "other": 6,
    }  # fmt: skip
    assert [i.loads for i in path if i.loads] == [128]
    assert [i.stores for i in path if i.stores] == [16, 32]
    assert [i.line for i in path if i.kind == "global"] == [("step.py", n) for n in (7, 11, 11)]
    assert [i.line for i in path if i.kind == "float"] == [("noise.py", 9)]


def test_amdgcn_kinds_and_bits() -> None:
    path = executed(read_amdgcn(AMDGCN))
    assert count_kinds(path) == {
        "integer": 1, "multiply": 1, "float": 1, "conversion": 1, "special": 1, "global": 2,
        "shared": 1, "other": 9,
    }  # fmt: skip
    assert [i.loads for i in path if i.loads] == [128]
    assert [i.stores for i in path if i.stores] == [16]
    assert [i.line for i in path if i.kind == "global"] == [("step.py", 7), ("step.py", 11)]


@pytest.mark.parametrize("trips", [1, 2, 5])
def test_loops_run_as_often_as_told(trips: int) -> None:
    for listing in (read_sass(SASS), read_amdgcn(AMDGCN)):
        assert count_kinds(executed(listing, trips))["multiply"] == trips


def test_a_path_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="no end"):
        executed(read_sass(".L_x_0:\n        /*0000*/                   BRA `(.L_x_0) ;\n"))


def test_accesses_of_the_ir() -> None:
    assert read_accesses(TTGIR) == (
        Access(("noise.py", 3), 1, 64),
        Access(("step.py", 7), 2048, 16),
        Access(("step.py", 7), 64, 32),
    )


def test_eager_traffic(roofline: ModuleType) -> None:
    a, b = torch.zeros(6, 4, device="meta"), torch.zeros(6, 4, device="meta")
    n = a.numel()

    def count(function: object, *arguments: object) -> tuple[int, int, int, int]:
        traffic = roofline.eager_traffic((function, arguments))
        return (
            traffic.bytes, traffic.kernels, traffic.allocations, traffic.allocated_bytes,
        )  # fmt: skip

    assert count(torch.add, a, b) == (12 * n, 1, 1, 4 * n)
    assert count(torch.Tensor.add_, a, b) == (12 * n, 1, 0, 0)
    assert count(torch.Tensor.copy_, a, b) == (8 * n, 1, 0, 0)
    assert count(lambda x, y, out: torch.add(x, y, out=out), a, b, a.clone()) == (12 * n, 1, 0, 0)
    assert count(lambda x: x.T[1:].unsqueeze(0).detach(), a) == (0, 0, 0, 0)
    assert count(torch.empty_like, a) == (0, 0, 1, 4 * n)
    assert count(torch.randn_like, a) == (4 * n, 1, 1, 4 * n)
    assert count(torch.Tensor.bfloat16, a) == (6 * n, 1, 1, 2 * n)
    assert count(torch.Tensor.float, a) == (0, 0, 0, 0)
    # A value that is expanded is read once.
    assert count(torch.add, a, b[:, :1].expand(6, 4)) == (8 * n + 4 * 6, 1, 1, 4 * n)


def test_backward_is_counted(roofline: ModuleType) -> None:
    x = torch.zeros(10, device="meta", requires_grad=True)
    # Forward reads x and writes its exponential; backward reads that and dy, and writes dx.
    traffic = roofline.eager_traffic((torch.exp, (x,)))
    assert (traffic.bytes, traffic.kernels) == (10 * (8 + 12), 2)


def rows(roofline: ModuleType, name: str, target: str) -> tuple[object, float]:
    """An operation's row in bfloat16, and the textbook's bytes an element."""
    operation = next(one for one in roofline.OPERATIONS if one.name == name)
    row, _ = roofline.fused_row(operation, "bfloat16", target)
    eager = roofline.eager_traffic(operation.textbook(torch.bfloat16, "meta"))
    return row, eager.bytes / torch.Size(operation.shape).numel()


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_images_are_read_and_written_once(roofline: ModuleType, target: str) -> None:
    fused = textbook = 0.0
    for name in roofline.TOGETHER:
        row, eager = rows(roofline, name, target)
        assert row.bytes == row.compulsory_bytes  # type: ignore[attr-defined]
        assert row.other_bytes < 0.15  # type: ignore[attr-defined]
        fused, textbook = fused + row.bytes, textbook + eager  # type: ignore[attr-defined]
    assert textbook / fused >= roofline.LEAST_RATIO


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_normalisation_reads_its_input_twice_each_way(roofline: ModuleType, target: str) -> None:
    # Forward: x for the moments, x again and y. Backward: x and dy twice, and dx.
    row, _ = rows(roofline, "group_norm_silu + backward", target)
    assert row.bytes == 2 * (3 + 5)  # type: ignore[attr-defined]


def test_occupancy(roofline: ModuleType) -> None:
    from types import SimpleNamespace

    def occupancy(target: str, registers: int, threads: int, shared_bytes: int = 0) -> float:
        code = SimpleNamespace(registers=registers, threads=threads, shared_bytes=shared_bytes)
        return float(roofline.DEVICES[target].occupancy(code, 64 if target[0] == "g" else 32))

    assert occupancy("sm_90", 32, 128) == 1
    assert occupancy("sm_90", 33, 128) == 0.75  # 40 registers a thread: 12 warps a scheduler
    assert occupancy("sm_90", 32, 32) == 0.5  # 32 programs of a warp
    assert occupancy("sm_90", 32, 128, 75 << 10) == 3 * 4 / 64
    assert occupancy("gfx942", 64, 256) == 1
    assert occupancy("gfx942", 65, 256) == 7 / 8
