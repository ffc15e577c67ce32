"""The epilogue of the gradient of PanelELL's hidden activations on Mosaic GPU, in PTX where JAX has no
operation for it.

Both terms of ``dy Wd^T + sign(h) scale`` are added in f32, which only the multiplying warpgroups have: they
find the signs in the buffer that takes their product. The packing warpgroup has read gate and up projection
before, and has written h then. It reads both again where it needs them, mostly from L2: there are not the
registers to keep them.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.common.hopper_gemm import WARPGROUP, address, assemble
from pallas_kernels.panel import ptx_gathered
from pallas_kernels.panel.pallas_triton import hidden
from pallas_kernels.panel.pallas_triton_backward import projection_gradients
from pallas_kernels.panel.ptx_gathered import (
    PLACE,
    REF,
    ROW_BYTES,
    ROWS_AT_ONCE,
    constant,
    row_layout,
    strided,
)

_SIGN_BITS = 0xA000A000
"""What 1 and -1 are told from each other and from 0 by, in two values of either type."""
_SHIFTS = (0, 1, 4, 5)
"""By how much the bits of four words are shifted to share one."""
_ONES = 0x3F80
"""1 in bf16."""


@dataclasses.dataclass(frozen=True)
class Steps(ptx_gathered.Steps):
    """The steps of dg, du and h: inputs are gate and up projection over the slots, and the scale (1,) where
    ``scaled``."""

    scaled: bool

    def _kept(self, refs, place, half):
        """First row, size, gate and up projection of each part."""
        for first, size in self.parts:
            gate, up = (self.get(ref, first, size, place, half) for ref in refs[1:3])
            yield first, size, gate, up

    def prepare(self, refs, place, half):
        """Writes h; gives its signs, packed, if they are needed."""
        signs = []
        for first, size, gate, up in self._kept(refs, place, half):
            h = hidden(gate, up, self.rule)
            self.put(h, first, size, refs[-1], place, half)
            if self.scaled:
                signs.append(self._packed_signs(h, size))
        return signs

    def _packed_signs(self, h, size):
        """A word for each of a thread's groups of eight values: (size / 16 * 128,) int32."""
        groups = size // ROWS_AT_ONCE
        each = plgpu.Layout.WG_STRIDED((groups * WARPGROUP,), vec_size=1)

        @plgpu.inline_mgpu(
            arg_types=(row_layout(size),),
            return_type=plgpu.ShapeDtypeStruct((groups * WARPGROUP,), jnp.int32, layout=each),
        )
        def pack(_, sign):
            i32 = ir.IntegerType.get_signless(32)
            packed = []
            for register in sign.registers.flat:
                vector = llvm.bitcast(ir.VectorType.get((4,), i32), register)
                words = [llvm.extractelement(vector, constant(nth)) for nth in range(4)]
                shifted = [
                    arith.shrui(arith.andi(word, constant(_SIGN_BITS)), constant(shift))
                    for word, shift in zip(words, _SHIFTS, strict=True)
                ]
                total = shifted[0]
                for bits in shifted[1:]:
                    total = arith.ori(total, bits)
                packed.append(llvm.bitcast(ir.VectorType.get((1,), i32), total))
            return strided(packed, 1, is_signed=True)

        wide = h.astype(jnp.float32)
        one, zero = jnp.ones_like(wide), jnp.zeros_like(wide)
        sign = jnp.where(wide > 0, one, jnp.where(wide < 0, -one, zero))
        return pack(sign.astype(h.dtype))

    def lay(self, prepared, buffer):
        """Leaves signs in the buffer as bf16, whatever the type of the values."""
        for (first, size), signs in zip(self.parts, prepared, strict=bool(self.scaled)):
            self._lay_part(first, size, signs, buffer)

    def _lay_part(self, first, size, signs, buffer):
        each = plgpu.Layout.WG_STRIDED((size // ROWS_AT_ONCE * WARPGROUP,), vec_size=1)

        @plgpu.inline_mgpu(arg_types=(each, REF))
        def store(_, signs, buffer):
            i32 = ir.IntegerType.get_signless(32)
            for row, register in zip(
                range(first, first + size, ROWS_AT_ONCE), signs.registers.flat, strict=True
            ):
                unpack = " ".join(
                    f"shl.b32 t, $0, {shift}; and.b32 v{nth}, t, 0x80008000; shr.u32 t, t, 13; "
                    f"and.b32 t, t, 0x00010001; mad.lo.u32 v{nth}, t, {_ONES}, v{nth};"
                    for nth, shift in enumerate(_SHIFTS)
                )
                text = (
                    f"{{ {PLACE} .reg .b32 d, v0, v1, v2, v3; and.b32 d, r, 7; xor.b32 c, c, d; "
                    f"shl.b32 c, c, 4; shl.b32 r, r, 7; add.s32 d, r, c; add.s32 d, d, $1; {unpack} "
                    f"st.shared.v4.b32 [d+{row * ROW_BYTES}], {{v0, v1, v2, v3}}; }}"
                )
                assemble(text, [llvm.bitcast(i32, register), address(buffer, 32)], "r,r")

        store(signs, buffer)

    def store(self, product, buffer, refs):
        self.round_into(product, buffer, *([refs[3][0]] if self.scaled else []))

    def pack(self, dhs, refs, place, half, carry):
        """Writes dg and du of half of a tile's tokens, from what `take` gave."""
        dg_ref, du_ref, _ = refs[-3:]
        for (first, size, gate, up), dh in zip(self._kept(refs, place, half), dhs, strict=True):
            gradients = projection_gradients(dh.astype(jnp.float32), gate, up, self.rule)
            for value, ref in zip(gradients, (dg_ref, du_ref), strict=True):
                self.put(value, first, size, ref, place, half)
        return carry
