"""Ranks of a node keep to the cores that their GPUs are attached to."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm_engine import runtime
from ddpm_engine.runtime import local_device, use_nearest_cores

GPU = torch.device("cuda", 3)


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[set[int]]:
    """What a process with cores 0 to 31 lets itself be moved to; its GPU is near to 16 to 47."""
    moved: list[set[int]] = []
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, to: moved.append(to), raising=False)
    monkeypatch.setattr(runtime, "_PCI", tmp_path)
    folder = tmp_path / "0000:dc:01.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text("16-30,40-47,63\n")
    return moved


def test_it_keeps_those_that_it_may_use(set_to: list[set[int]]) -> None:
    use_nearest_cores(GPU)
    assert set_to == [set(range(16, 31))]


@pytest.mark.parametrize("listed", ["", "\n", "48-63\n", "all\n", None])
def test_nothing_changes_where_none_are_known(
    listed: str | None, set_to: list[set[int]], tmp_path: Path
) -> None:
    file = tmp_path / "0000:dc:01.0" / "local_cpulist"
    file.unlink() if listed is None else file.write_text(listed)
    use_nearest_cores(GPU)
    assert set_to == []


def test_nothing_changes_where_torch_does_not_say_where_a_gpu_is(
    set_to: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace())
    use_nearest_cores(GPU)
    assert set_to == []


@pytest.mark.parametrize(("ranks", "expected"), [(None, 0), ("1", 0), ("8", 1)])
def test_a_process_with_the_machine_to_itself_keeps_all(
    ranks: str | None, expected: int, set_to: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert local_device() == GPU
    assert len(set_to) == expected
