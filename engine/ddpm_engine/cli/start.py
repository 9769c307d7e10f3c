"""Entry points of the commands.

A command's module imports torch, which takes seconds: Ctrl-C in that time, and whatever else can
fail in it, is answered like anything later.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from ddpm_engine.cli.errors import INTERRUPTED, exit_in_one_line, say_interrupted


def _command(module: str) -> Callable[[], None]:
    def main() -> None:
        with exit_in_one_line():
            with _leaving_at_once():
                command = import_module(f"ddpm_engine.cli.{module}")
            command.main()

    return main


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """End the process on Ctrl-C, where libraries would catch a KeyboardInterrupt and go on."""

    def leave(*_: object) -> None:
        say_interrupted()
        os._exit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as in a background job, or a caller's
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


train = _command("train")
sample = _command("sample")
evaluate = _command("evaluate")
distill = _command("distill")
train_autoencoder = _command("train_autoencoder")
export = _command("export")
make_shards = _command("make_shards")
checkpoints = _command("checkpoints")
visualize = _command("visualize")
