"""How a program of `row_kernel` and of the gradient beside it walks a token's non-zeros."""

import dataclasses

from pallas_kernels.common import powers_of_2

_WARP = 32


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How a program walks the non-zeros of its token.

    Attributes:
      entries: non-zeros, and so rows of each weight, that are in flight together.
      num_warps: warps of a program, which is one token.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    entries: int = 2
    num_warps: int = 2

    def __post_init__(self) -> None:
        powers_of_2.check(self, entries=(1, 32), num_warps=(1, 32))

    @classmethod
    def for_columns(cls, d_model: int, itemsize: int, columns_of_thread: int) -> "RowsConfig":
        """Two rows of each weight in flight, and ``columns_of_thread`` columns a thread in 16 bits, half of
        them in 32: few enough that the token's own vectors and those rows stay in registers."""
        columns = columns_of_thread * 2 // itemsize
        num_warps = powers_of_2.at_least(d_model) // (columns * _WARP)
        return cls(entries=2, num_warps=min(max(num_warps, 1), 32))

    def registers(self, d_model: int, itemsize: int) -> int:
        """Registers of a thread for x, y and the rows of two weights in flight."""
        columns = -(-powers_of_2.at_least(d_model) // (self.num_warps * _WARP))
        return columns * (2 + 2 * self.entries * itemsize // 4)
