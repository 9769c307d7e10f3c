"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

# Before anything imports torch: scripts run in forks, in which OpenMP waits for threads that the
# fork has not got.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeShards = Callable[..., Path]


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Pack the first `n` of scikit-learn's digits, grey and labelled, at some size."""
    from ddpm_engine.data.packing.pack import write_shards
    from ddpm_engine.data.packing.sources.registry import open_source

    def make(n: int, size: int = 8, per_shard: int = 40) -> Path:
        folder = tmp_path_factory.mktemp("data") / "shards"
        source = open_source("digits")
        few = replace(source, examples=source.examples[:n])
        write_shards(few, folder, size=size, per_shard=per_shard)
        return folder

    return make


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its first settings for the process; forget them between tests."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A test that leaves torch with several threads lets a later fork wait for them forever."""
    yield
    if (torch := sys.modules.get("torch")) and (threads := torch.get_num_threads()) != 1:
        torch.set_num_threads(1)
        pytest.fail(f"this test leaves torch with {threads} threads")
