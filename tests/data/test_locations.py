"""Paths and URLs of data: each is read as what it is, and no password is shown or recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from tests.data.sets import pack

from ddpm_engine.checkpoints.load import config_of
from ddpm_engine.cli.options import parse_options
from ddpm_engine.cli.train import parse as parse_training
from ddpm_engine.cli.visualize import Options as FigureOptions
from ddpm_engine.config import RunConfig, dump_config, from_dict, load_config, to_dict
from ddpm_engine.data.config import DataConfig
from ddpm_engine.data.packing.index import index_shards
from ddpm_engine.data.packing.journal import packing_run
from ddpm_engine.data.remote.fetch import FetchError
from ddpm_engine.data.shards.shard_set import open_shards
from ddpm_engine.data.stream import ShardStream, is_stream
from ddpm_engine.errors import UserError
from ddpm_engine.generation.input_images import InputImages
from ddpm_engine.generation.sample_dir import SampleDir
from ddpm_engine.generation.sample_reader import open_images
from ddpm_engine.rules import validate
from ddpm_engine.training.run_directory import claim_run_directory
from ddpm_engine.training.trainer import Trainer

URLS = ["https://host/set", "s3://bucket/set", "https://host/a-{0..9}.tar", "pipe:cat a.tar"]


@pytest.mark.parametrize("url", URLS)
def test_a_url_stays_one_wherever_it_is_given(url: str) -> None:
    on_the_command_line = parse_training(["--data.path", url]).run
    in_python = RunConfig(data=DataConfig(path=url))
    in_json = from_dict(to_dict(in_python), "it")
    assert {run.data.path for run in (on_the_command_line, in_python, in_json)} == {url}
    figures = parse_options(FigureOptions, ["--out", "x", "--data", url])
    assert figures.data == url


def test_a_path_is_one_on_the_command_line() -> None:
    assert parse_training(["--data.path", "data/set"]).run.data.path == Path("data/set")
    assert parse_options(FigureOptions, ["--out", "x", "--data", "a"]).data == Path("a")
    assert parse_options(FigureOptions, ["--out", "x", "--data", "None"]).data is None


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("http:/host/set", "one slash where a URL has two; give http://host/set"),
        (Path("s3://bucket/set"), "give s3://bucket/set"),
        ("C:\\data\\set", "a path of Windows"),
        ("c:/data/set", "a path of Windows"),
    ],
)
@pytest.mark.parametrize("field", ["path", "mix_with"])
def test_what_is_nearly_a_url_is_named(place: str | Path, message: str, field: str) -> None:
    data = DataConfig(path=place)
    if field == "mix_with":
        data = DataConfig(mix_with=(str(place),), weights=(1, 1))
    with pytest.raises(UserError, match=rf"`data\.{field}` ") as refused:
        validate(RunConfig(data=data))
    assert message in str(refused.value)
    with pytest.raises(UserError, match=message.partition(";")[0].partition(" a ")[0]):
        open_shards(place)


def pack_into(folder: Path) -> None:
    with packing_run(folder, None, lambda _: set()):
        pass


LOCAL: dict[str, Callable[[Path], object]] = {
    "a run": lambda path: claim_run_directory(RunConfig(out=path), "0" * 64),
    "samples": lambda path: SampleDir(path, {}, "png", lambda _: None),
    "packing": pack_into,
    "indexing": index_shards,
    "samples to read": open_images,
    "images to read": lambda path: InputImages(path, (3, 8, 8)),
    "a model": config_of,
}


@pytest.mark.parametrize("place", ["s3://me:secret@bucket/set", "s3:/me:secret@bucket", "C:\\a"])
@pytest.mark.parametrize("use", LOCAL)
def test_what_must_be_local_is_no_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is a URL|of Windows") as refused:
        LOCAL[use](Path(place))
    assert "secret" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_be_called_like_a_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "s3:" / "set")
    assert open_shards("s3:/set").manifest.samples == 20


def test_a_page_of_the_hub_is_named() -> None:
    with pytest.raises(UserError, match="give the model's name, google/ddpm-cifar10-32"):
        config_of("https://huggingface.co/google/ddpm-cifar10-32/tree/main")


@pytest.mark.parametrize("url", ["https://me:secret@host/set", "HTTP://me:secret@host/a.tar"])
def test_http_with_a_password_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"://\*\*\*@host.* names a user or a password"):
        ShardStream(url, 8, 3) if is_stream(url) else open_shards(url)


@pytest.mark.parametrize("url", ["http://[half/set", "http://host:port/a.tar", "http:///a.tar"])
def test_a_url_that_is_none_is_said_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(UserError):
        next(iter(ShardStream(url, 8, 3))) if is_stream(url) else open_shards(url)


def test_passwords_are_told_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: RunConfig
) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(pack(tmp_path / "local")), "/me:secret@host/set", recursive=True)
    url = "memory://me:secret@host/set"
    data = DataConfig(
        path=url, workers=0, cache=tmp_path / "cache", mix_with=(url,), weights=(1, 1)
    )
    config = replace(config, data=data)
    with caplog.at_level(logging.INFO):
        Trainer(config).fit()
    assert load_config(config.out).data.path == "memory://***@host/set"
    memory.rm("/me:secret@host/set/shard-000001.tar")
    said = [caplog.text, dump_config(config), str(open_shards(url).storage)]
    for wrong in ("memory://me:secret@host/nowhere", "memory://***@host/set", "x://a:secret@b/c"):
        with pytest.raises(UserError, match=r"\*\*\*@") as refused:
            open_shards(wrong)
        said.append(str(refused.value))
    said.append(str(FetchError(url, "login as me with secret failed")))
    files = [path.read_bytes() for path in config.out.rglob("*") if path.is_file()]
    assert not any("secret" in text for text in said)
    assert not any(b"secret" in content for content in files)
    memory.rm("/me:secret@host", recursive=True)


def test_a_stream_is_known_by_its_path_alone() -> None:
    one, other = (
        ShardStream(f"memory://{user}host/a.tar", 8, 3).fingerprint for user in ("a:b@", "c:d@")
    )
    assert one == other
