"""Options of sampling, evaluation and figures that cannot work are refused, and nothing begun."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
Refused = Callable[..., str]


@pytest.fixture
def trained(inputs: Path) -> Path:
    """A class-conditional run."""
    return inputs / "run"


@pytest.fixture
def refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:  # fmt: skip
    """Run a script that must refuse: in one line, without a trace in the folder. The line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def start(script: str, *arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        path = str(LAUNCH / f"{script}.py")
        given = {"--samples"} if script == "evaluate" else {"--toy"}
        source = () if given.intersection(arguments) else ("--checkpoint", trained)
        line = [path, "--out", tmp_path / "out", *source, *arguments]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in line])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(path, run_name="__main__")
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        assert said.count("\n") == 1
        assert set(tmp_path.rglob("*")) == before
        return said

    return start


DDIM = ("--sampler", "ddim", "--steps", 2)
DIGITS = ("--features", "digits", *DDIM)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(
    ("script", "option", "others"),
    [
        ("sample", "guidance-scale", ()),
        ("sample", "guidance-rescale", ("--guidance-scale", 2)),
        ("sample", "threshold", ()),
        ("sample", "eta", ()),
        ("evaluate", "guidance-scale", ()),
        ("evaluate", "eta", ()),
    ],
)
def test_numbers_that_are_not_finite(
    script: str, option: str, others: tuple[object, ...], value: str, refused: Refused
) -> None:
    assert f"--{option} is " in refused(script, *DDIM, *others, f"--{option}={value}")


@pytest.mark.parametrize(
    ("script", "option", "values"),
    [
        ("sample", "seed", (2**64, -(2**63) - 1, 2**100)),
        ("sample", "count", (0, -1, 2**40, 2**56, 2**57, 2**100)),
        ("sample", "ids", (2**56, 2**63, -1)),
        ("sample", "batch-size", (0, -1, 2**100)),
        ("sample", "steps", (0, 2**31, 2**100)),
        ("sample", "cache-interval", (0, 2**100)),
        ("sample", "interpolate", (f"0,{2**56}", "1,-1")),
        ("sample", "class-labels", (11, 2**63, -1)),
        pytest.param("evaluate", "seed", (2**64, 2**100), marks=pytest.mark.slow),
        pytest.param("evaluate", "count", (0, 2**40, 2**56, 2**100), marks=pytest.mark.slow),
        pytest.param("evaluate", "batch-size", (0, 2**100), marks=pytest.mark.slow),
        pytest.param("evaluate", "piece", (0, 2**40, 2**100), marks=pytest.mark.slow),
        pytest.param("evaluate", "reference-count", (0, -1, 2**100), marks=pytest.mark.slow),
        pytest.param("visualize", "seed", (2**64, 2**100), marks=pytest.mark.slow),
        pytest.param("visualize", "count", (1, 1001, 2**100), marks=pytest.mark.slow),
        pytest.param("visualize", "steps", (0, 1001, 2**100), marks=pytest.mark.slow),
        pytest.param("visualize", "ids", ((2**56, 1), (-1, 2), (3, 3)), marks=pytest.mark.slow),
    ],
)
def test_numbers_out_of_range(
    script: str, option: str, values: tuple[object, ...], refused: Refused
) -> None:
    others = {
        "sample": DDIM if option != "steps" else (), "evaluate": DIGITS, "visualize": (),
    }[script]  # fmt: skip
    for value in values:
        words = value if isinstance(value, tuple) else (value,)
        named = refused(script, *others, f"--{option}", *words)
        assert f"--{option}" in named
        assert any(str(word).split(",")[-1] in named or int(word) > 2**32 for word in words)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--count", 2**36), "--count asks for at least"),
        (("--count", 2**25, "--per-shard", 2**25, "--format", "npz"), "--per-shard is 33554432"),
    ],
)
def test_amounts_that_do_not_fit(
    arguments: tuple[object, ...], named: str, refused: Refused
) -> None:
    assert named in refused("sample", *DDIM, *arguments)


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("sample", ("--ids", "3,4", "--count", 5), "--count is 5, but --ids names 2"),
        ("sample", ("--sampler", "ddim", "--variance", "fixed_small"), "--variance does nothing"),
        ("sample", ("--guidance-scale", 2, "--guidance-interval", 1e6, 1e7, *DDIM), "none of"),
        ("sample", ("--spacing", "leading", "--steps", 1), "take trailing --spacing"),
        ("sample", ("--timesteps", "5,0"), "--timesteps begins at 5"),
        ("evaluate", ("--metrics", "nll", "--steps", 10), "--steps does nothing with --metrics"),
        ("evaluate", ("--metrics", "nll", "--guidance-scale", 3), "--guidance-scale does nothing"),
        ("evaluate", ("--metrics", "nll", "--features", "digits"), "--features does nothing"),
        ("evaluate", ("--metrics", "nll", "--reference-count", 9), "--reference-count does"),
        ("evaluate", ("--metrics", "nll", "--piece", 9), "--piece does nothing"),
        ("evaluate", (*DIGITS, "--eta", 0.5, "--sampler", "ddpm"), "--eta does nothing"),
        ("evaluate", (*DIGITS, "--inception-weights", "x"), "--inception-weights does nothing"),
        ("evaluate", ("--samples", "x", "--steps", 3), "--steps does nothing with --samples"),
        ("evaluate", ("--samples", "x", "--batch-size", 3), "--batch-size does nothing"),
        ("evaluate", ("--samples", "x", "--weights", "model"), "--weights does nothing"),
        ("evaluate", (*DIGITS, "--spacing", "leading", "--steps", 1), "take trailing --spacing"),
        ("visualize", ("--only", "loss", "--seed", 3), "--seed does nothing with --only loss"),
        ("visualize", ("--only", "reverse", "--photo", "x"), "--photo does nothing"),
        ("visualize", ("--only", "forward", "--count", 300), "--count does nothing"),
        ("visualize", ("--only", "reverse", "--timesteps", "3"), "--timesteps does nothing"),
        ("visualize", ("--only", "quality", "--ids", 1, 2), "--ids does nothing"),
        ("visualize", ("--only", "real-and-drawn", "--samples", "x", "--steps", 3), "--steps does"),
        ("visualize", ("--toy", "moons", "--steps", 3), "--steps does nothing with --toy moons"),
    ],
)
def test_options_that_do_nothing_or_lead_nowhere(
    script: str, arguments: tuple[object, ...], named: str, refused: Refused
) -> None:
    assert named in refused(script, *arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--count", 15), ["kid needs at least 20 samples", "is needs at least 20 samples"]),
        (("--count", 30, "--reference-count", 3), ["kid needs at least 20 real images",
                                                   "precision-recall needs at least 4 real"]),
        (("--metrics", "fid", "--count", 1), ["fid needs at least 2 samples, and there are 1"]),
        (("--metrics", "fid,accuracy", "--count", 30, "--class-labels", "none"),
         ["accuracy, which needs the class of each sample"]),
        (("--metrics", "fid,nll", "--count", 30, "--variance", "learned_range", "--sampler",
          "ddpm"), ["network has 1 outputs"]),
        (("--metrics", "fid", "--count", 30, "--data", "nowhere"), ["no folder of shards"]),
    ],
)  # fmt: skip
def test_what_is_known_beforehand_is_said_before_anything_is_generated(
    arguments: tuple[object, ...], named: list[str], refused: Refused
) -> None:
    said = refused("evaluate", *DIGITS, *arguments)
    assert all(part in said for part in named)


def test_folders_that_are_files(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for script, others in [
        ("sample", (*DDIM, "--count", 1)),
        ("visualize", ("--only", "schedules")),
    ]:
        for out in (file, file / "in"):
            assert f"--out {out}" in refused(script, *others, "--out", out)
    assert file.read_text() == "mine"


def test_nothing_is_refused_that_is_a_default(refused: Refused) -> None:
    defaults = ("--seed", 0, "--weights", "ema", "--batch-size", "auto", "--precision", "auto")
    wrong = ("--samples", "nowhere", "--data", "nowhere", *defaults)
    assert "no folder --samples nowhere" in refused("evaluate", *wrong)


def test_images_that_cannot_be_read_claim_no_folder(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert "bad.png" in refused("sample", *DDIM, "--images", tmp_path / "bad.png")
