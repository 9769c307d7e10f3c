"""Exports over exports, beside other files, through links, and interrupted at every moment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import TINY

from ddpm_engine.checkpoints import load
from ddpm_engine.checkpoints.load import LoadedModel, load_model
from ddpm_engine.config import RunConfig
from ddpm_engine.diffusion.config import DiffusionConfig
from ddpm_engine.errors import UserError
from ddpm_engine.export.pipeline import export_pipeline
from ddpm_engine.networks.unet.unet import UNet
from ddpm_engine.samplers.config import SamplingConfig

MODEL = replace(TINY, block_out_channels=(4, 8), norm_num_groups=2)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
OWN = {"README.md", "model_index.json", "scheduler", "unet"}


def model(value: float, **diffusion: Any) -> LoadedModel:
    """A network all of whose weights are `value`, with a process of its own."""
    network = UNet(MODEL).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.fill_(value)
    config = RunConfig(
        model=MODEL, diffusion=DiffusionConfig(timesteps=100 + int(value), **diffusion)
    )
    return LoadedModel.from_config(network, config, "0" * 64)


def value_of(folder: Path) -> float:
    """Which `model` a folder holds; its parts are checked to be of the same one."""
    loaded = load_model(folder)
    values = {float(parameter.flatten()[0]) for parameter in loaded.network.parameters()}
    assert values == {loaded.config.diffusion.timesteps - 100}
    return values.pop()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_an_export_replaces_its_own_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "hub"
    export_pipeline(model(1), out)
    others = {".git/HEAD": b"ref: main", "notes.txt": b"mine", "unet/remarks.md": b"mine too"}
    for name, content in others.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    export_pipeline(model(2), out)
    assert value_of(out) == 2
    assert others.items() <= contents(out).items()
    assert {path.name for path in out.iterdir()} == OWN | {".git", "notes.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_an_export_goes_into_a_fresh_clone(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitattributes").write_text("*.safetensors filter=lfs")
    export_pipeline(model(1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == OWN | {".git", ".gitattributes"}


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_goes_where_a_link_leads(exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if exists:
        export_pipeline(model(1), target)
    export_pipeline(model(2), link)
    assert link.is_symlink()
    assert value_of(target) == 2


def test_a_linked_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "blob"
    export_pipeline(model(1), out)
    (out / WEIGHTS).rename(elsewhere)
    (out / WEIGHTS).symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    export_pipeline(model(2), out)
    assert value_of(out) == 2
    assert elsewhere.read_bytes() == before


def foreign(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "README.md").write_text("my notes")


def linked(out: Path) -> None:
    (out / "unet").rename(out.with_name("elsewhere"))
    (out / "unet").symlink_to(out.with_name("elsewhere"))


def sharded(out: Path) -> None:
    (out / f"{WEIGHTS}.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (foreign, "exists and is not an export; choose another"),
        (linked, "unet is a link"),
        (sharded, r"holds other weights \(diffusion_pytorch_model\.safetensors\.index\.json\)"),
    ],
)
def test_a_folder_that_cannot_be_exported_to_stays_as_it_is(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_pipeline(model(1), out)
    spoil(out)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        export_pipeline(model(2), out)
    assert contents(tmp_path) == before


def test_another_kind_of_export_leaves_no_part_of_the_former(tmp_path: Path) -> None:
    """That of an EDM network has no index: the former one's would name the wrong pipeline."""
    export_pipeline(model(1), tmp_path)
    edm = model(2, schedule="edm", prediction="edm")
    export_pipeline(replace(edm, sampling=SamplingConfig("heun")), tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    assert value_of(tmp_path) == 2


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("step", ["save_file", "model_card", "replace"])
def test_a_full_disk_leaves_what_was_there(
    step: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if earlier:
        export_pipeline(model(1), out)
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    place = {
        "save_file": "ddpm_engine.networks.files.weights.save_file",
        "model_card": "ddpm_engine.export.pipeline.model_card",
        "replace": "ddpm_engine.networks.files.together._write",
    }
    monkeypatch.setattr(place[step], full)
    with pytest.raises(UserError, match="No space left on device; make room"):
        export_pipeline(model(2), out)
    assert contents(tmp_path) == before
    assert out.exists() == earlier


@pytest.mark.parametrize("earlier", [False, True])
def test_whatever_moment_it_is_killed_at_no_mixture_is_loaded(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if earlier:
        export_pipeline(model(1), out)
    moments: list[Path] = []

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            moments.append(Path(shutil.copytree(out, tmp_path / f"killed-{len(moments)}")))
            return change(*arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched(os.replace))
        patch.setattr(Path, "unlink", watched(Path.unlink))
        export_pipeline(model(2), out)
    assert len(moments) >= 7
    found = set()
    for folder in [*moments, out]:
        if (folder / "unet" / "config.json").exists():
            found.add(value_of(folder))
            continue
        with pytest.raises(UserError, match=r"interrupted; run it again|no usable checkpoint"):
            load_model(folder)
    assert found == ({1, 2} if earlier else {2})
    for folder in moments:
        if earlier or (folder / "README.md").exists():
            export_pipeline(model(3), folder)
            assert value_of(folder) == 3
            assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("alone", [False, True])
def test_a_save_in_python_is_all_or_nothing_too(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(value: float) -> None:
        one: Any = model(value)
        (one.network if alone else one).save_pretrained(tmp_path)

    save(1)
    before = contents(tmp_path)

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_engine.networks.files.weights.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            save(2)
    assert contents(tmp_path) == before
    save(2)
    assert bool((UNet.from_pretrained(tmp_path).conv_in.weight == 2).all())


def test_a_model_that_changes_while_it_is_read_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_pipeline(model(1), tmp_path)
    read = load.read_scheduler

    def slowly(file: Path) -> Any:
        process = read(file)
        export_pipeline(model(2), tmp_path)
        return process

    monkeypatch.setattr(load, "read_scheduler", slowly)
    with pytest.raises(UserError, match="changed while it was read; load it again"):
        load_model(tmp_path)
    monkeypatch.undo()
    assert value_of(tmp_path) == 2
