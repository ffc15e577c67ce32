"""The decode layer, and a backward that is the dense layer's: nobody trains on a handful of tokens."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dense
from pallas_kernels.activations import Rule
from pallas_kernels.common import varying_axes
from pallas_kernels.common.groups import Groups
from pallas_kernels.common.platforms import where_kernels_run
from pallas_kernels.decode import config as configs
from pallas_kernels.decode.config import ROWS_TOKENS, DecodeConfig
from pallas_kernels.decode.pallas_triton_down import decode_down
from pallas_kernels.decode.pallas_triton_hidden import Hidden, decode_hidden
from pallas_kernels.decode.pallas_triton_rows import Shares, rows_hidden, sum_shares
from pallas_kernels.options import Auto, FFNOptions, FFNStats
from pallas_kernels.reference import Weights


def run(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    *,
    rule: Rule,
    config: DecodeConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Hidden | Shares]:
    """The layer's y (M, D), and what its statistics are made of, for x (M, D) and weights (F, D).

    One or two tokens meet rows of weights as vectors, unless a ``config`` of the kernels for more is given.

    Raises:
      ValueError: a config whose programs do not have all neurons.
    """
    tokens, d_model = x.shape
    if tokens <= ROWS_TOKENS and config is None:
        rows = configs.choose_rows(x)
        shares = rows_hidden(x, w_gate, w_up, w_down, rule=rule, config=rows, interpret=interpret)
        return sum_shares(shares, x, interpret=interpret), shares
    config = configs.choose(x, w_up.shape[0]) if config is None else config
    config.check(w_up.shape[0])
    n_counters = config.down.n_tiles(d_model)
    hidden = decode_hidden(
        x, w_gate, w_up, n_counters=n_counters, rule=rule, config=config.hidden, interpret=interpret
    )
    return decode_down(hidden, w_down, tokens=tokens, config=config.down, interpret=interpret), hidden


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
