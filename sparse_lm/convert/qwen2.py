"""Qwen2 with a rectified gate: a Llama with biases on the query, key and value projections."""

from sparse_lm.convert.family import Family, Fields, sliding_window


def _window(fields: Fields) -> int | None:
    """Layers from ``max_window_layers`` on slide, if they are asked to."""
    return sliding_window(fields) if fields.get("use_sliding_window") else None


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    qkv_bias=True,
    window=_window,
    unsupported={"attention_bias": (True, False)},  # which its modelling code does not read
)
