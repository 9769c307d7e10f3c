"""Numbers and paths on command lines: each refused by the name of its flag, or taken as meant."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddpm_engine.bounds import out_of_bounds
from ddpm_engine.cli import checkpoints, distill, evaluate, make_shards, sample, train, visualize
from ddpm_engine.cli.options import parse_command, parse_options
from ddpm_engine.config import LogConfig, OptimizerConfig, TrainingConfig, load_config
from ddpm_engine.errors import UserError
from ddpm_engine.networks.build import build_network
from ddpm_engine.networks.unet.config import UNetConfig

Parse = Callable[[list[str]], Any]


def parser(options: Any, omit: bool, *given: str) -> Parse:
    return lambda words: parse_options(options, [*given, *words], omit_prefixes=omit)


def command(name: str, function: Any) -> Parse:
    def parse(words: list[str]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["checkpoints.py", name, "run", *words])
            return parse_command({name: function, "list": checkpoints.list_checkpoints})

    return parse


PARSERS: dict[str, Parse] = {
    "train": train.parse,
    "sample": parser(sample.Options, True, "--checkpoint", "c", "--out", "o"),
    "evaluate": parser(evaluate.Options, True, "--checkpoint", "c"),
    "distill": parser(distill.Options, False, "--teacher", "t", "--out", "o"),
    "visualize": parser(visualize.Options, False, "--out", "o"),
    "make_shards": parser(make_shards.pack, False, "digits", "--out", "o"),
    "index": parser(make_shards.index, False, "shards"),
    "prune": command("prune", checkpoints.prune),
    "average": command("average", checkpoints.average),
    "ema": command("ema", checkpoints.ema),
}
FLOATS = {
    "train": [
        "--optimizer.learning-rate", "--optimizer.eps", "--optimizer.clip-norm",
        "--training.ema-decay", "--training.ema-sigma-rel", "--training.condition-dropout",
        "--objective.logit-mean", "--objective.p-mean", "--diffusion.sigma-data",
        "--diffusion.betas", "--model.norm-eps", "--data.cache-gb", "--sampling.eta",
        "--distillation.guidance-scale",
    ],
    "sample": ["--eta", "--guidance-scale", "--guidance-rescale", "--threshold", "--strength"],
    "evaluate": ["--eta", "--guidance-scale"],
    "distill": ["--guidance-scale", "--optimizer.weight-decay"],
    "average": ["--shares"],
    "ema": ["--length"],
}  # fmt: skip
INTEGERS = {
    "train": [
        "--training.steps", "--training.batch-size", "--training.seed", "--log.keep-every",
        "--log.sample-every", "--model.sample-size", "--model.block-out-channels",
        "--model.num-class-embeds", "--diffusion.timesteps", "--data.workers", "--data.weights",
        "--distillation.steps",
    ],
    "sample": ["--batch-size", "--per-shard", "--class-label", "--steps", "--draws"],
    "evaluate": ["--count", "--reference-count", "--piece", "--batch-size", "--seed"],
    "distill": ["--steps", "--start-steps", "--training.accumulation"],
    "visualize": ["--count", "--steps", "--seed"],
    "make_shards": ["--size", "--per-shard", "--processes"],
    "index": ["--processes"],
    "prune": ["--keep", "--keep-every"],
    "average": ["--steps"],
    "ema": ["--step"],
}  # fmt: skip


def refuse(parse: Parse, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        parse(words)
    said = capsys.readouterr().err
    assert left.value.code == 2
    return said


NEEDED = {"average": ["--out", "o"], "ema": ["--out", "o"]}
"""What a command needs besides."""


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_is_not_finite_is_refused(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = FLOATS[name]
    words = [*NEEDED.get(name, []), *(f"{flag}={value}" for flag in flags)]
    said = refuse(PARSERS[name], words, capsys)
    assert said.startswith("error: ")
    assert [flag for flag in flags if f"{flag} is " not in said] == []
    assert said.count("\n") == len(flags)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_beyond_64_bits_is_refused(
    name: str, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        flag for flag in INTEGERS[name] if flag != "--seed"
    ]  # which has 64 bits without a sign
    more = ["--length", "0.1"] if name == "ema" else []
    words = [*NEEDED.get(name, []), *more, *(f"{flag}={value}" for flag in flags)]
    said = refuse(PARSERS[name], words, capsys)
    assert said.startswith("error: ")
    assert [flag for flag in flags if f"{flag} is " not in said] == []
    assert said.count("\n") == len(flags)


@pytest.mark.parametrize("name", INTEGERS)
def test_a_negative_number_of_things_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    any_number = ("--training.seed", "--seed", "--draws")  # the last is the request's
    flags = [flag for flag in INTEGERS[name] if flag not in any_number]
    more = ["--length", "0.1"] if name == "ema" else []
    words = [*NEEDED.get(name, []), *more, *(f"{flag}=-1" for flag in flags)]
    said = refuse(PARSERS[name], words, capsys)
    assert [flag for flag in flags if f"{flag} is " not in said] == []


@pytest.mark.parametrize("value", ["", "nan", "1.5", "9" * 5000])
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = INTEGERS[name][-1]
    more = ["--length", "0.1"] if name == "ema" else []
    words = [*NEEDED.get(name, []), *more, f"{flag}={value}"]
    assert flag in refuse(PARSERS[name], words, capsys)


def test_a_seed_may_be_negative() -> None:
    assert train.parse(["--training.seed=-1"]).run.training.seed == -1


@pytest.mark.parametrize(
    ("section", "field"),
    [
        (OptimizerConfig(learning_rate=float("nan")), "learning_rate"),
        (OptimizerConfig(betas=(0.9, float("nan"))), "betas"),
        (TrainingConfig(seed=2**63), "seed"),
        (LogConfig(keep_every=2**63), "keep_every"),
        (UNetConfig(block_out_channels=(2**63,)), "block_out_channels"),
    ],
)
def test_fields_set_in_python_have_the_same_bounds(section: Any, field: str) -> None:
    assert [problem.field for problem in out_of_bounds(section)] == [field]


def test_a_network_that_does_not_fit_is_refused_before_it_is_built() -> None:
    huge = UNetConfig(block_out_channels=(2**20,) * 4)
    with pytest.raises(UserError, match=r"asks for at least .* of memory, and there are"):
        build_network(huge)


# --- Paths

PATHS = [
    ("train", "--out", lambda options: options.run.out),
    ("train", "--data.cache", lambda options: options.run.data.cache),
    ("sample", "--images", lambda options: vars(options.image)["images"]),
    ("evaluate", "--cache", lambda options: options.features.cache),
    ("visualize", "--photo", lambda options: options.photo),
]


@pytest.mark.parametrize(("name", "flag", "value"), PATHS)
def test_the_home_folder_is_expanded(name: str, flag: str, value: Callable[[Any], Any]) -> None:
    for words in ([f"{flag}=~/a b"], [flag, "~/a b"]):
        assert value(PARSERS[name](words)) == Path.home() / "a b"
    assert value(PARSERS[name]([f"{flag}=a~b"])) == Path("a~b")


def test_the_configuration_is_looked_for_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text('{"training": {"steps": 17}}')
    assert train.parse(["--config=~/mine.json"]).run.training.steps == 17
    assert load_config(Path("~/mine.json")).training.steps == 17


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_configuration_without_a_name_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"`config`: .*(empty|zero byte)"):
        train.parse([f"--config={value}"])


@pytest.mark.parametrize("value", ["", "a\0b", "\ud800"])
@pytest.mark.parametrize(("name", "flag", "_"), PATHS)
def test_what_is_no_path_is_refused(
    name: str, flag: str, _: Any, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = re.sub(r"[\s│]+", " ", refuse(PARSERS[name], [f"{flag}={value}"], capsys))
    assert flag in said
    assert "a path is empty" in said or "has a zero byte" in said or "that no path has" in said


@pytest.mark.parametrize(("name", "flag", "value"), PATHS)
def test_a_name_that_is_no_text_is_a_path(
    name: str, flag: str, value: Callable[[Any], Any]
) -> None:
    assert os.fsencode(value(PARSERS[name]([f"{flag}=caf\udce9"]))) == b"caf\xe9"
