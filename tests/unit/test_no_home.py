"""Users without a home directory, or unknown to the system, as in many containers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_engine.cache_directories import provide_for_no_home, user_cache
from ddpm_engine.data.remote.cache import default_cache_directory
from ddpm_engine.errors import UserError
from ddpm_engine.evaluation.feature_networks import default_cache
from ddpm_engine.runtime import CACHES, use_local_compile_cache

_LIBRARIES = ("XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")


def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")


Homeless = Callable[[pytest.MonkeyPatch], None]
HOMELESS = pytest.mark.parametrize("homeless", [unknown, null])


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this node."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for variable in (*_LIBRARIES, *CACHES):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return tmp_path / f"ddpm-engine-{os.getuid()}"


@HOMELESS
def test_caches_are_on_the_node(
    node: Path, monkeypatch: pytest.MonkeyPatch, homeless: Homeless
) -> None:
    homeless(monkeypatch)
    assert user_cache("indexes") == node / "indexes"
    assert default_cache() == node / "evaluation"


@HOMELESS
def test_libraries_get_a_folder(
    node: Path, monkeypatch: pytest.MonkeyPatch, homeless: Homeless
) -> None:
    homeless(monkeypatch)
    monkeypatch.setenv("HF_HOME", "/given")
    provide_for_no_home()
    assert os.environ["HF_HOME"] == "/given"
    assert os.environ["MPLCONFIGDIR"] == str(node / "matplotlib")
    assert (node / "matplotlib").is_dir()


def test_a_home_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    provide_for_no_home()
    assert not set(_LIBRARIES) & set(os.environ)
    assert user_cache("x") == tmp_path / "home" / ".cache" / "ddpm-engine" / "x"


@HOMELESS
def test_without_any_folder_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, homeless: Homeless, caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    homeless(monkeypatch)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    provide_for_no_home()
    use_local_compile_cache()
    assert "compilers keep it by default" in caplog.text
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder"):
        user_cache("evaluation")
    with pytest.raises(UserError, match=r"give one by `data\.cache`"):
        default_cache_directory()
