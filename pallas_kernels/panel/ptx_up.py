"""The epilogue of the up projection on Mosaic GPU, in PTX where JAX has no operation for it."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.common.hopper_gemm import ROWS, TILE_M, WARPGROUP, address, assemble
from pallas_kernels.panel import ptx_gathered
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import hidden
from pallas_kernels.panel.ptx_gathered import (
    PLACE,
    QUAD,
    REF,
    ROW_BYTES,
    ROWS_AT_ONCE,
    SCALAR,
    row_layout,
    strided,
    word_of,
)

_SUM = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Steps(ptx_gathered.Steps):
    """The steps of ``h = a(g) b(x Wu^T)``: inputs are the segments of the lists and the gates, outputs h, l1
    and, where they are kept, the gates and the projection over the slots.

    Attributes:
      width: F' of the gates (n_panels, F', P).
    """

    width: int

    def nothing(self):
        """Each thread's sum of nothing: (128,) f32."""

        @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=_SUM))
        def make(_):
            f32 = ir.F32Type.get()
            zero = mgpu_utils.c(0.0, f32)
            return strided([llvm.bitcast(ir.VectorType.get((1,), f32), zero)], 1)

        return make()

    def pack(self, ups, refs, place, half, sums):
        """Writes h of half of a tile's tokens, and what is kept, from what `take` gave; adds each thread's
        |h| to its sum."""
        neurons, segments, values, h, _, *kept = refs
        for (first, size), up in zip(self.parts, ups, strict=True):
            gate = self._gates(first, size, values, neurons, segments, place, half)
            value = hidden(gate, up, self.rule)
            sums = self._add(value, sums, size)
            self.put(value, first, size, h, place, half)
            for array, ref in zip((gate, up), kept, strict=False):
                self.put(array, first, size, ref, place, half)
        return sums

    def _gates(self, first, size, values, neurons, segments, place, half):
        """The gates of a part, zero where a segment has none and past the tile's neurons."""

        @plgpu.inline_mgpu(arg_types=(REF, REF, REF, *[SCALAR] * 4), return_type=self.rows_type(size))
        def load(_, values, neurons, segments, panel, slot, valid, half):
            panel, slot, valid, half = map(word_of, (panel, slot, valid, half))
            rows = range(first, first + size, ROWS_AT_ONCE)
            packed = []
            # Neuron, and whether its segment was written, of all rows first: their latencies overlap.
            for row in rows:
                text = (
                    f"{{ {PLACE} .reg .pred p; .reg .b32 s, n; .reg .b64 a; add.s32 r, r, {row}; "
                    "setp.lt.s32 p, r, $4; add.s32 r, r, $3; mov.b32 n, 0; mov.b32 s, 0; "
                    "cvt.s64.s32 a, r; add.s64 a, a, $2; @p ld.global.nc.u8 s, [a]; "
                    "mul.wide.s32 a, r, 4; add.s64 a, a, $1; @p ld.global.nc.b32 n, [a]; "
                    f"shr.u32 c, c, 1; mad.lo.s32 c, $5, {ROWS // SEGMENT}, c; "
                    "shr.u32 s, s, c; and.b32 s, s, 1; shl.b32 n, n, 1; or.b32 $0, n, s; }"
                )
                operands = [address(neurons, 64), address(segments, 64), slot, valid, half]
                packed.append(assemble(text, operands, "=r,l,l,r,r,r", "i32"))
            found = []
            for word in packed:
                text = (
                    f"{{ {PLACE} .reg .pred p; .reg .b32 n, s; .reg .b64 a, b; "
                    "and.b32 s, $7, 1; setp.ne.u32 p, s, 0; shr.u32 n, $7, 1; "
                    f"mul.wide.s32 b, $5, {self.width}; cvt.s64.s32 a, n; add.s64 a, a, b; "
                    f"mul.lo.s64 a, a, {2 * TILE_M}; mul.wide.s32 b, $6, {ROW_BYTES}; add.s64 a, a, b; "
                    "mul.wide.s32 b, c, 16; add.s64 a, a, b; add.s64 a, a, $4; "
                    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                    "@p ld.global.v4.b32 {$0, $1, $2, $3}, [a]; }"
                )
                operands = [address(values, 64), panel, half, word]
                found.append(self.eight(assemble(text, operands, "=&r,=&r,=&r,=&r,l,r,r,r", QUAD)))
            return strided(found, 8)

        return load(values, neurons, segments, place.panel, place.slot, place.valid, half)

    def _add(self, value, sums, size):
        """The sums, and each thread's |h| of a part."""

        @plgpu.inline_mgpu(
            arg_types=(row_layout(size), _SUM),
            return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=_SUM),
        )
        def add(_, wide, sums):
            f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
            total = llvm.bitcast(f32, sums.registers.flat[0])
            for register in wide.registers.flat:
                for nth in range(8):
                    total = arith.addf(total, llvm.extractelement(register, mgpu_utils.c(nth, i32)))
            return strided([llvm.bitcast(ir.VectorType.get((1,), f32), total)], 1)

        return add(lax.abs(value.astype(jnp.float32)), sums)

    def finish(self, sums, refs, program):
        """Writes a program's sums, each warp's as one: l1 (4 programs,)."""
        l1 = refs[4]

        @plgpu.inline_mgpu(arg_types=(_SUM, REF, SCALAR))
        def store(_, sums, l1, program):
            steps = (f"shfl.sync.bfly.b32 y, x, {1 << n}, 31, -1; add.f32 x, x, y; " for n in range(5))
            text = (
                "{ .reg .pred p; .reg .b32 t, w; .reg .f32 x, y; .reg .b64 a; mov.f32 x, $0; "
                + "".join(steps)
                + "mov.u32 t, %tid.x; and.b32 t, t, 127; shr.u32 w, t, 5; and.b32 t, t, 31; "
                "setp.eq.u32 p, t, 0; mad.lo.s32 w, $2, 4, w; mul.wide.s32 a, w, 4; add.s64 a, a, $1; "
                "@p st.global.f32 [a], x; }"
            )
            total = llvm.bitcast(ir.F32Type.get(), sums.registers.flat[0])
            assemble(text, [total, address(l1, 64), word_of(program)], "f,l,r")

        store(sums, l1, program)
