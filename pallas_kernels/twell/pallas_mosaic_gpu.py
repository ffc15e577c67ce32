"""The gate stage of TwELL for Hopper and Blackwell: an epilogue that makes words of their GEMM's tiles.

Why it exists: `hopper_gemm`; FLOPs and bytes are those of `gate_pack` on Triton.

How. The epilogue is written per thread, in PTX, because what a thread does depends on what it finds: a thread
makes a bit mask of its 128 gates and counts them, learns from the three other lanes of its rows where its
slots start, leaves its gates in shared memory where it can index them, and walks the set bits only. The walk
costs what the non-zeros cost, not what the tile costs. Hit counts are shared-memory counters of the
warpgroup, written once a tile as bytes: nothing is added in global memory, so the same input gives
the same bits.

Numerics. As `gate_pack` on Triton: f32 accumulation, rounded before the sign is read.

Limits. Those of the GEMM; T of 128 or 256. JAX's interpreter cannot run PTX: tests emulate it, and on a GPU
check its results.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.activations import RELU, Rule
from pallas_kernels.common import hopper_gemm, mosaic_gemm, varying_axes
from pallas_kernels.common.hopper_gemm import WARPGROUP, address, assemble
from pallas_kernels.common.tile_walk import HALVES, TILE_M
from pallas_kernels.formats import TwELL

_TILES = (128, 256)
_MOST_STAGES = 5


def unsupported_reason(d_model: int, d_ff: int, dtype: jnp.dtype, tile: int) -> str | None:
    """What of a call's shape this kernel cannot do, in one sentence; None if it can."""
    if tile not in _TILES:
        return f"backend='mosaic_gpu' packs tiles of {' or '.join(map(str, _TILES))} columns; got tile={tile}"
    return hopper_gemm.unsupported_reason(d_model, d_ff, dtype)


def gate_pack(
    x: jax.Array, w_gate: jax.Array, *, tile: int, slots: int, rule: Rule = RELU, interpret: Any = None
) -> tuple[TwELL, jax.Array]:
    """The active gates of ``x Wg^T`` in TwELL: x (M, D), w_gate (F, D) of one 16-bit type.

    ``interpret`` is what `plgpu.kernel` takes by this name.

    Returns:
      The packed gates, and neuron_hits (F,) int32.
    """
    (tokens, _), d_ff = x.shape, w_gate.shape[0]
    n_tiles, n_blocks = pl.cdiv(d_ff, tile), pl.cdiv(tokens, TILE_M)

    def epilogue(acc, place, words, hits, *, counters, gates):
        column = place.tile_id * tile
        _pack(
            acc,
            words.at[pl.ds(place.row, place.rows.span), pl.ds(place.tile_id * slots, slots)],
            hits.at[place.row_block * HALVES + place.half, pl.ds(column, tile)],
            counters,
            gates,
            column,
            jnp.minimum(tokens - place.row, place.rows.span),
            jnp.minimum(d_ff - column, tile),
            slots=slots,
            row_bytes=n_tiles * slots * 4,
            warp_step=place.rows.warp_step,
            dtype=x.dtype,
            rule=rule,
        )

    gemm, scratch_bytes = mosaic_gemm.for_device(device.current()), 4 * (tile + tile // 8 * WARPGROUP)
    words, hits = gemm.gemm(
        epilogue,
        x,
        w_gate,
        out_type=(
            jax.ShapeDtypeStruct((tokens, n_tiles * slots), jnp.uint32),
            jax.ShapeDtypeStruct((n_blocks * HALVES, n_tiles * tile), jnp.uint8),
        ),
        tile=tile,
        stages=min(gemm.stages_for(tile, scratch_bytes), _MOST_STAGES),
        scratch={
            "counters": plgpu.SMEM((tile,), jnp.int32),
            "gates": plgpu.SMEM((tile // 8 * WARPGROUP,), jnp.uint32),
        },
        name="twell_gate",
        interpret=interpret,
    )
    words, hits = varying_axes.vary_with(x, (words, hits))  # Mosaic GPU's outputs do not say so themselves
    packed = TwELL(words, None, d_ff, tile, slots, x.dtype)
    return packed, jnp.sum(hits, axis=0, dtype=jnp.int32)[:d_ff]


def _pack(
    acc,
    words,
    hits,
    counters,
    gates,
    column,
    rows_left,
    columns_left,
    *,
    slots,
    row_bytes,
    warp_step,
    dtype,
    rule,
):
    """Writes a warpgroup's (64, T) product to its words and hit counts."""
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ref, ref, ref, ref, scalar, scalar, scalar))
    def pack(_, acc, words, hits, counters, gates, column, rows_left, columns_left):
        tile = acc.shape[1]
        scalars = [value.registers.flat[0] for value in (column, rows_left, columns_left)]
        pointers = [address(words, 64), address(hits, 64), address(counters, 32), address(gates, 32)]
        assemble(_zero_counters(tile), [pointers[2]], "r")
        mgpu_utils.warpgroup_barrier()
        constraints = ",".join(["f"] * (tile // 2) + ["l", "l", "r", "r", "r", "r", "r"])
        assemble(
            _walk(tile, slots, row_bytes, warp_step, dtype, rule),
            [*hopper_gemm.values(acc), *pointers, *scalars],
            constraints,
        )
        mgpu_utils.warpgroup_barrier()
        assemble(_flush_counters(tile), [pointers[1], pointers[2]], "l,r")
        mgpu_utils.warpgroup_barrier()

    pack(acc, words, hits, counters, gates, column, rows_left, columns_left)


def _zero_counters(tile):
    stores = " ".join(f"st.shared.b32 [a+{4 * i}], 0;" for i in range(0, tile, WARPGROUP))
    return f"{{ .reg .b32 a; mov.u32 a, %tid.x; and.b32 a, a, 127; mad.lo.u32 a, a, 4, $0; {stores} }}"


def _flush_counters(tile):
    moves = " ".join(
        f"ld.shared.b32 v, [a+{4 * i}]; st.global.u8 [g+{i}], v;" for i in range(0, tile, WARPGROUP)
    )
    return f"""{{ .reg .b32 t, a, v; .reg .b64 g;
        mov.u32 t, %tid.x; and.b32 t, t, 127; mad.lo.u32 a, t, 4, $1; mad.wide.u32 g, t, 1, $0; {moves} }}"""


def _walk(tile, slots, row_bytes, warp_step, dtype, rule):
    """The epilogue of one thread, as PTX.

    Operands: the T / 2 `hopper_gemm.values`; addresses of words, hits, counters and gates; the tile's first
    column; rows and columns of it that exist. First rows of neighbouring warps are ``warp_step`` apart, a
    power of two.
    """
    each = tile // 4  # columns of a thread in one row
    n_words = each // 32  # of its mask
    shift = warp_step.bit_length() - 1

    def value(half, k):
        return f"${half * each + k}"

    words, _, counters, gates, column, rows_left, columns_left = (f"${2 * each + i}" for i in range(7))
    convert = hopper_gemm.CONVERT[jnp.dtype(dtype).name]
    threshold = hopper_gemm.constant(rule.last_inactive(dtype))
    masks = [(half, word) for half in range(2) for word in range(n_words)]
    lines = [
        "{ .reg .pred p, q; .reg .b16 h; .reg .b64 wide;",
        ".reg .b32 tid, lane, quarter, row, t, w, c, x1, x2, before, own, at, pair, odd, left, hit, any;",
        *(f".reg .b32 m{half}_{word}; mov.b32 m{half}_{word}, 0;" for half, word in masks),
        *(f".reg .b64 to{half}_{word};" for half, word in masks),
        *(f".reg .b32 n{half}, e{half}; .reg .b64 to{half}, step{half};" for half in range(2)),
        "mov.u32 tid, %tid.x; and.b32 tid, tid, 127; and.b32 lane, tid, 31; and.b32 quarter, lane, 3;",
        f"shr.u32 row, tid, 5; shl.b32 row, row, {shift}; shr.u32 t, lane, 2; add.u32 row, row, t;",
    ]
    # The mask: active unless at or under the threshold, so NaN is active. Columns past F and rows past M are
    # not: they are zeros, but zero times an infinite weight is NaN.
    for half in range(2):
        for k in range(each):
            mask = f"m{half}_{k // 32}"
            lines.append(
                f"setp.gtu.f32 p, {value(half, k)}, {threshold}; @p or.b32 {mask}, {mask}, {1 << k % 32};"
            )
    lines.append(f"shr.u32 left, {columns_left}, 3; shl.b32 left, left, 1;")
    for word in range(n_words):
        lines.append(f"max.s32 t, left, {32 * word}; sub.u32 t, t, {32 * word};")
        lines.append("shl.b32 w, 1, t; sub.u32 w, w, 1;")  # a shift by 32 or more gives 0, so all ones
        lines += [f"and.b32 m{half}_{word}, m{half}_{word}, w;" for half in range(2)]
    for half in range(2):
        lines.append(f"add.u32 t, row, {8 * half}; setp.lt.s32 p, t, {rows_left};")
        lines += [f"@!p mov.b32 m{half}_{word}, 0;" for word in range(n_words)]
    # Counts of both rows in the halves of one word: in this thread, in the lanes before it, in the row.
    lines.append("mov.b32 c, 0;")
    for half, word in reversed(masks):
        shift = "shl.b32 c, c, 16;" if (half, word) == (0, n_words - 1) else ""
        lines.append(f"{shift} popc.b32 t, m{half}_{word}; add.u32 c, c, t;")
    lines += [
        "shfl.sync.bfly.b32 x1, c, 1, 31, -1; add.u32 t, c, x1; shfl.sync.bfly.b32 x2, t, 2, 31, -1;",
        "add.u32 t, t, x2; and.b32 n0, t, 65535; shr.u32 n1, t, 16; mov.b32 before, 0;",
        "and.b32 t, quarter, 1; setp.ne.u32 p, t, 0; @p add.u32 before, before, x1;",
        "and.b32 t, quarter, 2; setp.ne.u32 p, t, 0; @p add.u32 before, before, x2;",
        "and.b32 e0, before, 65535; shr.u32 e1, before, 16;",
        (
            f"mul.wide.u32 wide, row, {row_bytes}; add.s64 to0, {words}, wide; "
            f"add.s64 to1, to0, {8 * row_bytes};"
        ),
    ]
    # The true count goes to slot 0. A row that overflows writes all it has to its slot 1, which nobody reads.
    for half in range(2):
        lines += [
            f"add.u32 t, row, {8 * half}; setp.lt.s32 p, t, {rows_left}; setp.eq.and.u32 p, quarter, 0, p;",
            f"@p st.global.b32 [to{half}], n{half};",
            f"setp.lt.u32 p, n{half}, {slots}; selp.b64 step{half}, 4, 0, p; selp.b32 t, e{half}, 0, p;",
            f"mul.wide.u32 wide, t, 4; add.s64 to{half}, to{half}, wide; add.s64 to{half}, to{half}, 4;",
        ]
        for word in range(n_words):
            lines.append(
                f"mov.b64 to{half}_{word}, to{half}; popc.b32 t, m{half}_{word}; cvt.u64.u32 wide, t;"
            )
            lines.append(f"mad.lo.s64 to{half}, wide, step{half}, to{half};")
    lines += [
        f"shl.b32 own, quarter, 1; mad.lo.u32 hit, own, 4, {counters}; add.u32 own, own, {column};",
        f"mad.lo.u32 at, tid, 4, {gates};",
    ]
    # Each row in turn: its gates go where a register number can be an address, then its set bits are visited.
    for half in range(2):
        for pair in range(each // 2):
            lines.append(f"{convert} w, {value(half, 2 * pair + 1)}, {value(half, 2 * pair)};")
            lines.append(f"st.shared.b32 [at+{4 * WARPGROUP * pair}], w;")
        lines.append(f"NEXT{half}: mov.b32 any, 0;")
        lines += [f"or.b32 any, any, m{half}_{word};" for word in range(n_words)]
        lines.append(f"setp.eq.u32 q, any, 0; @q bra DONE{half};")
        for word in range(n_words):
            mask, to = f"m{half}_{word}", f"to{half}_{word}"
            lines += [
                f"setp.ne.u32 p, {mask}, 0; brev.b32 t, {mask}; clz.b32 t, t;",
                f"sub.u32 w, {mask}, 1; and.b32 {mask}, {mask}, w; shr.u32 pair, t, 1; and.b32 odd, t, 1;",
                (
                    f"mad.lo.u32 t, pair, {4 * WARPGROUP}, at; mad.lo.u32 t, odd, 2, t; "
                    "mad.lo.u32 odd, pair, 8, odd;"
                ),
                f"@p ld.shared.u16 h, [t+{4 * WARPGROUP * 16 * word}]; cvt.u32.u16 w, h; shl.b32 w, w, 16;",
                (
                    f"add.u32 t, odd, own; add.u32 w, w, t; add.u32 w, w, {128 * word}; "
                    f"@p st.global.b32 [{to}], w;"
                ),
                f"@p add.s64 {to}, {to}, step{half}; mad.lo.u32 t, odd, 4, hit;",
                f"@p red.shared.add.u32 [t+{4 * 128 * word}], 1;",
            ]
        lines.append(f"bra NEXT{half}; DONE{half}:")
    return "\n".join([*lines, "}"])
