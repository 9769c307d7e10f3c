"""What is read off the code that Triton's compiler makes of a kernel.

Instructions an element are counted as they stand in the text: those of each loop that moves global
memory, once around, or of the whole kernel where there is no such loop, divided by the elements of
a tile that one thread has. Both sides of a branch count, and so do rare ones: an upper bound of
what a thread issues. The bytes beside them are counted in the same way, of loads and stores.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ddpm_kernels.triton_shim import triton

_AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """A loop that moves global memory, or a whole kernel without one."""

    instructions: int
    """Once around."""
    moved_bits: int
    """Of one thread's loads and stores of global memory."""


@dataclass(frozen=True)
class Code:
    """What the compiler made of a launch for one target."""

    registers: int
    """Per thread (vector registers on AMD)."""
    spills: int
    """Instructions, or registers on AMD, that go to local memory because registers ran out."""
    local_bytes: int
    """Stack or scratch bytes per thread."""
    widest_load: int
    """Bits of the widest global load of one thread."""
    widest_store: int
    """Bits of the widest global store of one thread."""
    instructions: int
    """Instructions of the whole kernel, each counted once."""
    stretches: tuple[Stretch, ...]
    """In the order of the code."""


@dataclass(frozen=True)
class _Line:
    """An instruction, as far as it is of interest here."""

    loaded: int = 0
    """Bits that it loads from global memory."""
    stored: int = 0
    target: str | None = None
    """Label that it may jump to."""
    ends: bool = False
    """Whether what follows is not reached from here."""


def read_cubin(cubin: bytes) -> Code:
    """Read NVIDIA's machine code with the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        text = _nvidia_tool("nvdisasm", file.name)
    # A line has an address, an optional predicate, and the mnemonic with its modifiers.
    pattern = r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)(.*)"
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    spills = 0
    for label, predicate, name, operands in re.findall(pattern, text, re.M):
        if label:
            labels[label] = len(lines)
        elif name != "NOP":
            kind, bits = name.split(".")[0], _nvidia_bits(name)
            jump = re.search(r"`\((\.L_x_\d+)\)", operands) if kind == "BRA" else None
            lines.append(
                _Line(
                    loaded=bits if kind in ("LDG", "LDGSTS") else 0,
                    stored=bits if kind == "STG" else 0,
                    target=jump[1] if jump else None,
                    ends=kind in ("BRA", "EXIT", "RET") and not predicate,
                )
            )
            spills += kind in ("LDL", "STL")
    local_bytes = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    return _code(_number(r"REG:(\d+)", usage), spills, local_bytes, lines, labels)


def read_amdgcn(text: str) -> Code:
    """Read AMD's assembly."""
    code = text.split(".section", 1)[0]
    pattern = r"^(\.LBB\w+):|^\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)(.*)"
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    for label, name, operands in re.findall(pattern, code, re.M):
        if label:
            labels[label] = len(lines)
        elif name not in ("s_nop", "s_code_end"):
            access = re.match(r"(?:global|buffer|flat)_(load|store)_([a-z]+?(?:x\d)?)(?:_|$)", name)
            kind, bits = (access[1], _AMD_BITS.get(access[2], 0)) if access else ("", 0)
            lines.append(
                _Line(
                    loaded=bits if kind == "load" else 0,
                    stored=bits if kind == "store" else 0,
                    target=operands.split()[0] if "branch" in name else None,
                    ends=name in ("s_branch", "s_endpgm", "s_setpc_b64"),
                )
            )
    spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    spills += _number(r"\.sgpr_spill_count:\s+(\d+)|\Z", text)
    local_bytes = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return _code(_number(r"\.vgpr_count:\s+(\d+)", text), spills, local_bytes, lines, labels)


def _code(
    registers: int, spills: int, local_bytes: int, lines: list[_Line], labels: dict[str, int]
) -> Code:
    return Code(
        registers, spills, local_bytes,
        widest_load=max((line.loaded for line in lines), default=0),
        widest_store=max((line.stored for line in lines), default=0),
        instructions=len(lines),
        stretches=_stretches(lines, labels),
    )  # fmt: skip


def _stretches(lines: list[_Line], labels: dict[str, int]) -> tuple[Stretch, ...]:
    blocks, following = _blocks(lines, labels)
    loops: dict[int, set[int]] = {}
    before = _dominators(following)
    preceding: list[list[int]] = [[] for _ in blocks]
    for block, others in enumerate(following):
        for other in others:
            preceding[other].append(block)
    for block, others in enumerate(following):
        for head in others:
            # A jump back to what every way here has come through closes a loop.
            if block in before and head in before[block]:
                body, waiting = loops.setdefault(head, {head}), [block]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting += preceding[member]
    innermost = [
        body for head, body in sorted(loops.items())
        if not any(other in body for other in loops if other != head)
    ]  # fmt: skip
    found = [_stretch([line for i in sorted(body) for line in blocks[i]]) for body in innermost]
    return tuple(stretch for stretch in found if stretch.moved_bits) or (_stretch(lines),)


def _stretch(lines: list[_Line]) -> Stretch:
    return Stretch(len(lines), sum(line.loaded + line.stored for line in lines))


def _blocks(
    lines: list[_Line], labels: dict[str, int]
) -> tuple[list[list[_Line]], list[list[int]]]:
    """Split at jumps and at their targets; and where it goes on from each block."""
    jumps = {labels[line.target] for line in lines if line.target in labels}
    jumps |= {index + 1 for index, line in enumerate(lines) if line.target or line.ends}
    edges = sorted({0, *(each for each in jumps if each < len(lines)), len(lines)})
    number = {begin: index for index, begin in enumerate(edges)}
    blocks, following = [], []
    for begin, end in pairwise(edges):
        last = lines[end - 1]
        goes = [number[labels[last.target]]] if last.target in labels else []
        if not last.ends and end < len(lines):
            goes.append(number[end])
        blocks.append(lines[begin:end])
        following.append(goes)
    return blocks, following


def _dominators(following: list[list[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached from the first, those that all ways to it lead through."""
    through: dict[int, set[int]] = {0: {0}}
    waiting = [0]
    while waiting:
        block = waiting.pop()
        for other in following[block]:
            known = through[block] | {other}
            if other in through:
                known = through[other] & known
            if known != through.get(other):
                through[other] = known
                waiting.append(other)
    return through


def _nvidia_bits(name: str) -> int:
    # LDG.E.128 moves 128 bits, LDG.E 32, LDG.E.U16 16.
    size = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return int(size[1]) if size else 32


def _nvidia_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"nothing matches {pattern!r} in the compiler's output")
    return int(match[1] or 0)
