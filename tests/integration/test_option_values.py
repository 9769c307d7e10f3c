"""Every option of every script, with values that people mistype and machines make up.

Whatever a script is given, it ends with the right result, or with status 2, one message, and every
file and folder as it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import tyro
from PIL import Image
from tests.forked import run_script

from ddpm_engine.cli import (
    checkpoints,
    distill,
    evaluate,
    export,
    make_shards,
    sample,
    train,
    visualize,
)

NUMBERS = ["nan", "inf", "-1", "0", str(2**56), str(2**63), "1e308", "9" * 400, ""]
PATHS = ["", "~/x", ".", "..", "file", "folder", "caf\udce9", "/proc/none/x"]
TEXTS = ["", "nan", "-1", ",", "caf\udce9", "9" * 400, *PATHS[1:]]
VALUES = {"number": NUMBERS, "path": PATHS, "text": TEXTS}


@dataclass(frozen=True)
class Command:
    """A script, or one of its commands, and the options of a quick run of it."""

    words: tuple[str, ...]
    options: Callable[..., Any]
    given: dict[str, str]
    """By flag, or by the name of a positional argument; {} stands for the folder of `inputs`."""
    omit_prefixes: bool = False
    endless: tuple[str, ...] = ()
    """Flags of which a large number is right, but takes too long."""


SAMPLE = {"--checkpoint": "{}/run", "--out": "out", "--count": "2", "--steps": "2"}
EVALUATE = {
    "--samples": "{}/samples", "--data": "{}/shards", "--features": "digits", "--out": "out",
    "--metrics": "fid,accuracy", "--cache": "{}/cache",
}  # fmt: skip
LIKELIHOOD = {
    "--checkpoint": "{}/run", "--out": "out", "--metrics": "nll", "--count": "2",
}  # fmt: skip
GENERATED = {
    "--checkpoint": "{}/run", "--out": "out", "--features": "digits", "--metrics": "fid",
    "--count": "4", "--steps": "2", "--cache": "{}/cache",
}  # fmt: skip
COMMANDS = [
    Command(
        ("launch/train.py",), train.Options, {"--config": "{}/config.json", "--out": "out"},
        endless=("--training.steps",),
    ),
    Command(
        ("launch/distill.py",), distill.Options,
        {"--teacher": "{}/run", "--out": "out", "--steps": "1", "--start-steps": "2",
         "--training.steps": "1"},
        endless=("--training.steps",),
    ),
    Command(("launch/sample.py",), sample.Options, SAMPLE, omit_prefixes=True),
    Command(("launch/evaluate.py",), evaluate.Options, EVALUATE, omit_prefixes=True),
    Command(("launch/evaluate.py",), evaluate.Options, LIKELIHOOD, omit_prefixes=True),
    Command(("launch/evaluate.py",), evaluate.Options, GENERATED, omit_prefixes=True),
    Command(
        ("launch/make_shards.py",), make_shards.pack, {"source": "{}/images", "--out": "out"}
    ),
    Command(("launch/make_shards.py", "index"), make_shards.index, {"directory": "{}/shards"}),
    Command(("launch/make_shards.py", "verify"), make_shards.verify, {"directory": "{}/shards"}),
    Command(("launch/export.py",), export.Options, {"--checkpoint": "{}/run", "--out": "out"}),
    Command(("launch/checkpoints.py", "list"), checkpoints.list_checkpoints, {"run": "{}/run"}),
    Command(("launch/checkpoints.py", "verify"), checkpoints.verify_checkpoints, {"run": "{}/run"}),
    Command(("launch/checkpoints.py", "prune"), checkpoints.prune, {"run": "{}/run"}),
    Command(
        ("launch/checkpoints.py", "average"), checkpoints.average,
        {"run": "{}/run", "--out": "out"},
    ),
    Command(
        ("launch/checkpoints.py", "ema"), checkpoints.ema,
        {"run": "{}/run", "--length": "0.1", "--out": "out"},
    ),
    Command(
        ("launch/visualize.py",), visualize.Options,
        {"--checkpoint": "{}/run", "--out": "out", "--only": "forward", "--data": "{}/shards"},
    ),
    Command(
        ("launch/visualize.py",), visualize.Options,
        {"--checkpoint": "{}/run", "--out": "out", "--only": "reverse", "--steps": "2"},
    ),
]  # fmt: skip

COMPANIONS = {
    "--guidance-rescale": {"--guidance-scale": "2"},
    "--guidance-interval": {"--guidance-scale": "2"},
    "--strength": {"--images": "{}/images"},
    "--mask": {"--images": "{}/images"},
    "--draws": {"--images": "{}/images", "--mask": "{}/images/3.png"},
    "--eta": {"--sampler": "ddim"},
    "--per-shard": {"--format": "npz"},
    "--data.weights": {"--data.mix-with": "{}/shards"},
    "--shares": {"--steps": "2"},
    "--keep-every": {"--keep": "2"},
}
"""What an option means nothing without."""


@dataclass(frozen=True)
class Option:
    command: Command
    name: str
    """The flag, or the name of a positional argument."""
    kind: str
    entries: int = 1
    """Words that it takes."""


def options_of(command: Command) -> Iterator[Option]:
    for name, kind, entries in _fields(command.options, command.omit_prefixes):
        yield Option(command, name, kind, entries)


def _fields(
    source: Callable[..., Any], omit_prefixes: bool, prefix: str = ""
) -> Iterator[tuple[str, str, int]]:
    for field, annotated in get_type_hints(source, include_extras=True).items():
        if field == "return":
            continue
        kind, *metadata = (
            get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        )
        names = [name for entry in metadata if (name := getattr(entry, "name", None)) is not None]
        name = names[0] if names else field
        if dataclasses.is_dataclass(kind):
            section = prefix if omit_prefixes or not name else f"{prefix}{name}."
            yield from _fields(kind, omit_prefixes, section)  # type: ignore[arg-type]
            continue
        leaves = set(_leaves(kind))
        category = next((named for named, types in _CATEGORIES.items() if leaves & types), None)
        if category is not None:
            flag = name if _POSITIONAL in metadata else f"--{prefix}{name}".replace("_", "-")
            yield flag, category, _entries(kind)


def _parts(annotated: Any) -> tuple[Any, ...]:
    return get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)


_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_CATEGORIES: dict[str, set[Any]] = {"path": {Path}, "number": {int, float}, "text": {str, "choice"}}


def _leaves(kind: Any) -> Iterator[Any]:
    origin = get_origin(kind)
    if origin is Literal:
        yield "choice"
    elif origin is None:
        yield kind
    else:
        for argument in get_args(kind)[: 1 if origin is Annotated else None]:
            yield from _leaves(argument)


def _entries(kind: Any) -> int:
    origin = get_origin(kind)
    if origin is Annotated:
        return _entries(get_args(kind)[0])
    if origin in (Union, UnionType):
        return max(_entries(argument) for argument in get_args(kind))
    if origin is tuple and Ellipsis not in get_args(kind):
        return len(get_args(kind))
    return 1


OPTIONS = [option for command in COMMANDS for option in options_of(command)]


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Everything in a folder, by relative path: bytes of files, targets of links, None."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def call(option: Option, value: str, inputs: Path, home: Path) -> CompletedProcess[str]:
    """Run a script in `home/work` with one option set to a value."""
    given = {**option.command.given, **COMPANIONS.get(option.name, {}), option.name: value}
    positional = [words for name, words in given.items() if not name.startswith("-")]
    # With an equals sign, or a negative number would be taken for a flag.
    flags = [
        word
        for name, words in given.items()
        if name.startswith("-")
        for word in (
            [name, *[words] * option.entries]
            if name == option.name and option.entries > 1
            else [f"{name}={words}"]
        )
    ]
    words = [word.replace("{}", str(inputs)) for word in [*positional, *flags]]
    return run_script(
        *option.command.words,
        *words,
        cwd=home / "work",
        environment={"HOME": str(home), "XDG_CACHE_HOME": str(inputs / "caches")},
        timeout=60,
    )


def fault(option: Option, value: str, inputs: Path, home: Path) -> str | None:
    """What is wrong with how a script takes a value; None: nothing."""
    (home / "work" / "folder").mkdir(parents=True)
    (home / "work" / "folder" / "notes").write_text("mine")
    (home / "work" / "file").write_text("mine")
    (home / "work" / "caf\udce9").write_text("mine")
    before = contents(home)
    try:
        ended = call(option, value, inputs, home)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    said, after = ended.stdout + ended.stderr, contents(home)
    if "Traceback" in said:
        return said
    if ended.returncode == 0:
        lost = [name for name in before if after.get(name, ...) != before[name]]
        if lost:
            return f"{lost} changed"
        return unsound(home, after.keys() - before.keys())
    if ended.returncode != 2 and not (ended.returncode == 1 and "verify" in option.command.words):
        return f"status {ended.returncode}: {said}"
    messages = [line for line in said.splitlines() if _MESSAGE.search(line)]
    if len(messages) != 1:
        return f"not one message: {said}"
    if after != before:
        return f"claimed {sorted(after.keys() ^ before.keys())}: {said}"
    return None


_MESSAGE = re.compile("^error: |For full helptext")
"""The engine's own message, and the last line of one about the command line itself."""


def unsound(home: Path, names: set[str]) -> str | None:
    """What is wrong with files that a script has made: no JSON, or an image of one colour."""
    for name in sorted(names):
        path = home / name
        if path.suffix in (".json", ".jsonl"):
            for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [None]:
                text = path.read_text() if line is None else line
                try:
                    json.loads(text, parse_constant=float.fromhex)
                except ValueError as error:
                    return f"{name}: {error}: {text[:200]}"
        elif path.suffix == ".png":
            lowest, highest = Image.open(path).convert("L").getextrema()
            if lowest == highest:
                return f"{name} has one colour"
    return None


def identifier(option: Option) -> str:
    words = " ".join(option.command.words).removeprefix("launch/")
    return f"{words} {option.command.given.get('--metrics', '')} {option.name}"


def is_endless(option: Option, value: str) -> bool:
    return option.name in option.command.endless and value.isdigit() and int(value) > 1


@pytest.mark.parametrize("option", OPTIONS[::4], ids=identifier)
def test_a_value_of_some_options(option: Option, inputs: Path, tmp_path: Path) -> None:
    """Every value in turn, so that all are tried; with every option in the slow suite."""
    values = [value for value in VALUES[option.kind] if not is_endless(option, value)]
    value = values[OPTIONS.index(option) % len(values)]
    assert fault(option, value, inputs, tmp_path) is None, value


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS, ids=identifier)
def test_every_second_value_of_each_option(option: Option, inputs: Path, tmp_path: Path) -> None:
    """Those that the one option leaves out, the next takes."""
    faults = {}
    first = OPTIONS.index(option) % 2
    for number, value in enumerate(VALUES[option.kind][first::2]):
        if not is_endless(option, value):
            found = fault(option, value, inputs, tmp_path / str(number))
            if found is not None:
                faults[value] = found
    assert faults == {}
