"""Compiled code is kept on this machine, in a folder that nobody else can write to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ddpm_engine.runtime import CACHES, use_local_compile_cache


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for variable in CACHES:
        # Set and deleted, so that what the function sets is undone after the test.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return tmp_path


def test_a_private_folder_of_this_user(temporary: Path) -> None:
    for _ in range(2):
        use_local_compile_cache()
    (folder,) = temporary.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(os.getuid()) in folder.name
    assert {os.environ[variable] for variable in CACHES} == {
        str(folder / "triton"),
        str(folder / "inductor"),
    }


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    use_local_compile_cache()
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    assert "TORCHINDUCTOR_CACHE_DIR" in os.environ


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_folder_that_others_could_fill_is_not_used(
    temporary: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = temporary / f"ddpm-engine-{os.getuid()}"
    if kind == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(temporary / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    use_local_compile_cache()
    assert not set(CACHES) & set(os.environ)
    assert f"{folder} belongs to someone else or is open to others" in caplog.text
