"""Blocks of tokens of a large call, one after the other, so that its temporaries are those of one block.

Every block costs a few launches and the idle cores at the end of each of its kernels, some 30 µs on one
NVIDIA H100. So a block has work enough for that to be a percent or two of its time, and, where that hardly
changes it, a size that fills whole rounds of the cores with tiles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.device import Device

LEAST_FLOPS = 4_000_000_000
"""FLOPs of a block for each core, of the products that it is sure to do: about 0.7 ms on Hopper."""
MOST = 8
"""About how many blocks a call is cut into at most: each of them is in the compiled program."""
_TILE_ROWS, _TILE_COLUMNS = 128, 256
"""The tile of a product in 16 bits on a core: of `hopper_gemm`, and of XLA's libraries for large products."""


class Product(NamedTuple):
    """A product of each token: ``columns`` sums over ``depth`` terms."""

    columns: int
    depth: int


class Block(NamedTuple):
    """Tokens ``start`` to ``start + tokens`` of a call."""

    start: int
    tokens: int


def split(tokens: int, products: Sequence[Product], device: Device) -> list[Block]:
    """The blocks of a call whose tokens each cost ``products``: all but the last of one size, a multiple of
    128; a single one for a call that is too small to be cut, or a device of unknown size."""
    flops = sum(2 * product.columns * product.depth for product in products)
    count = min(MOST, tokens * flops // (LEAST_FLOPS * device.cores)) if device.cores else 1
    if count < 2:
        return [Block(0, tokens)]
    rows = -(-tokens // (_TILE_ROWS * count))
    # So many rows of tiles fill whole rounds of the cores in every product.
    period = math.lcm(
        *(
            device.cores // math.gcd(device.cores, -(-product.columns // _TILE_COLUMNS))
            for product in products
        )
    )
    if 2 * rows > period:
        rows = round(rows / period) * period
    return cut(tokens, _TILE_ROWS * rows)


def cut(tokens: int, size: int) -> list[Block]:
    """Blocks of ``size`` tokens; the last one has what is left, from half as many to one and a half times as
    many."""
    count = max(1, (2 * tokens + size) // (2 * size))
    starts = range(0, count * size, size)
    return [Block(start, size if start < starts[-1] else tokens - start) for start in starts]
