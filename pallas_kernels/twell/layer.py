"""The TwELL layer: pack, project, mend what did not fit, and a backward that is the reference's own.

Exactness. A row with a tile that holds more than S - 1 active gates comes out of the kernels as zero. The
backup computes such rows densely, ``backup_rows`` of them at a time, in a loop that runs on the device for as
many rounds as there are rows left: none for most inputs, all rows if every row overflows, which is the dense
layer cut into blocks of rows. No result depends on the tile, the slots or the bound.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import dense, reference
from pallas_kernels.dense import backup_rows
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.twell import config as configs
from pallas_kernels.twell.pallas_triton import down, gate_pack, up_down


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ffn(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through TwELL: as `reference.ffn`, for x (M, D) and weights (F, D).

    Weights of a wider type than x's are rounded to it; their gradients are not.
    ``backend`` runs the gate: ``"mosaic_gpu"``, ``"triton"`` or ``"interpret"``; the rest is Triton's,
    interpreted or not.
    """
    x, w_gate, w_up, w_down = dense.rounded(x, w_gate, w_up, w_down)
    tokens = x.shape[0]
    if tokens == 0:
        return reference.ffn(x, w_gate, w_up, w_down)
    config = configs.choose(x, w_up, options)
    interpret = backend == "interpret"
    gate_weight = w_up if w_gate is None else w_gate
    tiles = {"tile": options.tile, "slots": options.slots}
    if backend == "mosaic_gpu":
        from pallas_kernels.twell import pallas_mosaic_gpu

        packed, hits = pallas_mosaic_gpu.gate_pack(x, gate_weight, **tiles)
    else:
        packed, hits = gate_pack(x, gate_weight, **tiles, config=config.gate_pack, interpret=interpret)
    if w_gate is None:
        rows = down(packed, w_down, config=config.up_down, interpret=interpret)
    else:
        rows = up_down(packed, x, w_up, w_down, config=config.up_down, interpret=interpret)
    bound = min(options.backup_rows or configs.backup_rows(tokens), tokens)
    y, l1 = _backup(rows, bound, x, w_gate, w_up, w_down)
    stats = FFNStats(
        l1=jnp.sum(l1) / tokens,
        l0=jnp.sum(hits, dtype=jnp.float32) / tokens,
        neuron_hits=hits,
        max_nnz=jnp.max(rows.nnz),
        overflow_rows=jnp.sum(rows.overflows, dtype=jnp.int32),
    )
    return y, stats


def _backup(rows, bound, x, w_gate, w_up, w_down):
    """y (M, D) and l1 (M,) with the overflowing rows computed densely, ``bound`` of them a round."""
    tokens = x.shape[0]

    def one_round(ids, carry):
        y, l1 = carry
        h, _ = reference.hidden(x[jnp.minimum(ids, tokens - 1)], w_gate, w_up)
        row_l1 = jnp.sum(jnp.abs(h), axis=1, dtype=jnp.float32)
        whole = reference.multiply(h, w_down)
        return y.at[ids].set(whole, mode="drop"), l1.at[ids].set(row_l1, mode="drop")

    return backup_rows.rounds(rows.overflows, bound, one_round, (rows.y, rows.l1))


def _forward(x, w_gate, w_up, w_down, options, backend):
    return ffn(x, w_gate, w_up, w_down, options, backend), (x, w_gate, w_up, w_down)


def _backward(options, backend, residuals, cotangents):
    """Cotangents of x and the weights, each in its own type, from those of y and l1."""
    dy, dstats = cotangents
    return dense.recompute_backward(*dense.rounded(*residuals), dy, dstats.l1, dtype=residuals[2].dtype)


ffn.defvjp(_forward, _backward)
