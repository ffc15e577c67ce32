"""Blocks of tokens of a large call, one after the other, so that its temporaries are those of one block."""

from typing import NamedTuple

MULTIPLE = 128
"""Tokens that a block is a multiple of: a tile of a product, and a whole number of panels."""


class Block(NamedTuple):
    """Tokens ``start`` to ``start + tokens`` of a call."""

    start: int
    tokens: int


def split(tokens: int, most: int | None) -> list[Block]:
    """As few blocks as hold at most ``most`` tokens, a multiple of `MULTIPLE`; one without a limit.

    All but the last have one size, which is a multiple of `MULTIPLE` and not larger than it needs to be.
    """
    if most is None or tokens <= most:
        return [Block(0, tokens)]
    count = -(-tokens // most)
    size = -(-tokens // (count * MULTIPLE)) * MULTIPLE
    return [Block(start, min(size, tokens - start)) for start in range(0, tokens, size)]
