"""A checkpoint of somebody who means harm is refused: it runs nothing and leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from ddpm_engine.checkpoints.load import load_model
from ddpm_engine.checkpoints.store import MAX_MANIFEST_BYTES, verify
from ddpm_engine.config import RunConfig
from ddpm_engine.errors import UserError
from ddpm_engine.training.trainer import Trainer

Damage = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def trained(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    Trainer(replace(tiny, out=out, training=replace(tiny.training, steps=1))).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    return out / "checkpoints" / "step-00000001"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A sound one, in a folder beside which nothing else is."""
    return Path(shutil.copytree(trained, tmp_path / "inside" / "step-00000001"))


def seal(path: Path, manifest: Any) -> None:
    """Write a manifest whose hash is right."""
    if isinstance(manifest, dict):
        manifest.pop("hash", None)
        canonical = json.dumps(manifest, sort_keys=True).encode()
        manifest["hash"] = hashlib.sha256(canonical).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def entry(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("name", ["../secret.safetensors", "model/../../secret.safetensors", "/"])
def test_names_and_links_that_lead_outside(name: str, checkpoint: Path) -> None:
    secret = checkpoint.parent / "secret.safetensors"
    secret.write_bytes(b"secret")
    name = str(secret) if name == "/" else name
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    seal(checkpoint, {**manifest, "files": {**manifest["files"], name: entry(secret)}})
    assert verify(checkpoint) == (None, [f"{name!r} is not the name of a file of a checkpoint"])
    seal(checkpoint, manifest)
    file = next((checkpoint / "ema").glob("*.safetensors"))
    outside = checkpoint.parent / file.name
    file.rename(outside)
    file.symlink_to(outside)
    found, (problem,) = verify(checkpoint)
    assert found is None
    assert "not the name of a file" in problem


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"files": []}, "no files of type dict"),
        ({"state": "x"}, "no state of type dict"),
        ({"step": "1"}, "no step of type int"),
        ({"step": True}, "no step of type int"),
        ({"format": [1]}, "its format is"),
        ({"files": {"ema/x.safetensors": 3}}, "no size and hash"),
        ({"files": {"ema/x\0.safetensors": {}}}, "null"),
        ({"files": {"ema/" + "x" * 999 + ".safetensors": {}}}, "too long"),
    ],
)
def test_manifests_of_wrong_types(change: dict[str, Any], reason: str, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text()) | change
    seal(checkpoint, manifest)
    found, problems = verify(checkpoint)
    assert found is None
    assert reason in "; ".join(problems)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", '{"a":' * 100_000, '{"step": ' + "9" * 5000 + "}", "\ud800"]
)
def test_manifests_that_are_none(text: str, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    found, problems = verify(checkpoint)
    assert found is None
    assert len(problems) == 1
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_model(checkpoint)
    os.truncate(checkpoint / "manifest.json", MAX_MANIFEST_BYTES + 1)
    assert "bytes, which none has" in verify(checkpoint)[1][0]
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").symlink_to("/dev/zero")
    assert "no manifest" in verify(checkpoint)[1][0]


def _pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(file.parents[2] / "witness")))


def _huge_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + file.read_bytes()[8:])


def _header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def _huge_tensor(file: Path) -> None:
    huge = {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    _header(file, lambda header: header["conv_in.weight"].update(huge))


def _odd_offsets(file: Path) -> None:
    odd = {"DCP_SHARDING_INFO": json.dumps({"conv_in.weight": "x"})}
    _header(file, lambda header: header["__metadata__"].update(odd))


@pytest.mark.parametrize("harm", [_pickle, _huge_header, _huge_tensor, _odd_offsets])
def test_files_whose_hashes_agree(harm: Callable[[Path], None], checkpoint: Path) -> None:
    file = next((checkpoint / "ema").glob("*.safetensors"))
    harm(file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][f"ema/{file.name}"] = entry(file)
    seal(checkpoint, manifest)
    assert verify(checkpoint)[1] == []
    with pytest.raises(UserError, match=r"ema cannot be read|another architecture"):
        load_model(checkpoint)
    assert not (checkpoint.parent / "witness").exists()


def test_files_that_no_manifest_names(checkpoint: Path) -> None:
    (checkpoint / "ema" / "more.safetensors").write_bytes(b"")
    assert verify(checkpoint) == (None, ["ema/more.safetensors is not in its manifest"])
    (checkpoint / "ema" / "more.safetensors").unlink()
    # What is no safetensors file is never opened.
    (checkpoint / "ema" / "data.pkl").write_bytes(pickle.dumps(Bomb(checkpoint.parent / "witness")))
    load_model(checkpoint)
    assert not (checkpoint.parent / "witness").exists()


def test_a_state_of_wrong_types_does_not_resume(
    tiny: RunConfig, trained: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(trained.parents[1], tmp_path / "run"))
    path = out / "checkpoints" / trained.name
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state"]["window"] = {"steps": 0, "__class__": "os.system"}
    seal(path, manifest)
    with pytest.raises(UserError, match="state that this version did not write"):
        Trainer(replace(tiny, out=out)).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
