"""Command lines of every script: what `--help` says, and what is said of a mistake."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS, LINES = 100, 64
"""The window that a section of the help must fit into."""

SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "goldens.py"  # argparse, since it runs on the engine of other commits
]
PARTS = {
    "launch/checkpoints.py": ["list", "verify", "prune", "average", "ema"],
    "launch/make_shards.py": ["index", "verify"],
}
"""Scripts with commands that have a help of their own."""
HELPS = [
    *((script,) for script in [*SCRIPTS, "benchmarks/gpu/__main__.py"]),
    *((script, part) for script, parts in PARTS.items() for part in parts),
]


@dataclass(frozen=True)
class Ended:
    """How a script left."""

    status: int
    said: str
    """On both streams, without the frames of boxes."""


Call = Callable[..., Ended]


@cache
def module_of(script: str) -> ModuleType:
    name = script.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(f"{name}_as_script", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Call:
    """Run a script's `main` in this process, where torch is loaded once for all."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: str) -> Ended:
        main = module_of(script).main
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as left:
            sys.exit(main())
        caught = capfd.readouterr()
        status = left.value.code
        assert isinstance(status, int) or status is None
        assert list(tmp_path.iterdir()) == []
        return Ended(status or 0, caught.out + caught.err)

    return run


def sections(text: str) -> dict[str, list[str]]:
    """Lines of each box of a help text, its frame not among them."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.startswith("╭"):
            current = found.setdefault(line.strip("╭─╮ "), [])
        elif line.startswith("│"):
            current.append(line.strip("│").rstrip())
    return found


def flags(lines: list[str]) -> dict[str, str]:
    """Help of each flag, or positional argument, of a section."""
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if re.match(r" (-|[A-Z]{2,} )", line):
            name = line.split()[0].rstrip(",")
            found[name] = re.sub(r"^ \S+( {[^}]*}| \[.*\]\]*| [A-Z,.|{}]+)*", "", line)
        elif name:
            found[name] += f" {line.strip()}"
    return found


def flags_of(text: str) -> list[str]:
    """Every long flag that a help text explains."""
    names = [name for lines in sections(text).values() for name in flags(lines)]
    return [name for name in names if name.startswith("--")]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help(command: tuple[str, ...], call: Call) -> None:
    """Every section fits a screen; every flag says what it is, and its default or that it must be
    given."""
    script, *part = command
    ended = call(script, *part, "--help")
    assert ended.status == 0
    if "gpu" in script:  # argparse, since nothing else is installed where it runs
        assert len(ended.said.splitlines()) <= LINES
        assert ended.said.count("(default: ") == 3
        return
    assert sections(ended.said)
    for name, lines in sections(ended.said).items():
        assert max(map(len, lines)) <= COLUMNS
        assert len(lines) + 2 <= LINES, f"{name}: {len(lines) + 2} lines"
        if name == "subcommands":
            continue
        for flag, text in flags(lines).items():
            if flag != "-h":
                described = re.fullmatch(r"(.*)\((default: .+|required)\)\s*", text)
                assert described is not None, f"{flag}:{text}"
                assert described[1].strip(), f"{flag} says nothing"


NEEDED = {
    "launch/distill.py": ["--teacher", "x", "--out", "y"],
    "launch/sample.py": ["--checkpoint", "x", "--out", "y"],
    "launch/export.py": ["--checkpoint", "x", "--out", "y"],
    "launch/visualize.py": ["--out", "y"],
    "launch/make_shards.py": ["digits", "--out", "y"],
    "launch/checkpoints.py": ["prune", "x"],
}
"""What a script must be given, so that a mistake is all that is wrong."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_is_answered_with_the_right_one(script: str, call: Call) -> None:
    needed = NEEDED.get(script, [])
    part = needed[:1] if script in PARTS and needed[0] in PARTS[script] else []
    known = flags_of(call(script, *part, "--help").said)
    assert known
    for flag in (known[0], max(known, key=len)):
        middle = (len(flag) + 2) // 2
        mistyped = flag[:middle] + flag[middle + 1 :]
        at = needed.index(flag) if flag in needed else len(needed)
        ended = call(script, *needed[:at], *needed[at + 2 :], mistyped, "3")
        assert ended.status == 2
        assert mistyped in ended.said
        assert re.search(rf"{re.escape(flag)}(?![\w.-])", ended.said), ended.said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["launch/train.py", "--sampel-steps", "3"], ["--log.sample-steps", "--sampling.steps"]),
        (["launch/distill.py", "--teachr", "x", "--out", "y"], ["--teacher PATH"]),
        (["launch/checkpoints.py", "prun", "x"], ["prune"]),
        (["launch/make_shards.py", "indx", "x"], ["did you mean index"]),
        (["benchmarks/gpu/__main__.py", "--bugdet"], ["did you mean --budget"]),
    ],
    ids=lambda value: value[1] if len(value) > 1 else "",
)
def test_mistakes(arguments: list[str], expected: list[str], call: Call) -> None:
    ended = call(*arguments)
    assert ended.status == 2
    for words in expected:
        assert words in ended.said


POSITIVE = "it must be at least 1"


@pytest.mark.parametrize(
    ("script", "flag", "value", "allowed"),
    [
        ("launch/train.py", "--preset", "digitz", "'digits', 'digits-classes'"),
        ("launch/train.py", "--sampling.sampler", "dim", "'ddim'"),
        ("launch/train.py", "--training.steps", "many", "INT"),
        ("launch/train.py", "--log.keep-every", "0", "at least 1"),
        ("launch/train.py", "--model.layers-per-block", "0", "at least 1"),
        ("launch/train.py", "--model.downsample-padding", "2", "0 or 1"),
        ("launch/train.py", "--model.norm-eps", "0", "(0, 1e+06)"),
        ("launch/train.py", "--optimizer.betas", "2 2", "[0, 1)"),
        ("launch/train.py", "--optimizer.weight-decay", "-1", "[0, 1e+06]"),
        ("launch/train.py", "--diffusion.timesteps", "0", "at least 1"),
        ("launch/distill.py", "--prediction", "epz", "'eps'"),
        ("launch/sample.py", "--sampler", "dim", "'ddim'"),
        ("launch/sample.py", "--spacing", "trail", "'trailing'"),
        ("launch/sample.py", "--ids", "3;4", "whole numbers"),
        ("launch/export.py", "--weights", "emma", "'ema'"),
        ("launch/visualize.py", "--toy", "swiss-roll", "'swiss_roll'"),
        ("launch/make_shards.py", "--size", "0", POSITIVE),
        ("launch/make_shards.py", "--per-shard", "0", POSITIVE),
        ("launch/make_shards.py", "--processes", "0", POSITIVE),
        ("launch/make_shards.py", "--format", "pngg", "'png'"),
        ("launch/checkpoints.py", "--keep", "1", "at least 2"),
        ("launch/checkpoints.py", "--keep-every", "0", POSITIVE),
        ("benchmarks/cpu_noise.py", "--pairs", "0", POSITIVE),
        ("benchmarks/data_loading.py", "--training-steps", "-1", "must not be negative"),
        ("benchmarks/digits_quality.py", "--count", "0", POSITIVE),
        ("benchmarks/enlarging.py", "--steps", "0", POSITIVE),
        ("benchmarks/frechet_bias.py", "--repeats", "1", "at least 2"),
        ("benchmarks/guidance.py", "--sampler", "dim", "'ddim'"),
        ("benchmarks/loss_memory.py", "--only", "enigne", "'engine'"),
        ("benchmarks/objectives.py", "--seeds", "0", POSITIVE),
        ("benchmarks/objectives.py", "--only", "simpel", "simple ε"),
        ("benchmarks/sample_throughput.py", "--device", "cudda", "cpu, cuda"),
        ("benchmarks/sample_throughput.py", "--rounds", "0", POSITIVE),
        ("benchmarks/solver_convergence.py", "--doublings", "1", "at least 2"),
        ("benchmarks/train_throughput.py", "--batch", "0", POSITIVE),
    ],
)
def test_a_value_that_is_not_allowed(
    script: str, flag: str, value: str, allowed: str, call: Call
) -> None:
    more = ["--print-config"] if script == "launch/train.py" else NEEDED.get(script, [])
    ended = call(script, *more, flag, *value.split())
    assert ended.status == 2
    for words in (flag, value.split()[0], allowed):
        assert words in re.sub(r"\s+", " ", ended.said.replace("│", "")), ended.said


def test_evaluate_names_the_metrics(call: Call) -> None:
    ended = call("launch/evaluate.py", "--checkpoint", "x", "--metrics", "fdi")
    assert ended.status == 2
    assert "--metrics has 'fdi'; there are fid," in ended.said


def test_visualize_names_the_figures(call: Call) -> None:
    arguments = ["--checkpoint", "x", "--out", "y", "--only", "foward"]
    ended = call("launch/visualize.py", *arguments)
    assert ended.status == 2
    assert "--only names 'foward'" in ended.said
    assert "forward" in ended.said
