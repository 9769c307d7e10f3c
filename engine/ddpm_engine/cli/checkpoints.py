"""List, verify, prune and average the checkpoints of a run.

    checkpoints.py list RUN
    checkpoints.py verify RUN
    checkpoints.py prune RUN [--keep N] [--keep-every M] [--delete]
    checkpoints.py average RUN --out DIR [--steps A B ...] [--shares X Y ...] [--weights ema|model]
    checkpoints.py ema RUN --length L --out DIR [--step N]

Exit status: 0 done, 1 `verify` found damage, 2 the input is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_engine.bounds import Ge, Gt, Le
from ddpm_engine.checkpoints.posthoc_average import average_checkpoints, reconstruct_average
from ddpm_engine.checkpoints.store import SNAPSHOTS, CheckpointStore, check_sizes, verify
from ddpm_engine.cli.options import PositiveOrNone, exit_on_error, parse_command
from ddpm_engine.config import MAX_SIGMA_REL
from ddpm_engine.errors import UserError
from ddpm_engine.training.run_directory import lock_run_directory


def list_checkpoints(run: tyro.conf.Positional[Path]) -> int:
    """List a run's checkpoints: step, size, samples seen, and whether all files are there.

    Args:
        run: a run directory.
    """
    store = _store(run)
    print(f"{'step':>10}  {'MB':>10}  {'samples seen':>14}  state")
    for step in store.steps():
        path = store.path(step)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        checkpoint, problems = check_sizes(path)
        seen = "?" if checkpoint is None else str(checkpoint.state.get("samples_seen", "?"))
        print(f"{step:>10}  {size / 1e6:>10.1f}  {seen:>14}  {'; '.join(problems) or 'complete'}")
    for leftover in store.leftovers():
        print(f"{leftover.name}: unfinished; the next save of the run removes it")
    return 0


def verify_checkpoints(run: tyro.conf.Positional[Path]) -> int:
    """Read every byte of a run's checkpoints and name every problem.

    Args:
        run: a run directory.
    """
    store, damaged = _store(run), 0
    for step in store.steps():
        checkpoint, problems = verify(store.path(step))
        damaged += checkpoint is None
        print(f"{store.path(step)}: {'; '.join(problems) or 'sound'}", flush=True)
    return 1 if damaged else 0


def prune(
    run: tyro.conf.Positional[Path],
    keep: Annotated[int, Ge(2)] = 2,
    keep_every: PositiveOrNone = None,
    delete: bool = False,
) -> int:
    """List the old checkpoints that would be deleted, and with --delete delete them.

    The newest sound one always stays. Refused while the run is training.

    Args:
        run: a run directory.
        keep: number of newest checkpoints that are kept, 2 at least.
        keep_every: interval in steps; checkpoints at its multiples are kept too; default: none.
        delete: deletion, instead of a list of what would be deleted.
    """
    store = _store(run, keep, keep_every)
    try:
        with lock_run_directory(run):
            sound, rejected = store.newest()
            if sound is None:
                raise UserError(f"no checkpoint in {run} is sound, so none is deleted")
            for reason in rejected:
                print(f"cannot be used: {reason}")
            for step in store.prunable(newest=sound.step):
                if delete:
                    store.remove(step)
                print(f"{'deleted' if delete else 'would delete'} {store.path(step)}", flush=True)
    except OSError as error:
        raise UserError(f"{run} cannot be changed: {error}") from None
    if not delete:
        print("nothing is deleted without --delete")
    return 0


def average(
    run: tyro.conf.Positional[Path],
    out: Path,
    steps: tuple[Annotated[int, Ge(0)], ...] | None = None,
    shares: tuple[Annotated[float, Gt(0)], ...] | None = None,
    weights: Literal["ema", "model"] = "ema",
) -> int:
    """Average the weights of a run's checkpoints into a folder that sample.py takes.

    Args:
        run: a run directory.
        out: folder to make.
        steps: steps of the checkpoints, as 1000 2000; default: all.
        shares: share of each of them in the mean, as 1 2; default: equal.
        weights: EMA weights, or those of the steps themselves.
    """
    store = _store(run)
    chosen = store.steps() if steps is None else steps
    checkpoints = []
    for step in chosen:
        checkpoint, problems = verify(store.path(step), [weights])
        if checkpoint is None:
            raise UserError(f"{store.path(step)} cannot be used: {'; '.join(problems)}")
        checkpoints.append(checkpoint)
    path = average_checkpoints(checkpoints, out, shares, weights)
    print(f"{path} is the mean of steps {', '.join(map(str, chosen))}")
    return 0


def ema(
    run: tyro.conf.Positional[Path],
    length: Annotated[float, Gt(0), Le(MAX_SIGMA_REL)],
    out: Path,
    step: Annotated[int, Ge(0)] | None = None,
) -> int:
    """Reconstruct a power-function EMA of any length after training, for sample.py.

    For runs with --training.ema-sigma-rel, which keep snapshots of a few such EMAs.

    Args:
        run: a run directory.
        length: relative length sigma_rel, a share of the training so far, above 0 and at most
            0.2886; 0.1 remembers mostly the last tenth or two.
        out: folder to make.
        step: step of a snapshot, at whose end the EMA is; default: the newest.
    """
    store = CheckpointStore(run / SNAPSHOTS)
    snapshots = []
    for kept in store.steps():
        snapshot, problems = verify(store.path(kept))
        if snapshot is None:
            print(f"cannot be used: {store.path(kept)}: {'; '.join(problems)}", flush=True)
        else:
            snapshots.append(snapshot)
    if not snapshots:
        raise UserError(
            f"{run} holds no snapshots that can be used; train with --training.ema-sigma-rel "
            "0.05 0.1 to keep some"
        )
    made = reconstruct_average(snapshots, length, out, step)
    print(
        f"{made.path} is the average of length {length:g} at step {made.step}, made of "
        f"{made.averages} others; its profile is "
        f"{100 * made.relative_error:.2g}% from the exact one"
    )
    return 0


def _store(run: Path, keep: int = 2, keep_every: int | None = None) -> CheckpointStore:
    store = CheckpointStore(run / "checkpoints", keep, keep_every)
    if not store.directory.is_dir():
        raise UserError(f"{run} is not a run directory: it has no checkpoints folder")
    return store


def main() -> None:
    """Run the command named by the first argument."""
    commands: dict[str, Callable[..., int]] = {
        "list": list_checkpoints,
        "verify": verify_checkpoints,
        "prune": prune,
        "average": average,
        "ema": ema,
    }
    with exit_on_error(*commands.values()):
        sys.exit(parse_command(commands))


if __name__ == "__main__":
    main()
