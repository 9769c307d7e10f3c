"""Gather what a rented machine without a network lacks: `python -m benchmarks.gpu.bundle OUT`.

The bundle is the source, the wheels of `LACKING`, and a script that installs these beside the
source and starts `benchmarks.gpu`. Nothing in it depends on the machine that made it: all wheels
are pure Python.

Compiled kernels are not in it. Triton finds a kernel by a key in which its own files are hashed,
the compiled library for one version of Python among them; only a machine with the very same Triton
for the very same Python could fill the cache of another.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.machine import ROOT, commit, output_of

NAME = "ddpm-engine-gpu"
"""Folder in the archive."""
PYTHON = "3.12"
LARGEST = 64 * 2**20
"""Bytes of the bundle, at most."""
THERE = (
    "accelerate", "fsspec", "hypothesis", "matplotlib", "numpy", "pillow", "pytest", "pyyaml",
    "safetensors", "scikit-learn", "scipy", "tensorboard", "torch", "torchvision", "tqdm",
    "transformers", "triton", "typing-extensions",
)  # fmt: skip
"""What a machine with PyTorch for scientists has, with what these require."""
LACKING = ("braceexpand", "docstring-parser", "typeguard", "tyro", "webdataset")
"""What the engine imports besides."""
LEFT_OUT = ("docs/pictures",)
"""Tracked, but of no use there."""
SCRIPT = """\
#!/bin/sh
# Check and measure the engine on this machine's GPU, without a network:
#     sh gpu.sh --budget 520 --out results
# PYTHON names the interpreter that has torch.
here=$(cd "$(dirname "$0")" && pwd) || exit
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \\
    --target "$here/site" "$here"/wheels/*.whl || exit
PYTHONPATH="$here:$here/engine:$here/kernels:$here/site" exec "$python" -m benchmarks.gpu "$@"
"""

Fetch = Callable[[Path], None]
"""Puts the wheels of `LACKING` into a folder."""


def fetch_wheels(folder: Path) -> None:
    """Download them by pip, in the versions of `constraints.txt`.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary", ":all:", "--python-version", PYTHON, "--platform", "any",
            "--constraint", str(ROOT / "constraints.txt"), "--dest", str(folder), *LACKING,
        ],
        check=True,
    )  # fmt: skip


def source_files() -> list[str]:
    """List the files of this checkout, those that git ignores not among them.

    Raises:
        RuntimeError: it is no checkout.
    """
    listed = output_of("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed is None:
        raise RuntimeError(f"{ROOT} is no git checkout: a bundle is made from one")
    names = sorted(filter(None, listed.split("\0")))
    return [n for n in names if not n.startswith(LEFT_OUT) and (ROOT / n).is_file()]


def gather(folder: Path, fetch: Fetch = fetch_wheels) -> None:
    """Make the bundle in a folder.

    Args:
        folder: made if missing.
        fetch: gets the wheels.

    Raises:
        RuntimeError: wheels are missing, or not for every machine; or all is too large.
    """
    for name in source_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (folder / "COMMIT").write_text(commit() + "\n")
    (folder / "gpu.sh").write_text(SCRIPT)
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    fetch(wheels)
    found = sorted(path.name for path in wheels.iterdir())
    got = {name.split("-")[0].replace("_", "-").lower() for name in found}
    if got != set(LACKING) or not all(name.endswith("-none-any.whl") for name in found):
        raise RuntimeError(
            f"the wheels are {', '.join(found)}; a pure-Python one each of {', '.join(LACKING)} "
            "is needed"
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise RuntimeError(f"the bundle has {size / 2**20:.0f} MiB, more than {LARGEST >> 20}")


def pack(archive: Path, fetch: Fetch = fetch_wheels) -> None:
    """Make the bundle as `.tar.gz`, whole or not at all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / NAME
        gather(folder, fetch)
        beside = archive.with_name(archive.name + ".tmp")
        with tarfile.open(beside, "w:gz") as file:
            file.add(folder, NAME)
        beside.replace(archive)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle",
        description="Gather source and wheels for a GPU machine without a network.",
    )
    parser.add_argument("out", type=Path, help="a .tar.gz file, or a folder that is empty or new")
    out: Path = parser.parse_args(arguments).out
    try:
        if out.name.endswith((".tar.gz", ".tgz")):
            out.parent.mkdir(parents=True, exist_ok=True)
            pack(out)
        elif out.is_dir() and any(out.iterdir()):
            parser.error(f"{out} is not empty; name a .tar.gz file, or a new folder")
        else:
            gather(out)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start = f"tar xzf {out.name} && sh {NAME}/gpu.sh" if out.is_file() else f"sh {out}/gpu.sh"
    print(f"wrote {out}; there: {start} --budget 520 --out results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
