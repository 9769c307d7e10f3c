"""Two ranks on one machine that train on a remote set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.data.conftest import Server
from tests.data.sets import pack
from tests.distributed.launching import Job, launch, losses

from ddpm_engine.config import RunConfig


def run_at(config: RunConfig, name: str, steps: int = 10, **data: Any) -> RunConfig:
    """Epochs of 40 samples are five steps of 8."""
    return replace(
        config,
        out=config.out.with_name(name),
        model=replace(config.model, num_class_embeds=41),
        training=replace(config.training, steps=steps, batch_size=8),
        data=replace(config.data, **data),
    )


def test_two_ranks_share_one_cache(config: RunConfig, server: Server, tmp_path: Path) -> None:
    folder = pack(server.folder / "set", count=40, per_shard=2)
    local = run_at(config, "local", steps=5, path=folder)
    remote = run_at(config, "remote", steps=5, path=f"{server.url}/set", cache=tmp_path / "cache")
    launch([Job(local), Job(remote)], 2)
    fetched = Counter(server.requests)
    # Both ranks read the manifest; which of them fetches a shard or an index, once, is open.
    assert fetched.pop("/set/manifest.json") == 2
    assert fetched == Counter(
        {f"/set/{f.name}": 1 for f in folder.iterdir() if f.suffix != ".json"}
    )
    assert losses(remote.out) == losses(local.out)


@pytest.mark.slow
def test_two_ranks_share_a_cache_that_is_too_small(
    config: RunConfig, server: Server, tmp_path: Path
) -> None:
    """With room for a tenth of the set, a rank may have to fetch what the other has evicted."""
    folder = pack(server.folder / "set", count=40, per_shard=2)
    settings: dict[str, Any] = {
        "window_shards": 1, "workers": 2, "cache": tmp_path / "cache", "cache_gb": 5e-5,
    }  # fmt: skip
    local = run_at(config, "local", path=folder, **settings)
    remote = run_at(config, "remote", path=f"{server.url}/set", **settings)
    outputs = launch([Job(local), Job(remote)], 2)
    assert len(server.requests) > 2 + 2 * 20
    assert not any("unreadable" in output for output in outputs)
    assert losses(remote.out) == losses(local.out)


def test_two_ranks_stream_independently_and_resume(config: RunConfig, server: Server) -> None:
    pack(server.folder, count=40, per_shard=2)
    pattern = f"{server.url}/shard-{{000000..000019}}.tar"
    run = replace(
        run_at(config, "run", path=pattern), model=replace(config.model, num_class_embeds=None)
    )
    half = replace(run, training=replace(run.training, steps=5))
    outputs = launch([Job(half, trace=f"{run.out}-first")], 2)
    assert "with replacement" in outputs[0]
    outputs = launch([Job(run, trace=f"{run.out}-second")], 2)
    assert "from step 5\n" in outputs[0]
    assert len(losses(run.out)) == 10

    traces = [
        [line.split() for line in Path(f"{run.out}-{leg}.{rank}").read_text().splitlines()]
        for leg in ("first", "second")
        for rank in (0, 1)
    ]
    # Positions, and with them noise and timesteps, are those of the step and of the rank's share.
    for rank in (0, 1):
        places = [int(row[0]) for leg in (0, 2) for row in traces[leg + rank]]
        assert places == [8 * step + 4 * rank + i for step in range(10) for i in range(4)]
    # Four samples of 20 out of 40 images: no two are equal by chance.
    images = {tuple(row[1] for row in trace) for trace in traces}
    assert len(images) == 4
