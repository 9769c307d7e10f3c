"""Which item runs when, and how each ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks.gpu.items
import pytest
from benchmarks.gpu import schedule
from benchmarks.gpu.item import Item
from benchmarks.gpu.processes import Running, Settings
from benchmarks.gpu.results import End, Results
from tests.gpu import fakes
from tests.gpu.fakes import item


class Simulated:
    """Items that take as long as their option `takes` says, by a clock that does not wait."""

    def __init__(self, folder: Path) -> None:
        self.results = Results(folder, dry=True)
        self.now = 0.0
        self.events: list[str] = []
        self.limits: dict[str, float] = {}
        self.running: set[str] = set()
        self.most = 0

    def launch(self, item: Item, attempt: int, limit: float) -> _Job:
        self.events.append(f"+{item.name}")
        self.limits[item.name] = limit
        self.running.add(item.name)
        self.most = max(self.most, len(self.running))
        return _Job(self, item, attempt, self.now + min(limit, float(item.options["takes"])))

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def run(self, items: Sequence[Item], budget: float, jobs: int = 4) -> dict[str, str]:
        ends: dict[str, str] = {}
        schedule.run(
            schedule.pending(items, self.results, again=False), self.launch, self.results, budget,
            jobs, lambda end: ends.update({end.item: end.status}), lambda: self.now, self.wait,
        )  # fmt: skip
        return ends


class _Job:
    def __init__(self, of: Simulated, item: Item, attempt: int, until: float) -> None:
        self.of, self.item, self.attempt, self.until = of, item, attempt, until
        self.killed = False

    def poll(self) -> End | None:
        if self.of.now < self.until:
            return None
        self.of.running.discard(self.item.name)
        self.of.events.append(f"-{self.item.name}")
        status = "failed" if self.item.options.get("fails") else "done"
        return End(self.item.name, self.attempt, status, 1.0, "")  # type: ignore[arg-type]

    def kill(self) -> None:
        self.killed = True
        self.of.running.discard(self.item.name)


def test_items_run_alone_and_groups_together(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)
    together = [item(name, "x", takes=3, together="group") for name in "bcd"]
    simulated.run([item("a", "x", takes=1), *together, item("e", "x", takes=1)], 100, jobs=2)
    assert simulated.most == 2
    assert simulated.events[:4] == ["+a", "-a", "+b", "+c"]
    assert set(simulated.events[4:7]) == {"-b", "-c", "+d"}
    assert simulated.events[-3:] == ["-d", "+e", "-e"]


def test_what_no_longer_fits_is_skipped_and_smaller_items_still_run(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)
    items = [
        item("first", "x", estimate=10, limit=60, takes=50),
        item("large", "x", estimate=50, takes=1),
        item("small", "x", estimate=10, limit=60, takes=1),
    ]
    ends = simulated.run(items, budget=100)
    assert ends == {"first": "done", "large": "skipped", "small": "done"}
    assert simulated.limits["first"] == 60
    # Not its own limit: the budget is nearly over.
    assert simulated.limits["small"] == pytest.approx(100 - schedule.RESERVE - 50, abs=0.2)
    (skipped,) = [end for end in simulated.results.ends().values() if end.status == "skipped"]
    assert "needs 50 s, 45 s are left" in skipped.message or "44 s" in skipped.message
    assert simulated.run(items, budget=100) == {"large": "done"}


def test_a_failure_is_retried_once(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)
    items = [item("a", "x", takes=1, fails=True)]
    assert [simulated.run(items, 100) for _ in range(3)] == [{"a": "failed"}, {"a": "failed"}, {}]
    assert schedule.pending(items, simulated.results, again=True) == items


def test_an_interruption_kills_what_runs(tmp_path: Path) -> None:
    simulated = Simulated(tmp_path)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    simulated.wait = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        simulated.run([item("a", "x", takes=9)], 100)
    assert simulated.running == set()
    # It began and has no end: that counts as a failure.
    assert simulated.results.attempts() == {"a": 1}
    assert simulated.results.ends() == {}


def test_results_of_a_rehearsal_and_of_a_gpu_do_not_mix(tmp_path: Path) -> None:
    dry, real = Results(tmp_path, dry=True), Results(tmp_path, dry=False)
    dry.end(End("a", 1, "done", 1.0, ""))
    assert "a" in dry.ends()
    assert real.ends() == {}


def test_rows_are_those_of_the_last_attempt(tmp_path: Path) -> None:
    results = Results(tmp_path, dry=True)
    for attempt, value in ((1, 1), (1, 2), (2, 3)):
        results.add_row("a", attempt, {"x": value})
    with results.path.open("a") as file:
        file.write('{"torn')
    results.add_row("a", 2, {"x": 4})
    assert results.rows() == {"a": [{"x": 3}, {"x": 4}]}
    assert json.loads(results.path.read_text().splitlines()[-1])["row"] == {"x": 4}


# --- Processes


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.items.fakes", fakes)
    monkeypatch.setattr(benchmarks.gpu.items, "fakes", fakes, raising=False)
    return Settings(tmp_path / "out", dry=True)


def ended(running: Running) -> End:
    deadline = time.monotonic() + 60
    while (end := running.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return end


def test_an_item_past_its_limit_is_killed_with_all_that_it_started(
    settings: Settings, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    end = ended(Running(item("a", "slow", marker=str(marker)), settings, 1, limit=2.0))
    assert end.status == "killed"
    assert 2 <= end.seconds < 30
    for pid in map(int, marker.read_text().split()):
        stat = Path(f"/proc/{pid}/stat")
        deadline = time.monotonic() + 10
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert Results(settings.out, dry=True).rows() == {"a": [{"what": "began"}]}


def test_items_of_a_group_meet(settings: Settings, tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("one", "two")]
    ends: list[End] = []
    items = [
        item(name, "meet", own=own, other=other, together="group")
        for name, own, other in zip("ab", places, reversed(places), strict=True)
    ]

    def launch(item: Item, attempt: int, limit: float) -> Running:
        return Running(item, settings, attempt, limit)

    schedule.run(items, launch, Results(settings.out, dry=True), 120, 2, ends.append)
    assert [end.status for end in ends] == ["done", "done"]


def test_how_items_end(settings: Settings) -> None:
    ends = {
        name: ended(Running(item(name, name), settings, 1, 60))
        for name in ("good", "bad", "absent")
    }
    assert {name: end.status for name, end in ends.items()} == {
        "good": "done", "bad": "failed", "absent": "not here",
    }  # fmt: skip
    assert ends["absent"].message == "no such field"
    # Scratch of what went well is gone, and the log of what did not is kept.
    assert {path.name for path in (settings.work / "items").iterdir()} == {"bad", "absent"}
    assert "it does not hold" in (settings.out / "log.txt").read_text()
