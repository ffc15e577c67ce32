"""The TwELL layer: pack, project, mend what did not fit, and a backward that is the reference's own.

Exactness. A row with a tile that holds more than S - 1 active gates comes out of the kernels as zero. The
backup computes such rows densely, ``backup_rows`` of them at a time, in a loop that runs on the device for as
many rounds as there are rows left: none for most inputs, all rows if every row overflows, which is the dense
layer cut into blocks of rows. No result depends on the tile, the slots or the bound.
"""

import jax
from jax.typing import DTypeLike

from pallas_kernels import dense
from pallas_kernels.common.groups import Groups
from pallas_kernels.common.row_kernel import up_down
from pallas_kernels.dense import backup_rows, token_hits
from pallas_kernels.options import FFNOptions, FFNStats, Twell
from pallas_kernels.reference import Weights
from pallas_kernels.twell import config as configs
from pallas_kernels.twell import gate


def infer(
    x: jax.Array,
    w_gate: jax.Array | None,
    w_up: jax.Array,
    w_down: jax.Array,
    options: FFNOptions,
    backend: str,
    groups: Groups = None,
) -> tuple[jax.Array, FFNStats]:
    """One feed-forward layer through TwELL: as `reference.ffn`, for x (M, D) and weights (F, D) of one type.

    ``backend`` runs the gate: ``"mosaic_gpu"``, ``"triton"`` or ``"interpret"``; the rest is Triton's,
    interpreted or not.
    """
    tokens, layout = x.shape[0], options.layout
    assert isinstance(layout, Twell)
    if tokens == 0:
        return dense.infer(x, w_gate, w_up, w_down, options, backend, groups)
    config, rule = configs.choose(x, w_up, layout), options.rule
    gate_weight, up_weight = (w_up, None) if w_gate is None else (w_gate, w_up)
    stage = gate.stage(
        backend,
        tile=layout.tile,
        slots=layout.slots,
        fused=config.gate_pack,
        pack=config.word_pack,
        rule=rule,
    )
    packed, hits = stage(x, gate_weight)
    rows = up_down(
        packed,
        x,
        up_weight,
        w_down,
        config=config.up_down,
        name="twell_down" if up_weight is None else "twell_up_down",
        rule=rule,
        interpret=backend == "interpret",
    )
    bound = min(layout.backup_rows or backup_rows.bound(tokens), tokens)
    y, l1 = backup_rows.mend(rows.y, rows.l1, rows.overflows, bound, x, w_gate, w_up, w_down, rule)
    if groups is not None:
        hits = token_hits(x, gate_weight, rule, groups)
    return y, FFNStats.of_rows(l1, rows.nnz, rows.overflows, hits, groups)


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
