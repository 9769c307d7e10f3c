"""Entry points of the commands.

A command's module imports torch, which takes seconds: Ctrl-C in that time, and whatever else can
fail in it, is answered like anything later.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ddpm_engine.cli.errors import exit_in_one_line


def _command(module: str) -> Callable[[], None]:
    def main() -> None:
        with exit_in_one_line():
            import_module(f"ddpm_engine.cli.{module}").main()

    return main


train = _command("train")
sample = _command("sample")
evaluate = _command("evaluate")
distill = _command("distill")
export = _command("export")
make_shards = _command("make_shards")
checkpoints = _command("checkpoints")
visualize = _command("visualize")
