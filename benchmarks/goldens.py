"""Record what training, distillation, sampling and evaluation compute, and compare two recordings:

    python benchmarks/goldens.py record --tree BEFORE --out /tmp/goldens/before
    python benchmarks/goldens.py record --tree . --out /tmp/goldens/after
    python benchmarks/goldens.py compare /tmp/goldens/before /tmp/goldens/after

A change that is not meant to change results must leave every array equal to the bit. Only the
command lines below and the files they write are used, so that both trees may be built differently
inside. Record both trees on the same machine with the same libraries: other processors round
differently. A recording takes about five minutes and 600 MB.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

TRAIN = (
    "--training.steps 20 --training.batch-size 16 --training.ema-decay 0.9 "
    "--optimizer.warmup-steps 5 --data.workers 0 --log.every 1 --log.sample-every 0 "
    "--log.tracker none"
)
DIGITS = f"{TRAIN} --data.path data/digits --data.source digits"
PHOTOS = f"{TRAIN} --training.batch-size 8 --data.path data/photos --data.source photos"
DISTILL = "--steps 2 --training.steps 8 --log.every 1 --log.sample-every 0 --data.workers 0"
SAMPLE = "--count 8 --format npz"
CHAIN = "--diffusion.timesteps 100 --sampling.steps 50"
LEARNED_VARIANCE = (
    "--objective.learned-variance --model.out-channels 2 --sampling.variance learned_range"
)
DIGIT_FEATURES = (
    "--metrics fid,kid,is,precision-recall,accuracy --features digits --cache cache "
    "--reference-count 200 --count 64 --sampler ddim --steps 3"
)

# Name → script and arguments; `--out NAME` is added. A name's first part says which folder it is
# in, and later cases use what earlier ones wrote. Every line of TRAINING is a separate process;
# those of INFERENCE share one.
TRAINING = {
    "train/digits": f"train --preset digits {DIGITS}",
    "train/classes": f"train --preset digits-classes {DIGITS} --log.sample-every 20 "
    "--log.sample-count 4 --log.sample-steps 3",
    "train/upscale": f"train --preset digits-upscale {DIGITS}",
    "train/edm": f"train --preset digits-edm {DIGITS}",
    "train/photos": f"train --preset photos {PHOTOS}",
    "train/learned-variance": f"train {DIGITS} {LEARNED_VARIANCE} {CHAIN}",
    "train/min-snr": f"train {DIGITS} --objective.weighting min-snr",
    "train/p2": f"train {DIGITS} --objective.weighting p2 --objective.offset-noise 0.1",
    "train/vlb": f"train {DIGITS} --objective.weighting vlb --diffusion.schedule sigmoid "
    "--objective.timestep-sampling logit-normal",
    "train/importance": f"train {DIGITS} --objective.timestep-sampling importance "
    "--diffusion.timesteps 4 --sampling.steps 4 --log.sample-steps 4",
    "train/v": f"train {DIGITS} --diffusion.prediction v {CHAIN}",
    "train/x0": f"train {DIGITS} --diffusion.prediction x0",
    "train/zero-terminal-snr": f"train {DIGITS} --diffusion.prediction v "
    "--diffusion.schedule cosine --diffusion.zero-terminal-snr",
    "train/ema-profiles": f"train {DIGITS} --training.ema-profiles 0.05 0.2 --log.snapshot-every 5",
    "train/scale-shift": f"train --preset digits-classes {DIGITS} --model.dropout 0.1 "
    "--model.resnet-time-scale-shift scale_shift --model.attention-head-dim 16 "
    "--training.accumulation 2 --training.recompute blocks --data.horizontal-flip",
    "train/edm-classes": f"train --preset digits-edm {DIGITS} --model.num-class-embeds 11",
    # The same run, stopped after the tenth step and resumed.
    "train/resumed-0": f"train --out train/resumed {DIGITS} --training.steps 10",
    "train/resumed": f"train {DIGITS}",
    "distill/progressive": f"distill --teacher train/classes {DISTILL} --start-steps 8 "
    "--guidance-scale 2",
    "distill/consistency": f"distill --teacher train/classes {DISTILL} --start-steps 8 "
    "--guidance-scale 2 --method consistency",
    "distill/moments": f"distill --teacher train/classes {DISTILL} --guidance-scale 2 "
    "--method moments --student distill/progressive",
    "distill/edm": f"distill --teacher train/edm {DISTILL} --start-steps 8",
    "distill/edm-consistency": f"distill --teacher train/edm {DISTILL} --start-steps 8 "
    "--method consistency",
}

_SOLVERS = {
    "ddpm-small": "--sampler ddpm --variance fixed_small --steps 5",
    "ddpm-large": "--sampler ddpm --variance fixed_large --steps 5",
    "ddim": "--sampler ddim --steps 5",
    "ddim-eta": "--sampler ddim --eta 0.5 --steps 5",
    "dpm++1": "--sampler dpm++1 --steps 5",
    "dpm++2m": "--sampler dpm++2m --steps 5",
    "dpm++3m": "--sampler dpm++3m --steps 5",
    "dpm++2m_sde": "--sampler dpm++2m_sde --steps 5",
    "unipc": "--sampler unipc --steps 5",
    "unipc3": "--sampler unipc3 --steps 5",
    "euler": "--sampler euler --steps 5",
    "heun": "--sampler heun --steps 5",
}
_GUIDED = f"sample --checkpoint train/classes {SAMPLE} --guidance-scale 3"
_CLASSES = f"sample --checkpoint train/classes {SAMPLE}"
INFERENCE = {
    **{f"sample/eps-{n}": f"{_CLASSES} {solver}" for n, solver in _SOLVERS.items()},
    **{
        f"sample/edm-{n}": f"sample --checkpoint train/edm {SAMPLE} {solver}"
        for n, solver in _SOLVERS.items()
        if not n.startswith("ddpm")
    },
    **{
        f"sample/{run}-{sampler}": f"sample --checkpoint train/{run} {SAMPLE} --steps 5 "
        f"--sampler {sampler}"
        for run in ("photos", "v", "x0", "zero-terminal-snr", "scale-shift")
        for sampler in ("ddpm", "unipc")
    },
    "sample/learned-range": f"sample --checkpoint train/learned-variance {SAMPLE} --sampler ddpm "
    "--variance learned_range --steps 5",
    "sample/learned-variance-ddim": f"sample --checkpoint train/learned-variance {SAMPLE} "
    "--sampler ddim --steps 5",
    "sample/leading": f"{_CLASSES} --sampler ddim --steps 5 --spacing leading",
    "sample/linspace": f"{_CLASSES} --sampler dpm++2m --steps 5 --spacing linspace",
    "sample/timesteps": f"{_CLASSES} --sampler ddim --timesteps 999,700,300,50,0",
    "sample/whole-chain": f"sample --checkpoint train/importance {SAMPLE} --sampler ddpm --steps 4",
    "sample/seed": f"{_CLASSES} --sampler ddim --steps 5 --seed 7 --weights model --batch-size 3",
    "sample/ids": f"{_CLASSES} --sampler ddpm --steps 5 --ids 3,17,40 --class-labels 3,1",
    "sample/no-class": f"{_CLASSES} --sampler ddim --steps 5 --class-labels none",
    "sample/guided": f"{_GUIDED} --sampler ddim --steps 5",
    "sample/guided-two-passes": f"{_GUIDED} --sampler ddim --steps 5 --two-passes",
    "sample/guided-options": f"{_GUIDED} --sampler dpm++2m --steps 6 --guidance-rescale 0.7 "
    "--guidance-interval 0.5 5",
    "sample/guided-edm": f"sample --checkpoint train/edm-classes {SAMPLE} --sampler heun --steps 5 "
    "--guidance-scale 2 --guidance-interval 0.3 10",
    "sample/guided-cached": f"{_GUIDED} --sampler unipc --steps 8 --cache-interval 3 "
    "--guidance-interval 0.5 1000",
    "sample/cached": f"{_CLASSES} --sampler ddim --steps 9 --cache-interval 3",
    "sample/threshold": f"{_GUIDED} --guidance-scale 9 --sampler ddpm --steps 5 --threshold 0.9",
    "sample/inpainting": f"{_CLASSES} --sampler ddpm --steps 5 --images images --mask mask.png",
    "sample/inpainting-resampled": f"{_CLASSES} --sampler ddpm --steps 5 --images images "
    "--mask mask.png --draws 3 --class-labels all",
    "sample/inpainting-ddim": f"{_CLASSES} --sampler ddim --steps 5 --images images "
    "--mask mask.png --strength 0.8",
    "sample/inpainting-edm": f"sample --checkpoint train/edm {SAMPLE} --sampler euler --steps 5 "
    "--images images --mask mask.png",
    "sample/image-to-image": f"{_CLASSES} --sampler ddim --steps 8 --images images --strength 0.6",
    "sample/image-to-image-edm": f"sample --checkpoint train/edm {SAMPLE} --sampler heun --steps 6 "
    "--images images",
    "sample/interpolated": f"{_CLASSES} --sampler ddim --steps 5 --interpolate 3,9",
    "sample/upscaled": f"sample --checkpoint train/upscale {SAMPLE} --sampler ddpm --steps 5 "
    "--low-resolution small",
    "sample/upscaled-augmented": f"sample --checkpoint train/upscale {SAMPLE} --sampler dpm++2m "
    "--steps 5 --low-resolution small --augmentation 50",
    "sample/png": "sample --checkpoint train/classes --count 24 --sampler ddim --steps 3",
    "sample/tar": "sample --checkpoint train/classes --count 12 --sampler ddim --steps 3 "
    "--format tar --per-shard 5",
    "sample/tar-npy": "sample --checkpoint train/photos --count 6 --sampler ddim --steps 3 "
    "--format tar-npy --per-shard 4",
    **{
        f"sample/distilled-{method}": f"sample --checkpoint distill/{method} {SAMPLE}"
        for method in ("progressive", "consistency", "moments", "edm", "edm-consistency")
    },
    "ema/0.1": "checkpoints ema train/ema-profiles --length 0.1",
    "sample/ema": f"sample --checkpoint ema/0.1 {SAMPLE} --sampler ddim --steps 5",
    "export/classes": "export --checkpoint train/classes",
    "sample/exported": f"sample --checkpoint export/classes {SAMPLE} --sampler ddim --steps 5",
    "evaluate/digits": f"evaluate --checkpoint train/classes {DIGIT_FEATURES} --guidance-scale 2",
    "evaluate/samples": "evaluate --samples sample/png --data data/digits --features digits "
    "--metrics fid,kid,accuracy --cache cache --reference-count 200",
    "evaluate/bound": "evaluate --checkpoint train/v --metrics nll --count 6 --batch-size 4",
    "evaluate/bound-learned": "evaluate --checkpoint train/learned-variance --metrics nll "
    "--count 6",
}
CASES = {**TRAINING, **INFERENCE}

Arrays = dict[str, np.ndarray]
UNROUNDED = "unrounded-"
"""Samples before they become bytes. A tree that makes bytes otherwise has none; see `compare`."""


@dataclass(frozen=True)
class Command:
    """One case as a worker process runs it."""

    name: str
    script: str
    arguments: list[str]

    @classmethod
    def of(cls, name: str) -> Command:
        """The command line of a case."""
        script, *arguments = shlex.split(CASES[name])
        if "--out" not in arguments:
            arguments += ["--out", name]
        return cls(name, script, arguments)

    @property
    def folder(self) -> str:
        """Where it writes."""
        return self.arguments[self.arguments.index("--out") + 1]


def record(tree: Path, out: Path, patterns: list[str]) -> int:
    """Run the cases in a tree and write what each computed to `OUT/NAME.npz`.

    Returns:
        How many cases failed; each says where its output is.
    """
    out.mkdir(parents=True, exist_ok=True)
    work, log = out / "work", out / "logs"
    if not work.exists():
        _write_images(work)
    log.mkdir(exist_ok=True)
    wanted = [name for name in CASES if _matches(name, patterns)]
    for name in wanted:
        shutil.rmtree(work / Command.of(name).folder, ignore_errors=True)
    groups = [[name] for name in wanted if name in TRAINING]
    groups.append([name for name in wanted if name in INFERENCE])
    notes = out / "about.json"
    seconds = json.loads(notes.read_text())["seconds"] if notes.exists() else {}
    failed = []
    for group in filter(None, groups):
        for name, took, error in _work(tree, work, log, group):
            print(f"{name:32} {took:5.1f} s  {error or ''}", flush=True)
            seconds[name] = round(took, 1)
            if error is not None:
                failed.append(name)
                continue
            folder = out / Path(name).parent
            folder.mkdir(exist_ok=True)
            arrays = collect(work, Command.of(name).folder)
            assert arrays, f"{name} has left nothing to compare"
            np.savez(folder / f"{Path(name).name}.npz", **arrays)  # type: ignore[arg-type]
    about = {"tree": str(tree), "commit": _commit(tree), **_versions(), "seconds": seconds}
    notes.write_text(json.dumps(about, indent=2) + "\n")
    print(f"{len(wanted) - len(failed)} of {len(wanted)} cases in {out}")
    for name in failed:
        print(f"FAILED {name}: see {log / name.replace('/', '-')}.log")
    return len(failed)


def compare(before: Path, after: Path, patterns: list[str]) -> int:
    """Say for each case whether it is equal to the bit, and if not, where and by how much.

    Samples before rounding are compared if both recordings have them.

    Returns:
        How many cases differ or are in one recording only.
    """
    names = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in (before, after)
        for path in folder.glob("*/*.npz")
        if path.parent.name != "work"
    }
    different = 0
    wanted = sorted(name for name in names if _matches(name, patterns))
    for name in wanted:
        files = [folder / f"{name}.npz" for folder in (before, after)]
        missing = [str(file) for file in files if not file.exists()]
        differences = [f"there is no {file}" for file in missing]
        if not missing:
            one, other = (dict(np.load(file)) for file in files)
            differences, total = list(_differences(one, other)), len(one.keys() & other.keys())
            if not total:
                differences = ["nothing is recorded in both"]
            if not differences:
                bytes_only = "" if one.keys() == other.keys() else ", samples as bytes only"
                print(f"{name:32} equal to the bit ({total} arrays{bytes_only})")
        if differences:
            different += 1
            print(f"{name:32} DIFFERENT")
            for line in differences[:8]:
                print(f"    {line}")
            if len(differences) > 8:
                print(f"    and {len(differences) - 8} more")
    print(f"{len(wanted) - different} of {len(wanted)} cases are equal to the bit")
    return different if wanted else 1


def collect(work: Path, name: str) -> Arrays:
    """All that a finished case computed: weights, averages, moments, losses, images, metrics."""
    folder, arrays = work / name, {}
    for path in sorted(folder.rglob("*")):
        where = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            # The folder, not the file: it says step and part.
            for key, tensor in _safetensors(path).items():
                arrays[f"{path.parent.relative_to(folder).as_posix()}/{key}"] = tensor
        elif path.name == "metrics.jsonl":
            rows = [json.loads(row) for row in path.read_text().splitlines()]
            for key in ("step", "loss", "grad_norm", "learning_rate"):
                arrays[f"metrics/{key}"] = np.array([row[key] for row in rows])
        elif name.startswith("evaluate/"):
            if path.suffix == ".json":
                metrics = json.loads(path.read_text()).get("metrics", {})
                arrays |= {f"metrics/{k}": np.array(v) for k, v in _numbers(metrics)}
        elif path.suffix == ".npz":
            arrays |= {f"{where}/{key}": value for key, value in np.load(path).items()}
        elif path.suffix == ".png":
            arrays[where] = _pixels(path)
        elif path.suffix == ".tar":
            arrays[where] = np.frombuffer(path.read_bytes(), np.uint8)
    unrounded = work / f"{name}.unrounded.npz"
    if unrounded.exists():
        arrays |= {f"{UNROUNDED}{key}": value for key, value in np.load(unrounded).items()}
    return arrays


def _differences(one: Arrays, other: Arrays) -> Iterator[str]:
    both_unrounded = all(any(k.startswith(UNROUNDED) for k in arrays) for arrays in (one, other))
    for key in sorted(one.keys() | other.keys()):
        if key.startswith(UNROUNDED) and not both_unrounded:
            continue
        if key not in one or key not in other:
            yield f"{key}: only in the {'second' if key in other else 'first'}"
            continue
        a, b = one[key], other[key]
        if a.dtype != b.dtype or a.shape != b.shape:
            yield f"{key}: {a.dtype} {list(a.shape)}, and {b.dtype} {list(b.shape)}"
        elif a.tobytes() != b.tobytes():
            gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
            yield f"{key}: at most {np.nanmax(gap):.3g} apart, {np.mean(gap > 0):.1%} of elements"


def _work(
    tree: Path, work: Path, log: Path, group: list[str]
) -> Iterator[tuple[str, float, str | None]]:
    """Run cases in one process of the tree: each one's name, seconds, and error if it failed."""
    parts = [str(tree / part) for part in ("engine", "kernels")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(parts), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, __file__, "work", str(tree), str(log), *group],
        cwd=work, env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    left = set(group)
    for line in child.stdout:
        name, took, error = json.loads(line)
        left.discard(name)
        yield name, took, error
    status = child.wait()
    for name in sorted(left):
        yield name, 0.0, f"the process ended with status {status}"


def work(tree: Path, log: Path, names: Iterable[str]) -> None:
    """The worker process: run the scripts as a shell would, one after the other."""
    spec = find_spec("ddpm_engine")
    assert spec is not None, f"there is no engine in {tree}"
    assert tree in Path(str(spec.origin)).parents, f"{spec.origin} is not in {tree}"
    for command in map(Command.of, names):
        script = tree / "launch" / f"{command.script}.py"
        sys.argv = [str(script), *command.arguments]
        began, error = time.monotonic(), None
        logging.getLogger().handlers.clear()  # that of the script before writes to a closed file
        file = (log / f"{command.name.replace('/', '-')}.log").open("w")
        with file, redirect_stdout(file), redirect_stderr(file), _unrounded(command.name):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as leaving:
                error = f"exit status {leaving.code}" if leaving.code else None
            except Exception as raised:
                traceback.print_exc()
                error = repr(raised)
        print(json.dumps([command.name, time.monotonic() - began, error]), flush=True)


@contextmanager
def _unrounded(name: str) -> Iterator[None]:
    """Keep batches of images that are about to be rounded: bytes hide differences of 1/255."""
    import torch

    kept: list[np.ndarray] = []
    original: Callable[..., torch.Tensor] = torch.Tensor.round

    def keep(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if tensor.ndim == 4 and tensor.dtype == torch.float32:
            kept.append(tensor.detach().cpu().numpy().copy())
        return original(tensor, *arguments, **named)

    torch.Tensor.round = keep  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.round = original  # type: ignore[method-assign]
    if kept and name.startswith("sample/"):
        np.savez(f"{name}.unrounded.npz", *kept)


def _write_images(folder: Path) -> None:
    """Write four 16×16 images, their 8×8 versions, and a mask: bars and a disc."""
    from PIL import Image

    row, column = np.mgrid[:16, :16]
    disc = (row - 7.5) ** 2 + (column - 7.5) ** 2 < 30
    for name, side in {"images": 16, "small": 8}.items():
        (folder / name).mkdir(parents=True)
        for k, image in enumerate([row * 16, column * 16, disc * 220, (row // 4 % 2) * 200]):
            pixels = image.astype(np.uint8)[:: 16 // side, :: 16 // side]
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    Image.fromarray(((column > 6) * 255).astype(np.uint8)).save(folder / "mask.png")


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def _safetensors(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    return load_file(path)


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dictionaries and lists, by their path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from _numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _commit(tree: Path) -> str:
    """Which commit, and whether anything in it is changed."""
    described = subprocess.run(
        ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip()


def _versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record", help="run every case in a tree")
    command.add_argument("--tree", type=Path, default=ROOT, help="checkout to record")
    command.add_argument("--out", type=Path, required=True, help="folder of the recording")
    command.add_argument("--only", nargs="+", default=["*"], help="patterns of cases, as 'train/*'")
    command = commands.add_parser("compare", help="compare two recordings")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument("--only", nargs="+", default=["*"], help="patterns of cases, as 'train/*'")
    command = commands.add_parser("work")
    command.add_argument("tree", type=Path)
    command.add_argument("log", type=Path)
    command.add_argument("names", nargs="+")
    options = parser.parse_args()
    if options.command == "work":
        work(options.tree, options.log, options.names)
    elif options.command == "record":
        tree, out = options.tree.resolve(), options.out.resolve()
        sys.exit(min(record(tree, out, options.only), 1))
    else:
        sys.exit(min(compare(options.before, options.after, options.only), 1))


if __name__ == "__main__":
    main()
