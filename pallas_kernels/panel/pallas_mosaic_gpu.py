"""The gate stage of PanelELL for Hopper and Blackwell: an epilogue that makes panels of their GEMM's tiles.

Why it exists: `hopper_gemm`. Bytes written: 2 M union of values, in 32-byte sectors,
and M F / 16 of hit counts.

How. A warp holds 16 rows of a tile, 8 columns at a time, and needs nothing from any other warp: a *segment*
of 16 tokens counts its own hits, and its values are written only where it has one. Votes tell all lanes which
of the 128 gates of a group of columns are active. If none is, nothing is done. Otherwise ``movmatrix`` turns
the group on its side, which gives every four lanes one neuron's 16 tokens, one memory sector, and the neurons
with a hit are written. Lane n keeps the votes of group n, so that the counts of all columns leave as one
row of words.

Numerics. As `gate_panel` on Triton: f32 accumulation, rounded before the sign is read.

Limits. Those of the GEMM; P of 128. JAX's interpreter cannot run PTX: tests emulate it, and on a GPU check
its results.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import hopper_gemm, mosaic_gemm, varying_axes
from pallas_kernels.common.hopper_gemm import address, assemble
from pallas_kernels.common.tile_walk import TILE_M
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton_counts import GatePanel

assert SEGMENT == 16, "wgmma leaves a warp 16 rows"

_TILES = range(256, 32, -16)
"""Columns of a tile: a lane keeps the votes of eight columns, and shared memory is tiled by at least 16."""
_TILE_OVERHEAD = 64
"""What a tile takes beside its products, in columns: reading 128 rows of x, filling and draining the ring."""
_WORTH_IT = 0.95
_BATCH = 8  # groups whose votes are in registers together


def unsupported_reason(tokens: int, d_model: int, d_ff: int, dtype: jnp.dtype, panel: int) -> str | None:
    """What of a call's shape this kernel cannot do, in one sentence; None if it can."""
    if panel != TILE_M:
        return f"backend='mosaic_gpu' has panels of {TILE_M} tokens; got panel={panel}"
    if tokens < TILE_M:
        return f"backend='mosaic_gpu' needs at least {TILE_M} tokens, one panel; got {tokens} tokens"
    return hopper_gemm.unsupported_reason(d_model, d_ff, dtype)


def columns_of_tile(tokens: int, d_ff: int, cores: int) -> int:
    """Columns of a tile for so many tokens and neurons.

    Tiles of 256 columns reuse x most, and a call of many tokens has enough of them. 512 tokens and F 5632
    make 88 of them, one round of two thirds of an H100's cores, and 128 tiles of 176 columns, a shorter round
    of nearly all.
    """
    if not cores:
        return _TILES[0]
    blocks = pl.cdiv(tokens, TILE_M)
    costs = {tile: pl.cdiv(blocks * pl.cdiv(d_ff, tile), cores) * (tile + _TILE_OVERHEAD) for tile in _TILES}
    best = min(costs, key=lambda tile: costs[tile])
    return best if costs[best] < _WORTH_IT * costs[_TILES[0]] else _TILES[0]


def gate_panel(
    x: jax.Array, w_gate: jax.Array, rule: Rule = RELU, tile: int | None = None, interpret: Any = None
) -> GatePanel:
    """The active gates of ``x Wg^T`` by panels of 128 tokens: x (M, D), w_gate (F, D) of one 16-bit type.

    ``tile`` columns make a tile, by default `columns_of_tile`. ``interpret`` is what `plgpu.kernel` takes by
    this name.
    """
    tokens, d_ff = x.shape[0], w_gate.shape[0]
    tile = columns_of_tile(tokens, d_ff, device.current().cores) if tile is None else tile
    n_panels, n_tiles = pl.cdiv(tokens, TILE_M), pl.cdiv(d_ff, tile)
    width, segments = n_tiles * tile, TILE_M // SEGMENT

    def epilogue(acc, place, values, hits, nnz):
        column = place.tile_id * tile
        _write(
            acc,
            values.at[
                place.row_block,
                pl.ds(column, tile),
                pl.ds(place.half * place.rows.step, place.rows.span),
            ],
            hits.at[pl.ds(place.row // SEGMENT, place.rows.span // SEGMENT), pl.ds(column, tile)],
            nnz.at[place.tile_id, pl.ds(place.row, place.rows.span)],
            jnp.minimum(tokens - place.row, place.rows.span),
            jnp.minimum(d_ff - column, tile),
            tile=tile,
            width=width,
            warp_step=place.rows.warp_step,
            all_rows=tokens % TILE_M == 0,
            dtype=x.dtype,
            rule=rule,
        )

    gemm = mosaic_gemm.for_device(device.current())
    values, hits, nnz = gemm.gemm(
        epilogue,
        x,
        w_gate,
        out_type=(
            jax.ShapeDtypeStruct((n_panels, width, TILE_M), x.dtype),
            jax.ShapeDtypeStruct((n_panels * segments, width), jnp.uint8),
            jax.ShapeDtypeStruct((n_tiles, n_panels * TILE_M), jnp.int32),
        ),
        tile=tile,
        stages=gemm.stages_for(tile),
        scratch={},
        name="panel_gate",
        interpret=interpret,
    )
    # Mosaic GPU's outputs do not say so themselves.
    values, hits, nnz = varying_axes.vary_with(x, (values, hits, nnz))
    return GatePanel(values, hits, nnz)


def _write(acc, values, hits, nnz, rows_left, columns_left, *, tile, width, warp_step, all_rows, dtype, rule):
    """Writes a warpgroup's (64, tile) product to its values, hit counts and counts of each token."""
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ref, ref, ref, scalar, scalar))
    def write(_, acc, values, hits, nnz, rows_left, columns_left):
        pointers = [address(values, 64), address(hits, 64), address(nnz, 64)]
        scalars = [left.registers.flat[0] for left in (rows_left, columns_left)]
        constraints = ",".join(["f"] * (tile // 2) + ["l", "l", "l", "r", "r"])
        text = _epilogue(tile, width, warp_step, all_rows, dtype, rule)
        assemble(text, [*hopper_gemm.values(acc), *pointers, *scalars], constraints)

    write(acc, values, hits, nnz, rows_left, columns_left)


def _epilogue(tile, width, warp_step, all_rows, dtype, rule):
    """The epilogue of one thread, as PTX.

    Operands: the tile / 2 `hopper_gemm.values`; addresses of values, hits and nnz; rows and columns of the
    tile that exist. First rows of neighbouring warps are ``warp_step`` apart. With ``all_rows`` no tile has
    less than all of its rows.
    """
    values, hits, nnz, rows_left, columns_left = (f"${tile // 2 + i}" for i in range(5))
    groups = tile // 8

    def gates(group):
        """A thread's four gates of a group of 8 columns: two of its upper row, two of the one eight below."""
        return [f"${half * (tile // 4) + 2 * group + nth}" for half in range(2) for nth in range(2)]

    convert = hopper_gemm.CONVERT[jnp.dtype(dtype).name]
    threshold = hopper_gemm.constant(rule.last_inactive(dtype))
    lines = [
        "{ .reg .pred p, q, odd, exists0, exists1; .reg .b64 to, wide; .reg .f32 z0, z1;",
        (
            ".reg .b32 tid, lane, quarter, warp, row, t, left, left0, left1, own, low, high, n0, n1, v0, v1, "
            "column, k0, k1, k2, k3;"
        ),
        *(f".reg .b32 b{group}_{i};" for group in range(_BATCH) for i in range(4)),
        "mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 lane, tid, 31; and.b32 quarter, lane, 3;",
        "shr.u32 warp, tid, 5; shr.u32 column, lane, 2; shr.u32 left, " + columns_left + ", 3;",
        # Rows past M are zeros, but zero times an infinite weight is NaN: no column of theirs is there.
        f"mad.lo.u32 row, warp, {warp_step}, column; setp.lt.s32 exists0, row, {rows_left};",
        f"add.u32 t, row, 8; setp.lt.s32 exists1, t, {rows_left};",
        *(f"selp.b32 left{half}, left, 0, exists{half};" for half in range(2)),
        # After movmatrix a lane holds tokens 2 (lane % 4), + 1 of the group's column lane / 4: its votes are
        # those of the lanes that held that column before, lane % 4 = column / 2, in the register column % 2.
        "and.b32 t, column, 1; setp.ne.u32 odd, t, 0;",
        "shr.u32 t, column, 1; mov.b32 own, 0x11111111; shl.b32 own, own, t;",
        f"mad.lo.u32 t, warp, {warp_step}, 0; mad.lo.u32 t, quarter, 2, t; mul.wide.u32 wide, t, 2;",
        f"add.s64 to, {values}, wide; mul.wide.u32 wide, column, {2 * TILE_M}; add.s64 to, to, wide;",
        "mov.b32 n0, 0; mov.b32 n1, 0; mov.b32 k0, 0; mov.b32 k1, 0; mov.b32 k2, 0; mov.b32 k3, 0;",
    ]
    for first in range(0, groups, _BATCH):
        batch = range(first, min(first + _BATCH, groups))
        # Votes of a batch of groups before the first branch on one: their latencies overlap.
        for group in batch:
            # Active unless at or under the threshold, so NaN is active; columns past F are not.
            for i, gate in enumerate(gates(group)):
                if i == 0 or (i == 2 and not all_rows):
                    lines.append(f"setp.gt.u32 p, left{i // 2}, {group};")
                lines.append(
                    f"setp.gtu.and.f32 q, {gate}, {threshold}, p; @q add.u32 n{i // 2}, n{i // 2}, 1;"
                )
                lines.append(f"vote.sync.ballot.b32 b{group % _BATCH}_{i}, q, -1;")
        for group in batch:
            votes = [f"b{group % _BATCH}_{i}" for i in range(4)]
            lines.append(f"or.b32 low, {votes[0]}, {votes[2]}; or.b32 high, {votes[1]}, {votes[3]};")
            lines.append(
                f"or.b32 t, low, high; setp.eq.u32 p, t, 0; @p bra SKIP{group}; setp.eq.u32 p, lane, {group};"
            )
            lines += [f"@p mov.b32 k{i}, {vote};" for i, vote in enumerate(votes)]
            for i, word in ((0, "v0"), (2, "v1")):
                for nth in (i, i + 1):
                    gate, rectified = gates(group)[nth], f"z{nth - i}"
                    if rule.threshold:
                        lines.append(f"setp.gtu.f32 q, {gate}, {threshold};")
                        lines.append(f"selp.f32 {rectified}, {gate}, 0f00000000, q;")
                    else:
                        lines.append(f"max.NaN.f32 {rectified}, {gate}, 0f00000000;")
                    if not all_rows:
                        lines.append(f"selp.f32 z{nth - i}, z{nth - i}, 0f00000000, exists{nth // 2};")
                lines.append(
                    f"{convert} {word}, z1, z0; movmatrix.sync.aligned.m8n8.trans.b16 {word}, {word};"
                )
            lines.append("selp.b32 t, high, low, odd; and.b32 t, t, own; setp.ne.u32 p, t, 0;")
            offset = group * 8 * 2 * TILE_M
            lines.append(
                f"@p st.global.b32 [to+{offset}], v0; @p st.global.b32 [to+{offset + 16}], v1; SKIP{group}:"
            )
    # Lane n has the votes of columns 8 n to 8 n + 7: column 2 q + i is bit q of each nibble of votes i and
    # i + 2.
    for word, quarters in (("low", (0, 1)), ("high", (2, 3))):
        lines.append(f"mov.b32 {word}, 0;")
        for byte, (quarter, parity) in enumerate((q, i) for q in quarters for i in range(2)):
            mask = 0x11111111 << quarter
            for nth in (parity, parity + 2):
                lines.append(
                    f"and.b32 t, k{nth}, {mask}; popc.b32 t, t; shl.b32 t, t, {8 * byte}; "
                    f"add.u32 {word}, {word}, t;"
                )
    segment_step = warp_step // SEGMENT * width
    lines += [
        f"mul.wide.u32 wide, warp, {segment_step}; add.s64 to, {hits}, wide; mul.wide.u32 wide, lane, 8;",
        f"add.s64 to, to, wide; setp.lt.u32 p, lane, {groups}; @p st.global.v2.b32 [to], {{low, high}};",
        # Counts of both rows in the halves of one word, summed over the four lanes that share them.
        "shl.b32 n1, n1, 16; add.u32 n0, n0, n1;",
        "shfl.sync.bfly.b32 t, n0, 1, 31, -1; add.u32 n0, n0, t;",
        "shfl.sync.bfly.b32 t, n0, 2, 31, -1; add.u32 n0, n0, t;",
        "mul.wide.u32 wide, row, 4; add.s64 to, " + nnz + ", wide;",
        "and.b32 t, n0, 65535; shr.u32 n1, n0, 16; setp.eq.u32 p, quarter, 0;",
        "@p st.global.b32 [to], t; @p st.global.b32 [to+32], n1; }",
    ]
    return "\n".join(lines)
