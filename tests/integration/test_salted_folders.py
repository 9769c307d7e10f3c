"""Folders into which an operating system, an editor or a person has put files of their own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.forked import run_script
from tests.integration.test_option_values import contents

SALT = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._0.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "._shard-000000.tar": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "._manifest.json": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "._step-00000002": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "._model.safetensors": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "desktop.ini": b"[.ShellClassInfo]",
    ".ipynb_checkpoints/0-checkpoint.png": b"no image",
    ".git/HEAD": b"ref: refs/heads/main",
    "__MACOSX/._0.png": b"\0\5\x16\7\0\2\0\0Mac OS X",
    "notes.txt": b"mine",
}


def salt(folder: Path) -> None:
    for name, content in SALT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@dataclass(frozen=True)
class Case:
    words: tuple[str, ...]
    """Of the command; {} stands for the folder of inputs."""
    folders: tuple[str, ...]
    """Folders of the inputs that are salted."""


SAMPLE = ("launch/sample.py", "--checkpoint={}/run", "--out=out", "--count=3", "--steps=2")
CASES = {
    "train on shards": Case(
        ("launch/train.py", "--config={}/config.json", "--out=out", "--data.path={}/shards"),
        ("shards",),
    ),
    "resume": Case(
        ("launch/train.py", "--config={}/run", "--out={}/run", "--training.steps=6",
            "--log.keep-checkpoints=9"),
        ("run", "run/checkpoints", "run/checkpoints/step-00000004",
         "run/checkpoints/step-00000004/ema", "run/checkpoints/step-00000002/model"),
    ),
    "sample": Case(SAMPLE, ("run", "run/checkpoints", "run/checkpoints/step-00000004")),
    "sample from a checkpoint": Case(
        (*SAMPLE, "--checkpoint={}/run/checkpoints/step-00000002"),
        ("run/checkpoints/step-00000002", "run/checkpoints/step-00000002/ema"),
    ),
    "sample more": Case((*SAMPLE[:2], "--out={}/samples", "--count=14", "--steps=2"), ("samples",)),
    "images": Case((*SAMPLE, "--images={}/images"), ("images",)),
    "images that were sampled": Case((*SAMPLE, "--images={}/samples"), ("samples",)),
    "evaluate samples": Case(
        ("launch/evaluate.py", "--samples={}/samples", "--data={}/shards", "--features=digits",
         "--metrics=fid", "--cache={}/../cache", "--out=out"),
        ("samples", "shards"),
    ),
    "evaluate images": Case(
        ("launch/evaluate.py", "--samples={}/images", "--data={}/shards", "--features=digits",
         "--metrics=fid", "--cache={}/../cache", "--out=out"),
        ("images",),
    ),
    "pack": Case(("launch/make_shards.py", "{}/images", "--out=out"), ("images",)),
    "pack classes": Case(
        ("launch/make_shards.py", "{}/classes", "--out=out"),
        ("classes", "classes/a", "classes/b"),
    ),
    "index": Case(("launch/make_shards.py", "index", "{}/foreign"), ("foreign",)),
    "verify shards": Case(("launch/make_shards.py", "verify", "{}/shards"), ("shards",)),
    "list checkpoints": Case(("launch/checkpoints.py", "list", "{}/run"), ("run/checkpoints",)),
    "verify checkpoints": Case(
        ("launch/checkpoints.py", "verify", "{}/run"),
        ("run/checkpoints", "run/checkpoints/step-00000002",
         "run/checkpoints/step-00000002/ema"),
    ),
    "prune checkpoints": Case(
        ("launch/checkpoints.py", "prune", "{}/run", "--delete"), ("run/checkpoints",)
    ),
    "average checkpoints": Case(
        ("launch/checkpoints.py", "average", "{}/run", "--out=out"), ("run/checkpoints",)
    ),
    "export": Case(
        ("launch/export.py", "--checkpoint={}/run", "--out={}/export"),
        ("run/checkpoints", "export"),
    ),
    "sample from an export": Case(
        (*SAMPLE, "--checkpoint={}/export"), ("export", "export/unet", "export/scheduler")
    ),
    "figures": Case(
        ("launch/visualize.py", "--checkpoint={}/run", "--samples={}/samples", "--out=out",
         "--only=real-and-drawn"),
        ("samples", "shards"),
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs, without links, and the further folders that the cases need."""
    made = tmp_path_factory.mktemp("folders") / "inputs"
    shutil.copytree(inputs, made)
    for k, name in enumerate(("a", "b")):
        (made / "classes" / name).mkdir(parents=True)
        shutil.copy(made / "images" / f"{k}.png", made / "classes" / name)
    (made / "foreign").mkdir()
    for shard in (made / "shards").glob("*.tar"):
        shutil.copy(shard, made / "foreign")
    ended = run_script(
        "launch/export.py", f"--checkpoint={made / 'run'}", f"--out={made / 'export'}", cwd=made
    )
    assert ended.returncode == 0, ended.stderr
    return made


Outcome = tuple[str, dict[str, bytes | str | None]]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_the_folder_without_them(
    name: str, folders: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    outcomes: list[dict[str, bytes | str | None]] = []
    for spoil in (lambda _: None, salt):
        # Of the same name both times, since manifests record paths.
        work = tmp_path / "work"
        shutil.copytree(folders, work / "inputs")
        for folder in case.folders:
            spoil(work / "inputs" / folder)
        before = {name: content for name, content in contents(work).items() if is_salt(name)}
        words = [word.replace("{}", str(work / "inputs")) for word in case.words]
        ended = run_script(
            *words, cwd=work, environment={"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        after = contents(work)
        assert {name: after.get(name) for name in before} == before, "what is a person's stays"
        outcomes.append({name: content for name, content in after.items() if not is_salt(name)})
        shutil.rmtree(work)
    unsalted, salted = outcomes
    assert unsalted.keys() == salted.keys()
    assert [name for name in salted if result(salted, name) != result(unsalted, name)] == []


def is_salt(name: str) -> bool:
    """Whether a path is of the salt, or lies in a folder that is."""
    first = {Path(salted).parts[0] for salted in SALT}
    return bool(first & set(Path(name).parts))


def result(files: dict[str, bytes | str | None], name: str) -> bytes | str | None:
    """What a file of the same name holds after the same work."""
    content = files[name]
    if Path(name).name in ("lock", "metrics.jsonl", "manifest.json"):  # with times, and hashes
        return None
    if isinstance(content, bytes) and name.endswith(".safetensors"):
        # The header's entries come in any order.
        return content[8 + int.from_bytes(content[:8], "little") :]
    return content
