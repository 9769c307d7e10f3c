"""What command lines have in common."""

from __future__ import annotations

from ddpm_engine.errors import UserError


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Args:
        flag: its name, without dashes.
        text: what it was given.

    Raises:
        UserError: anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{flag} is {text!r}; it takes whole numbers, as 17,42") from None
