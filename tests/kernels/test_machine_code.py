"""What is read off assembly: sizes of accesses, and loops wherever their blocks lie."""

from __future__ import annotations

from textwrap import dedent

from ddpm_kernels.machine_code import Stretch, read_amdgcn

TAIL = dedent("""\
    .section .AMDGPU.csdata
        .vgpr_count: 24
        .vgpr_spill_count: 0
        .sgpr_spill_count: 0
        .private_segment_fixed_size: 0
    """)


def of_text(code: str) -> tuple[Stretch, ...]:
    return read_amdgcn(dedent(code) + TAIL).stretches


def test_a_loop_is_counted_once_around() -> None:
    code = """\
        \ts_load_dwordx2 s[0:1], s[2:3], 0x0
        .LBB0_1:
        \tglobal_load_dwordx4 v[0:3], v[4:5], off
        \tv_add_f32 v0, v0, v1
        \ts_nop 0
        \tglobal_store_short v[4:5], v0, off
        \ts_cbranch_scc1 .LBB0_1
        \ts_endpgm
        """
    assert of_text(code) == (Stretch(4, 128 + 16),)


def test_without_a_loop_the_whole_counts() -> None:
    code = """\
        \tbuffer_load_dword v0, v1, s[0:3], 0 offen
        \ts_cbranch_execz .LBB0_2
        \tbuffer_store_dword v0, v1, s[0:3], 0 offen
        .LBB0_2:
        \ts_endpgm
        """
    assert of_text(code) == (Stretch(4, 64),)


def test_a_loop_that_moves_nothing_is_no_stretch() -> None:
    code = """\
        .LBB0_1:
        \tv_add_f32 v0, v0, v1
        \ts_cbranch_scc1 .LBB0_1
        \tglobal_store_dword v[4:5], v0, off
        \ts_endpgm
        """
    assert of_text(code) == (Stretch(4, 32),)


def test_a_block_set_aside_belongs_to_its_loop_and_makes_none() -> None:
    """Where a rare block lies behind the end and jumps back, nothing is gone around twice."""
    code = """\
        \ts_cbranch_scc1 .LBB0_3
        .LBB0_1:
        \tglobal_load_dwordx2 v[0:1], v[4:5], off
        \ts_cbranch_vccnz .LBB0_4
        .LBB0_2:
        \ts_cbranch_scc0 .LBB0_1
        \ts_endpgm
        .LBB0_3:
        \tglobal_load_dword v0, v[4:5], off
        \ts_branch .LBB0_1
        .LBB0_4:
        \tglobal_store_dword v[4:5], v0, off
        \ts_branch .LBB0_2
        """
    assert of_text(code) == (Stretch(5, 64 + 32),)


def test_of_nested_loops_the_inner_counts() -> None:
    code = """\
        .LBB0_1:
        \tglobal_load_dword v0, v[4:5], off
        .LBB0_2:
        \tglobal_load_dword v0, v[4:5], off
        \ts_cbranch_scc1 .LBB0_2
        \ts_cbranch_scc0 .LBB0_1
        \ts_endpgm
        """
    assert of_text(code) == (Stretch(2, 32),)
