"""What cannot fit into memory is refused before any is taken."""

from __future__ import annotations

import pytest

from ddpm_engine.errors import UserError
from ddpm_engine.memory import check_fits, in_words, memory_limit


def test_what_cannot_fit_is_refused_with_both_sizes_and_the_remedy() -> None:
    limit = memory_limit()
    assert limit is not None
    assert limit > 1 << 28
    check_fits(1 << 20, "size", "choose a smaller one")
    check_fits(2048, "size", "choose a smaller one", limit=2048)
    with pytest.raises(UserError, match=r"`size` .* 2\.5 KiB .* 2 KiB; choose a smaller") as caught:
        check_fits(2560, "size", "choose a smaller one", limit=2048)
    assert caught.value.field == "size"
    with pytest.raises(UserError, match="EiB"):
        check_fits(10**400, "size", "choose a smaller one")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (5 << 29, "2.5 GiB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_words(count) == words
