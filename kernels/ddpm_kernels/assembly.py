"""Reading what the compiler made: NVIDIA's SASS, AMD's assembly, and the accesses in Triton's IR.

A listing is a kernel's instructions in order. `executed` follows it as a thread does whose work is
not special: lanes are never all masked, slow paths (which call a subroutine) are not entered, loops
run as often as it is told, and of an `if` without an `else` the body runs. Instructions that fill
time or space (NOP) are left out everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

KINDS = (
    "integer",  # addition, logic, shifts; comparison and selection of any type
    "multiply",  # of integers, with or without addition; ptxas also makes it move and shift
    "float",
    "conversion",
    "special",  # reciprocal, square root, exponential, logarithm
    "global",
    "shared",  # and exchange between the lanes of a warp
    "other",  # control, waiting, constants, and what a warp does once for all its lanes
)

Line = tuple[str, int]
"""Name of a source file, and line in it."""

LONGEST_PATH = 200_000
"""Instructions after which a path that has not ended is taken to be misread."""

_SASS_KINDS = {
    "special": r"MUFU",
    "conversion": r"[IF]2[IF]|[IF]2[IF]P|FRND",
    "global": r"LDG|STG|LDGSTS|ATOMG|RED",
    "shared": r"LDS|STS|LDSM|STSM|SHFL|ATOMS|MOVM",
    "multiply": r"IMAD|IMUL|IDP",
    "float": r"[FH](ADD|MUL|FMA|MMA)2?(_MMA)?",
    "integer": (
        r"V?I(ADD|MNMX|SETP|ABS|NEG)\w*|VIADDMNMX|P?LOP3|LEA|SHF|SHL|SHR|SEL|PRMT|SGXT|BMSK|POPC|FLO"
        r"|BREV|ISCADD|P2R|R2P|VOTE|[FH](SETP|SEL|SET|MNMX)[23]?|FCHK"
    ),
}
_AMD_KINDS = {
    "special": r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_\w+",
    "conversion": r"v_cvt_\w+",
    "global": r"(global|buffer|flat)_\w+",
    "shared": r"ds_\w+",
    "multiply": r"v_(mul_(lo|hi)|mad_[ui]64)_\w+",
    "float": r"v_(pk_)?(add|sub|subrev|mul|fma\w*|mad|ldexp|div_\w+)_(legacy_)?f\d\d\w*",
    "integer": r"v_\w+",
}
_AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction of a listing."""

    name: str
    """Mnemonic with its modifiers."""
    conditional: bool = False
    """Whether it is predicated, or a branch with a condition."""
    target: int | None = None
    """Index in the listing to which it branches."""
    line: Line | None = None
    """The innermost source line it comes from."""

    @cached_property
    def kind(self) -> str:
        """One of `KINDS`."""
        amd = self.name[0].islower()
        name = self.name if amd else self.name.split(".")[0]
        table = _AMD_KINDS if amd else _SASS_KINDS
        return next((kind for kind, names in table.items() if re.fullmatch(names, name)), "other")

    @cached_property
    def loads(self) -> int:
        """Bits that a lane reads from global memory."""
        return self._bits("LDG", "load")

    @cached_property
    def stores(self) -> int:
        """Bits that a lane writes to global memory."""
        return self._bits("STG", "store")

    def _bits(self, sass: str, amd: str) -> int:
        if self.name.split(".")[0] == sass:
            # LDG.E.128 has 128, LDG.E 32, LDG.E.U16 16.
            match = re.search(r"\.[US]?(8|16|64|128|256)\b", self.name)
            return int(match[1]) if match else 32
        match = re.match(rf"(?:global|buffer|flat)_{amd}_([a-z]+?(?:x\d)?)(?:_|$)", self.name)
        return _AMD_BITS.get(match[1], 0) if match else 0

    @property
    def _ends(self) -> bool:
        return self.name in ("EXIT", "s_endpgm") and not self.conditional


@dataclass(frozen=True)
class Access:
    """A load or store in Triton's IR."""

    line: Line | None
    elements: int
    """1 of a scalar, whichever threads share it."""
    bits: int
    """Of an element."""


def read_sass(text: str) -> list[Instruction]:
    """The listing in the output of `nvdisasm -g`."""
    # A line has an address, an optional predicate, the mnemonic and operands.
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)(.*)")
    source = re.compile(r'\s*//## File "(.*?)", line (\d+)')
    found: list[tuple[Instruction, str | None]] = []
    labels: dict[str, int] = {}
    line: Line | None = None
    for row in text.splitlines():
        if match := re.match(r"(\.L\w+):", row):
            labels[match[1]] = len(found)
        elif match := source.match(row):
            line = (PurePosixPath(match[1]).name, int(match[2]))
        elif (match := instruction.match(row)) and match[2] != "NOP":
            predicate, name, operands = match.groups()
            # ptxas also calls places in the kernel that end it; subroutines have other names.
            branches = name.startswith(("BRA", "CALL"))
            branch = re.search(r"(.*)`\((\.L\w+)\)", operands) if branches else None
            conditional = bool(predicate or (branch and re.search(r"U?P[\dT]|UR", branch[1])))
            found.append((Instruction(name, conditional, line=line), branch and branch[2]))
    return _with_targets(found, labels)


def read_amdgcn(text: str) -> list[Instruction]:
    """The listing in AMD's assembly."""
    instruction = re.compile(r"\s+((?:[vs]|ds|global|buffer|flat|scratch)_\w+)(.*)")
    found: list[tuple[Instruction, str | None]] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    line: Line | None = None
    for row in text.splitlines():
        if match := re.match(r"(\.LBB\w+):", row):
            labels[match[1]] = len(found)
        elif match := re.match(r'\s+\.file\s+(\d+) (?:".*" )?"(.*?)"', row):
            files[match[1]] = PurePosixPath(match[2]).name
        elif match := re.match(r"\s+\.loc\s+(\d+) (\d+)", row):
            line = (files[match[1]], int(match[2]))
        elif (match := instruction.match(row)) and match[1] not in ("s_nop", "s_code_end"):
            branch = re.search(r"\.LBB\w+", match[2]) if "branch" in match[1] else None
            conditional = match[1].startswith("s_cbranch")
            found.append((Instruction(match[1], conditional, line=line), branch and branch[0]))
    return _with_targets(found, labels)


def _with_targets(
    found: Sequence[tuple[Instruction, str | None]], labels: dict[str, int]
) -> list[Instruction]:
    return [
        Instruction(one.name, one.conditional, labels[label] if label else None, one.line)
        for one, label in found
    ]


def read_accesses(ttgir: str) -> tuple[Access, ...]:
    """The loads and stores of global memory in Triton's GPU IR."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))

    def line_of(place: str) -> Line | None:
        # A place is a file and line, or wraps others: the callee, or what a name stands for, first.
        if match := re.match(r'"(.*)":(\d+):\d+', places[place]):
            return PurePosixPath(match[1]).name, int(match[2])
        match = re.search(r"#loc\d*", places[place])
        return line_of(match[0]) if match else None

    pattern = (
        r"^ +(?:%\w+ = )?(?:tt|amdg|amdgpu)\.(?:buffer_)?(?:load|store) .*"
        r" : (?:tensor<([\dx]+)x)?(?:!tt\.ptr<)?[a-z]+(\d+)\b.* loc\((#loc\d*)\)$"
    )
    accesses = []
    for shape, bits, place in re.findall(pattern, ttgir, re.M):
        elements = 1
        for size in filter(None, shape.split("x")):
            elements *= int(size)
        accesses.append(Access(line_of(place), elements, int(bits)))
    return tuple(accesses)


def executed(listing: Sequence[Instruction], trips: int = 1) -> list[Instruction]:
    """The instructions that one thread executes, in order.

    Args:
        listing: of the kernel.
        trips: how often each loop runs; 0 passes them by where the code can.

    Raises:
        ValueError: the path does not end.
    """
    path: list[Instruction] = []
    visits: Counter[int] = Counter()
    at = 0
    while at < len(listing) and len(path) < LONGEST_PATH:
        path.append(listing[at])
        if listing[at]._ends:
            return path
        visits[at] += 1
        if _is_taken(listing, at, visits[at], trips):
            at = listing[at].target or 0
        else:
            at += 1
    raise ValueError("the kernel's code has no end that can be reached")


def _is_taken(listing: Sequence[Instruction], at: int, visit: int, trips: int) -> bool:
    """Whether the instruction branches when it is met for the `visit`-th time."""
    branch = listing[at]
    if branch.target is None:
        return False
    if not branch.conditional:
        return True
    forward = branch.target > at
    if branch.name == "s_cbranch_execz" or branch.name.startswith("BRA.DIV"):
        return False
    if branch.name == "s_cbranch_execnz":
        return forward
    if not forward:
        return visit < trips
    for back in range(at + 1, branch.target):
        # The exit of a loop that ends in an unconditional branch backwards.
        start = listing[back].target
        if start is not None and start <= at and not listing[back].conditional:
            return visit >= trips
    return _is_detour(listing, at)


def _is_detour(listing: Sequence[Instruction], at: int) -> bool:
    """Whether what follows a branch is a slow path, or a way round a loop."""
    past = listing[at].target or 0
    for index in range(at + 1, past):
        after = listing[index].target
        if listing[index].name.startswith("CALL") and after is None:
            return True
        if after is not None:
            round_it = not listing[index].conditional and index == past - 1 and after > past
            return round_it and _has_loop(listing, past, after)
    return False


def _has_loop(listing: Sequence[Instruction], start: int, stop: int) -> bool:
    targets = ((index, listing[index].target) for index in range(start, stop))
    return any(target is not None and start <= target <= index for index, target in targets)


def count_kinds(path: Iterable[Instruction]) -> dict[str, int]:
    """How many instructions of each kind there are."""
    counts = Counter(instruction.kind for instruction in path)
    return {kind: counts[kind] for kind in KINDS}
