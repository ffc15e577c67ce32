"""Powers of two: Triton's blocks and warps come in no other numbers."""

from typing import Any


def at_least(n: int) -> int:
    """The smallest power of two that is at least ``n``; 1 for ``n`` under 1."""
    return 1 << max(n - 1, 0).bit_length()


def check(config: Any, *, why: dict[str, str] | None = None, **ranges: tuple[int, int]) -> None:
    """Checks that fields of a config are powers of two within (lowest, highest).

    Args:
      why: for some fields, the reason for their range, for the message.

    Raises:
      ValueError: a field that is none, or is outside its range, with the law in the message.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high or value & (value - 1):
            reason = f"; {why[name]}" if why and name in why else ""
            raise ValueError(
                f"{type(config).__name__}.{name} must be a power of two from {low} to {high}{reason}; "
                f"got {value}"
            )
