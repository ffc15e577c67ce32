"""The decode layer, and a backward that is the dense layer's: nobody trains on a handful of tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dense
from pallas_kernels.activations import Rule
from pallas_kernels.checks import check_ffn_arguments
from pallas_kernels.common import varying_axes
from pallas_kernels.common.groups import Groups
from pallas_kernels.common.platforms import where_kernels_run
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import ROWS_TOKENS, DecodeConfig
from pallas_kernels.decode.pallas_triton_down import decode_down
from pallas_kernels.decode.pallas_triton_hidden import Hidden, decode_hidden
from pallas_kernels.decode.pallas_triton_rows import Shares, rows_hidden, sum_shares
from pallas_kernels.decode.residual import Normed, Residual, Stream
from pallas_kernels.options import Auto, FFNOptions, FFNStats
from pallas_kernels.reference import Weights


def run(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    layer: jax.Array | None = None,
    *,
    rule: Rule,
    config: DecodeConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Hidden | Shares]:
    """The layer's y (M, D), and what its statistics are made of, for x (M, D) and weights (F, D), or for
    those of one ``layer`` (1,) int32 of a stack (L, F, D).

    One or two tokens meet rows of weights as vectors, unless a ``config`` of the kernels for more is given.

    Raises:
      ValueError: a config whose programs do not have all neurons.
    """
    (tokens, d_model), d_ff = x.shape, w_up.shape[-2]
    if tokens <= ROWS_TOKENS and config is None:
        shares = _shares(x, w_gate, w_up, w_down, layer, rule=rule, interpret=interpret)
        return sum_shares(shares, dtype=x.dtype, interpret=interpret), shares
    config = configs.choose(x, d_ff) if config is None else config
    n_counters = config.down.n_tiles(d_model)
    hidden = decode_hidden(
        x, w_gate, w_up, layer, n_counters=n_counters, rule=rule, config=config.hidden, interpret=interpret
    )
    y = decode_down(hidden, w_down, layer, tokens=tokens, config=config.down, interpret=interpret)
    return y, hidden


def layer_onto(
    onto: Residual,
    x: jax.Array | Normed,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    rule: Rule,
    interpret: bool = False,
) -> Stream:
    """The layer of one or two tokens x (M, D) and weights (F, D), added to a residual stream, without a
    gradient."""
    with jax.enable_x64(False):
        shares = _shares(x, w_gate, w_up, w_down, None, rule=rule, interpret=interpret)
        return sum_shares(shares, onto, dtype=x.dtype, interpret=interpret)


def _shares(
    x: jax.Array | Normed,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    layer: jax.Array | None,
    *,
    rule: Rule,
    interpret: bool,
) -> Shares:
    config = configs.choose_rows(x)
    return rows_hidden(x, w_gate, w_up, w_down, layer, rule=rule, config=config, interpret=interpret)


def layer_of_stack(
    x: Float[Array, "M D"],
    w_gate: Float[Array, "L F D"] | None,
    w_up: Float[Array, "L F D"],
    w_down: Float[Array, "L F D"],
    layer: jax.Array | int,
    *,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
    interpret: bool = False,
) -> tuple[Float[Array, "M D"], FFNStats]:
    """One layer of a stack, whose weights are read where they stand, without a gradient.

    A kernel in a ``scan`` over stacked weights gets a copy of each layer's, which takes longer than a few
    tokens do. In a ``fori_loop`` over the numbers of the layers this call copies nothing.

    Args:
      x: (M, D), at least one token, in the weights' type.
      w_gate, w_up, w_down: (L, F, D), neuron-major; without a gate ``w_gate`` is None.
      layer: () integer, which may be traced; one outside of the stack is the nearest.
      options: of which the activation counts.

    Raises:
      ValueError, TypeError: arguments that do not fit, or a stack of 2³¹ elements or more.
    """
    weights = {"w_gate": w_gate, "w_up": w_up, "w_down": w_down}
    for name, weight in sorted(weights.items(), reverse=True):  # w_up first
        if weight is not None and (weight.ndim != 3 or len(weight) != len(w_up)):
            raise ValueError(f"{name} must have shape (L, F, D), L as in w_up; got {weight.shape}")
    if w_up.size >= 2**31:
        raise ValueError(
            f"a stack must have less than 2^31 elements, which kernels count in 32 bits; got {w_up.size}: "
            "split the stack"
        )
    check_ffn_arguments(x, _one_layer(w_gate), _one_layer(w_up), _one_layer(w_down), options)
    if w_up.dtype != x.dtype or len(x) == 0:
        raise ValueError(f"x must have tokens, in the weights' type {w_up.dtype}; got {x.dtype}{x.shape}")
    number = jnp.asarray(layer, jnp.int32).reshape(1)
    y, hidden = run(x, w_gate, w_up, w_down, number, rule=options.rule, interpret=interpret)
    return y, _stats(hidden)


def _one_layer(stack: jax.Array | None) -> Any:
    """The shape and type of a layer's weight."""
    return None if stack is None else jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """The layer of a few tokens: as `reference.ffn`, for x (M, D) and weights (F, D) of one type.

    ``backend`` is ``"triton"`` or ``"interpret"``. Under ``format="auto"`` a program that is lowered for
    another platform than CUDA has the dense layer.
    """
    arguments = x, w_gate, w_up, w_down

    def instead(x, w_gate, w_up, w_down):
        return varying_axes.vary_with(x, dense.infer(x, w_gate, w_up, w_down, options, "xla", groups))

    def kernels(x, w_gate, w_up, w_down):
        return varying_axes.vary_with(x, _infer(x, w_gate, w_up, w_down, options, backend, groups))

    if x.shape[0] == 0:
        return instead(*arguments)
    if isinstance(options.layout, Auto):
        return where_kernels_run(kernels, instead, backend, *arguments)
    return _infer(*arguments, options, backend, groups)


def _infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups,
) -> tuple[jax.Array, FFNStats]:
    y, hidden = run(x, w_gate, w_up, w_down, rule=options.rule, interpret=backend == "interpret")
    if groups is None:
        return y, _stats(hidden)
    hits = dense.token_hits(x, w_up if w_gate is None else w_gate, options.rule, groups)
    return y, _stats(hidden, hits, groups)


def _stats(hidden: Hidden | Shares, hits: jax.Array | None = None, groups: Groups = None) -> FFNStats:
    hits = jnp.sum(hidden.hits, axis=0, dtype=jnp.int32) if hits is None else hits
    nnz, l1 = jnp.sum(hidden.nnz, axis=0, dtype=jnp.int32), jnp.sum(hidden.l1, axis=0)
    return FFNStats.of_rows(l1, nnz, jnp.zeros_like(nnz, dtype=bool), hits, groups)


def forward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[tuple[jax.Array, FFNStats], None]:
    """`infer`: nothing is kept."""
    return infer(x, w_gate, w_up, w_down, options, backend, groups), None


def backward(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    kept: None,
    dy: jax.Array,
    scale: jax.Array | None,
    options: FFNOptions,
    backend: str,
    *,
    dtype: DTypeLike,
    weights: bool = True,
) -> Weights:
    """The dense layer's backward, from nothing."""
    return dense.recompute_backward(x, w_gate, w_up, w_down, dy, scale, rule=options.rule, dtype=dtype)
