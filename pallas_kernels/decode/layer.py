"""The decode layer, and a backward that is the dense layer's: nobody trains on a handful of tokens."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dense
from pallas_kernels.common.groups import Groups
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.pallas_triton import decode_ffn
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights


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

    ``backend`` is ``"triton"`` or ``"interpret"``.
    """
    if x.shape[0] == 0:
        return dense.infer(x, w_gate, w_up, w_down, options, backend, groups)
    config = configs.choose(x, w_up.shape[0])
    interpret = backend == "interpret"
    y, hidden = decode_ffn(x, w_gate, w_up, w_down, rule=options.rule, config=config, interpret=interpret)
    if groups is None:
        hits = jnp.sum(hidden.hits, axis=0, dtype=jnp.int32)
    else:
        hits = dense.token_hits(x, w_up if w_gate is None else w_gate, options.rule, groups)
    nnz, l1 = jnp.sum(hidden.nnz, axis=0, dtype=jnp.int32), jnp.sum(hidden.l1, axis=0)
    return y, FFNStats.of_rows(l1, nnz, jnp.zeros_like(nnz, dtype=bool), hits, groups)


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
