"""JSON files that people edit: read in any encoding, or refused by file, key and value."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import TINY, TINY_TEXT

from ddpm_engine.checkpoints.recorded_config import load_record
from ddpm_engine.config import RunConfig, TrainingConfig, load_config, to_dict
from ddpm_engine.data.config import DataConfig
from ddpm_engine.errors import UserError
from ddpm_engine.interop.scheduler import read_scheduler, scheduler_entries
from ddpm_engine.networks.files.layout import find_layout
from ddpm_engine.networks.unet.files import config_entries, read_config
from ddpm_engine.rules import validate
from ddpm_engine.training.strategies.launcher_env import read_request

RUN = RunConfig(model=TINY)


def read_index(file: Path) -> None:
    find_layout(file.parent)


def read_deepspeed(file: Path) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    try:
        read_request(TrainingConfig())
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]


def load_valid(file: Path) -> dict[str, Any]:
    config = load_config(file)
    validate(config)
    return to_dict(config)


def load_unet(file: Path) -> dict[str, Any]:
    return config_entries(read_config(file))


def load_scheduler(file: Path) -> dict[str, Any]:
    process = read_scheduler(file)
    return scheduler_entries(process.diffusion, process.sampling, process.distillation)


PLACES: dict[str, tuple[str, dict[str, Any], Callable[[Path], dict[str, Any] | None]]] = {
    "run": ("config.json", to_dict(RUN), load_valid),
    "network": ("config.json", config_entries(TINY), load_unet),
    "text network": ("config.json", config_entries(TINY_TEXT), load_unet),
    "scheduler": (
        "scheduler_config.json",
        scheduler_entries(RUN.diffusion, RUN.sampling),
        load_scheduler,
    ),
    "index": (
        "model_index.json",
        {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]},
        read_index,
    ),
    "deepspeed": (
        "zero.json",
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        read_deepspeed,
    ),
}
"""A valid file of each kind, and its reader, which returns what it understood."""

ENCODINGS = {
    "utf-8": b"", "utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}  # fmt: skip

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e300, 20.9, 1e3, "false", "20", "", "nan"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places_in(values: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield prefix
    entries: Any = values.items() if isinstance(values, dict) else ()
    for key, value in entries:
        yield from places_in(value, (*prefix, key))


def edited(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    return {**values, place[0]: edited(values.get(place[0]), place[1:], value)}


def same(written: Any, understood: Any) -> bool:
    """Whether a value was taken for what it is: a number for its value, and never another type."""
    if isinstance(written, list | tuple) and isinstance(understood, list | tuple):
        return len(written) == len(understood) and all(map(same, written, understood))
    if isinstance(written, dict) and isinstance(understood, dict):
        return all(same(value, understood.get(key)) for key, value in written.items())
    numbers = (int, float)
    if type(written) in numbers and type(understood) in numbers:
        return bool(written == understood)
    if isinstance(written, str) and isinstance(understood, str):
        return understood in (written, str(Path(written)))
    return type(written) is type(understood) and written == understood


@pytest.mark.parametrize("kind", PLACES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_edited_file_is_read_as_written_or_refused(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, valid, read = PLACES[kind]
    folder = tmp_path_factory.getbasetemp() / f"edited-{kind}"
    folder.mkdir(exist_ok=True)
    place = data.draw(st.sampled_from(list(places_in(valid))))
    value = data.draw(values)
    whole = edited(valid, place, value)
    encoding = data.draw(st.sampled_from(list(ENCODINGS)))
    mark = ENCODINGS[encoding] if data.draw(st.booleans()) else b""
    content = mark + json.dumps(whole).encode(encoding)
    content = content[: data.draw(st.sampled_from([None, None, None, 0, 1, len(content) // 2, -1]))]
    (folder / name).write_bytes(content)
    try:
        understood = read(folder / name)
    except UserError:
        return
    if understood is None:
        return
    # Whatever was not refused is what the file says, key by key.
    for key in place[:-1]:
        understood = understood[key]
    if place and place[-1] in understood and not str(place[-1]).startswith("_"):
        assert same(value, understood[place[-1]]), (place, value)


CONTENTS: list[tuple[Callable[[dict[str, Any]], bytes], str]] = [
    (lambda _: b"", "is empty"),
    (lambda _: b" \n", "is empty"),
    (lambda _: b"null", "null, not a JSON object"),
    (lambda _: b"[]", r"\[\], not a JSON object"),
    (lambda _: b"3", "3, not a JSON object"),
    (lambda _: b"{", "is not JSON"),
    (lambda _: b"\xff\xfe{", "is not JSON"),
    (lambda _: b'{"a": "\xe9"}', "is not JSON: it is no text in utf-8"),
    (lambda _: b"[" * 100_000, "more than 64 levels|is not JSON"),
    (lambda _: b'{"a":' * 100 + b"1" + b"}" * 100, "more than 64 levels"),
    (lambda _: b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    (lambda _: b" " * (16 * 2**20 + 1), "more than 16777216 bytes"),
    (lambda valid: json.dumps(valid)[:-1].encode() + b', "x": 1, "x": 2}', '"x" twice'),
    (lambda valid: json.dumps(valid | {"x": float("nan")}).encode(), "x is NaN in"),
    (
        lambda valid: json.dumps(valid)[:-1].encode() + b', "x": [{"y": -1e999}]}',
        "y is -Infinity in",
    ),
]


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_json_object_is_said_with_the_file(kind: str, tmp_path: Path) -> None:
    name, valid, read = PLACES[kind]
    for content, message in CONTENTS:
        (tmp_path / name).write_bytes(content(valid))
        with pytest.raises(UserError, match=message) as refused:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["run", "network", "scheduler"])
def test_every_encoding_of_json_is_read(kind: str, encoding: str, tmp_path: Path) -> None:
    name, valid, read = PLACES[kind]
    for mark in (b"", ENCODINGS[encoding]):
        (tmp_path / name).write_bytes(mark + json.dumps(valid).encode(encoding))
        assert same(read(tmp_path / name), valid)


@pytest.mark.parametrize("load", [load_config, lambda file: load_record(file)[0]])
def test_a_pipe_is_read_as_a_file(load: Callable[[Path], RunConfig]) -> None:
    """As in `--config <(jq … config.json)`."""
    reading, writing = os.pipe()
    os.write(writing, json.dumps(to_dict(RUN)).encode())
    os.close(writing)
    assert load(Path(f"/dev/fd/{reading}")) == RUN
    os.close(reading)


REFUSED: list[tuple[str, Any, str]] = [
    ("data.horizontal_flip", "false", 'data.horizontal_flip is "false"; it must be true or false'),
    ("data.horizontal_flip", 1, "data.horizontal_flip is 1; it must be true or false"),
    ("training.steps", 20.9, "training.steps is 20.9; it must be a whole number"),
    ("training.steps", "20", 'training.steps is "20"; it must be a whole number'),
    ("training.steps", True, "training.steps is true; it must be a whole number"),
    ("training.steps", None, "training.steps is null; it must be a whole number"),
    ("training.steps", 1e30, "training.steps is 1e+30; it must be a whole number"),
    ("log.keep_every", "no", 'log.keep_every is "no"; it must be a whole number or null'),
    ("optimizer.learning_rate", "1e-3", 'learning_rate is "1e-3"; it must be a number'),
    ("optimizer.learning_rate", 10**400, "; it must be a number"),
    ("optimizer.betas", "ab", 'optimizer.betas is "ab"; it must be a list'),
    ("optimizer.betas", [0.9], "optimizer.betas is [0.9]; it must be a list of 2"),
    ("optimizer.betas", [0.9, "0.9"], 'optimizer.betas[1] is "0.9"; it must be a number'),
    ("training.precision", False, 'is false; it must be "auto" or "no" or "bf16" or "fp16"'),
    ("model.block_out_channels", 64, "model.block_out_channels is 64; it must be a list"),
    ("model.stages", 3, "model.stages is unknown; leave it out"),
    ("training.batchsize", 3, "training.batchsize is unknown; did you mean training.batch_size?"),
    ("training", [], "training is []; it must be a JSON object"),
    ("out", 3, "out is 3; it must be a path in quotes"),
    ("out", "", "out: a path is empty"),
    ("out", "a\0b", "out: 'a\\x00b' has a zero byte"),
    ("data.cache", "\ud800", "data.cache: '\\ud800' has characters that no path has"),
    ("data.path", True, "data.path is true; it must be a path in quotes"),
    ("model.class", [], "`model` is a [], which describes no known network"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "message"), REFUSED, ids=[str(one[:2]) for one in REFUSED]
)
def test_a_value_of_another_type_is_refused_by_name(
    place: str, value: Any, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(edited(to_dict(RUN), tuple(place.split(".")), value)))
    with pytest.raises(UserError) as refused:
        load_config(file)
    assert message in str(refused.value)
    assert "model.class" in place or str(file) in str(refused.value)


@pytest.mark.parametrize(
    ("place", "written", "config"),
    [
        ("training.steps", 1e3, replace(RUN, training=TrainingConfig(steps=1000))),
        ("data.path", "https://host/a", replace(RUN, data=DataConfig(path="https://host/a"))),
        ("data.path", "~/a", replace(RUN, data=DataConfig(path=Path.home() / "a"))),
        ("out", "caf\udce9", replace(RUN, out=Path(os.fsdecode(b"caf\xe9")))),
    ],
)
def test_a_value_is_read_as_what_it_means(
    place: str, written: Any, config: RunConfig, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(edited(to_dict(RUN), tuple(place.split(".")), written)))
    assert load_config(file) == config


def test_an_unknown_entry_of_diffusers_is_named_with_the_one_meant(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config_entries(TINY), "sample_sizes": 8}))
    with pytest.raises(UserError, match=r"sample_sizes = 8 \(did you mean sample_size\?\)"):
        read_config(file)
