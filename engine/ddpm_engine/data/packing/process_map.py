"""Call a function in several processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from numbers import Integral
from typing import Any, TypeVar

from ddpm_engine.errors import UserError
from ddpm_engine.memory import check_fits

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_PROCESS_BYTES = 4 << 20  # of its own, at least

_function: Callable[[Any], Any] | None = None


def check_count(value: int, name: str, most: int | None = None) -> None:
    """Refuse what is no whole number from 1 to `most`.

    Args:
        value: to check.
        name: of the field that it is from.
        most: None: any number.

    Raises:
        UserError: it is none.
    """
    if not (isinstance(value, Integral) and value >= 1 and (most is None or value <= most)):
        numbers = "at least 1" if most is None else f"within 1 to {most}"
        raise UserError(f"`{name}` is {value}; it must be a whole number, {numbers}", name)


def map_forked(
    function: Callable[[Argument], Result], arguments: Sequence[Argument], processes: int
) -> Generator[Result, None, None]:
    """Call a function for every argument in forked processes; yield results as they are finished.

    The function and what it refers to are inherited, not pickled, so that memory is shared; its
    arguments and results are pickled. With one process, or one argument, it is called in this
    process. The children end at once when the caller fails, closes the generator or is killed.

    Raises:
        UserError: `processes` below 1 or too many, or one of them was killed.
        Exception: whatever the function raises.
    """
    if not (isinstance(processes, Integral) and processes >= 1):
        raise UserError(
            f"`processes` is {processes}; it must be a whole number from 1", "processes"
        )
    processes = min(processes, len(arguments))
    check_fits(processes * _PROCESS_BYTES, "processes", "choose fewer")
    if processes <= 1:
        yield from map(function, arguments)
        return
    context = multiprocessing.get_context("fork")
    ended, alive = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(processes, context, _start, (function, ended, alive))
    try:
        try:
            futures = [executor.submit(_call, argument) for argument in arguments]
        except OSError as error:
            raise UserError(
                f"cannot start {processes} processes ({error.strerror}); choose fewer `processes`",
                field="processes",
            ) from error
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, perhaps for want of memory; run again with fewer `processes`"
        ) from error
    finally:
        alive.close()
        executor.shutdown(cancel_futures=True)
        ended.close()


def _start(function: Callable[[Any], Any], ended: Connection, alive: Connection) -> None:
    global _function
    _function = function
    # The caller, which gets the interrupt too, decides what becomes of the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alive.close()
    threading.Thread(target=_end_with_caller, args=(ended,), daemon=True).start()


def _end_with_caller(ended: Connection) -> None:
    ended.poll(None)  # returns once the other end is closed, by hand or because its process is gone
    os._exit(1)


def _call(argument: Any) -> Any:
    assert _function is not None, "set when the process started"
    return _function(argument)
