"""Feed-forward shapes of published models: the one list that tests, tuner and benchmark share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FFNShape:
    """A model's feed-forward layer: D = ``d_model``, F = ``d_ff``, with a gate projection or without."""

    name: str
    d_model: int
    d_ff: int
    gated: bool = True


PAPER = FFNShape("paper", 2048, 5632)
"""Every model of the paper, 0.5B to 2B; also TinyLlama 1.1B."""

SHAPES = {
    shape.name: shape
    for shape in (
        PAPER,
        FFNShape("paper-nongated", 2048, 8192, gated=False),
        FFNShape("qwen1.5-0.5b", 1024, 2816),
        FFNShape("llama-3.2-1b", 2048, 8192),
        FFNShape("llama-3-8b", 4096, 14336),
    )
}

TOKENS = (4096, 65536, 524288)
"""Tokens in a call: a small batch, the 32 sequences of 2,048 that the ceilings were taken at,
and a large one."""
