"""The table of tiles: what a launch takes, and the file that may replace it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from ddpm_kernels import tiles
from ddpm_kernels.autotune import CANDIDATES, Work, fastest, main
from ddpm_kernels.dispatch import assume_gpu
from ddpm_kernels.tiles import LEAST, TILES, Tile, read_tiles, tile_for, trying, write_tiles

X = torch.zeros(1)


@pytest.fixture(autouse=True)
def _fresh_table() -> Iterator[None]:
    tiles._table.cache_clear()
    yield
    tiles._table.cache_clear()


@pytest.mark.parametrize("table", TILES)
def test_tiles_are_powers_of_two(table: str) -> None:
    for tile in TILES[table].values():
        assert tile.elements >= LEAST
        assert all(value & (value - 1) == 0 for value in (tile.elements, tile.warps))


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_123", "gfx90a", "gfx942"])
def test_a_name_takes_its_family_and_then_the_default(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(TILES, "sm_90", {"q_sample": Tile(256, 1)})
    with assume_gpu(name):
        found = {operation: tile_for(operation, X) for operation in TILES["default"]}
    expected = dict(TILES["default"])
    if name.startswith("gfx"):
        expected |= TILES["gfx"]
    if name == "sm_90":
        expected |= {"q_sample": Tile(256, 1)}
    assert found == expected


@pytest.mark.parametrize("count", [1, 127, 128, 129, 257, 1024, 1025, 3072])
def test_fitted_covers_small_samples_with_as_much_work_a_thread(count: int) -> None:
    tile = Tile(1024, 2).fitted(count)
    assert tile.elements >= min(count, 1024)
    assert tile.elements < 2 * max(count, LEAST)
    assert tile.warps == max(1, tile.elements // 512)


def test_a_file_replaces_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiles.json"
    written = {"sm_90": {"q_sample": Tile(2048, 4), "group_norm_silu": Tile(4096, 8, 3, 1024)}}
    write_tiles(file, written)
    assert json.loads(file.read_text())["sm_90"]["group_norm_silu"] == {
        "elements": 4096, "warps": 8, "stages": 3, "programs": 1024
    }  # fmt: skip
    assert read_tiles(file) == written
    monkeypatch.setenv("DDPM_TILES", str(file))
    with assume_gpu("sm_90"):
        assert tile_for("q_sample", X) == Tile(2048, 4)
        assert tile_for("denoising_loss", X) == TILES["default"]["denoising_loss"]
    with assume_gpu("sm_80"):
        assert tile_for("q_sample", X) == TILES["default"]["q_sample"]


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text('{"sm_90": {"q_sample": [2048, 4]}}')
    assert read_tiles(file) == {"sm_90": {"q_sample": Tile(2048, 4)}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "tiles.json is no table of tiles"),
        ("{", "tiles.json is no table of tiles"),
        ("[]", "tiles.json is no table of tiles"),
        ('{"sm_90": {"q_sample": [1024]}}', "tiles.json is no table of tiles"),
        ('{"sm_90": {"conv": [1024, 2]}}', "names 'conv'; choose from q_sample, "),
        ('{"sm_90": {"q_sample": {"elements": 1024, "size": 2}}}', "tiles.json is no table"),
        (
            '{"sm_90": {"q_sample": [1000, 2]}}',
            "has 1000 elements for q_sample; it must be a",
        ),
        ('{"sm_90": {"q_sample": [1024, 0]}}', "has 0 warps for q_sample; it must be a positive"),
        ('{"sm_90": {"q_sample": [1024.0, 2]}}', "has 1024.0 elements for q_sample"),
        ('{"sm_90": {"q_sample": [1024, 2, "all"]}}', "has 'all' stages for q_sample"),
        ('{"sm_90": {"q_sample": [64, 1]}}', "has 64 elements for q_sample; it must be at least"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    file = tmp_path / "tiles.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("DDPM_TILES", str(file))
    with assume_gpu("sm_90"), pytest.raises(ValueError, match="DDPM_TILES") as caught:
        tile_for("q_sample", X)
    assert message in str(caught.value)


def test_autotuning_takes_what_is_fastest_over_all_sizes() -> None:
    """Times by a rule: the second size weighs as much as the first, and one tile cannot run."""
    winner, cannot = Tile(2048, 4), Tile(4096, 8)
    sizes = {"small": 1.0, "large": 100.0}

    def seconds(work: Work) -> float:
        tile, size = tile_for("q_sample", X), sizes[str(work())]
        if tile == cannot:
            raise RuntimeError("out of resources")
        if tile == winner:
            return 0.5 * size
        return size * (1 + abs(math.log2(tile.elements / 1024)))

    works: list[Work] = [lambda: "small", lambda: "large"]
    assert {winner, cannot} <= set(CANDIDATES)
    assert fastest("q_sample", works, Tile(1024, 2), seconds) == (winner, pytest.approx(0.5))
    # Where nothing is faster, the table's own tile stays.
    assert fastest("q_sample", [lambda: 0], Tile(1024, 2), lambda _: 1.0) == (Tile(1024, 2), 1.0)


def test_autotuning_varies_stages_and_programs_of_norms_at_the_best_tile() -> None:
    tried: list[Tile] = []

    def seconds(operation: str, _: Work) -> float:
        tile = tile_for(operation, X)
        tried.append(tile)
        apart = abs(math.log2(tile.elements / 4096)) + abs(tile.warps - 8)
        return 1 + apart + abs(tile.stages - 3) + abs(math.log2(tile.programs / 1024))

    norm = "group_norm_silu"
    found, ratio = fastest(norm, [lambda: 0], Tile(2048, 4), partial(seconds, norm))
    assert found == Tile(4096, 8, 3, 1024)
    assert ratio == pytest.approx(1 / 9)
    assert len(tried) == len(set(tried))
    tried.clear()
    fastest("q_sample", [lambda: 0], Tile(1024, 2), partial(seconds, "q_sample"))
    assert {(tile.stages, tile.programs) for tile in tried} == {(1, 512)}


def test_trying_is_undone() -> None:
    with trying("q_sample", Tile(256, 1)):
        with trying("q_sample", Tile(512, 1)):
            assert tile_for("q_sample", X) == Tile(512, 1)
        assert tile_for("q_sample", X) == Tile(256, 1)
    assert tile_for("q_sample", X) == TILES["default"]["q_sample"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_autotuning_without_a_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", "--out", str(tmp_path / "t.json")])
    with pytest.raises(SystemExit, match="autotuning needs a GPU and Triton"):
        main()
    assert not list(tmp_path.iterdir())
