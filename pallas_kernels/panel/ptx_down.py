"""What the threads of the down projection on Mosaic GPU do that JAX has no operation for, in PTX.

A stage of the ring of weights holds slots by columns, in boxes of eight slots and 64 columns, as wgmma reads
operands whose columns are contiguous: row r of a box has 128 bytes, in which group g of eight columns stands
at place ``g ^ r``. Eight neighbouring threads copy the 128 bytes of a row, and a warpgroup sixteen rows.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.common import hopper_gemm
from pallas_kernels.common.hopper_gemm import ROWS, TILE_M, WARPGROUP, address, assemble
from pallas_kernels.panel.ptx_gathered import (
    PLACE,
    REF,
    ROWS_AT_ONCE,
    SCALAR,
    Copies,
    register_of,
    strided,
    word_of,
    words_of,
)

BOX = 64
"""Columns of a box, and of y that a warpgroup stores together."""
_BOX_BYTES = 8 * BOX * 2
_DEPTH = 16  # slots of one wgmma


@dataclasses.dataclass(frozen=True)
class Steps(Copies):
    """The steps for tiles of ``tile`` columns and slices of ``depth`` slots of values of ``dtype``.

    Attributes:
      chunk: slots whose neurons a thread looks up together.
      d_model: D, in whose rows the weights stand.
    """

    tile: int
    depth: int
    chunk: int
    dtype: jnp.dtype
    d_model: int

    @property
    def _each_row(self):
        return plgpu.Layout.WG_STRIDED((self.chunk // ROWS_AT_ONCE * WARPGROUP,), vec_size=1)

    # -- the loading warpgroup

    def look_up(self, neurons, slot, valid):
        """The neurons that a thread copies from, one for each of its rows of a chunk, whose first slot is
        ``slot``; from ``valid`` on the last one's. Nothing is made of them here: who uses them a chunk later
        does not wait for them now."""

        @plgpu.inline_mgpu(
            arg_types=(REF, SCALAR, SCALAR),
            return_type=plgpu.ShapeDtypeStruct(
                (self.chunk // ROWS_AT_ONCE * WARPGROUP,), jnp.int32, layout=self._each_row
            ),
        )
        def load(_, neurons, slot, valid):
            found = []
            for first in range(0, self.chunk, ROWS_AT_ONCE):
                text = (
                    f"{{ {PLACE} .reg .b64 a; add.s32 r, r, {first}; "
                    "sub.s32 t, $3, 1; min.s32 r, r, t; max.s32 r, r, 0; add.s32 r, r, $2; "
                    "mul.wide.s32 a, r, 4; add.s64 a, a, $1; ld.global.nc.b32 $0, [a]; }"
                )
                operands = [address(neurons, 64), word_of(slot), word_of(valid)]
                found.append(register_of(assemble(text, operands, "=r,l,r,r", "i32")))
            return strided(found, 1, is_signed=True)

        return load(neurons, slot, valid)

    def gather(self, w, ring, rows, stage, part, column, valid):
        """Starts copying the ``part``-th slice of a chunk to a stage of the ring, as one group: columns from
        ``column`` on of its first ``valid`` rows, and zeros behind them."""

        @plgpu.inline_mgpu(
            arg_types=(
                REF,
                plgpu.RefType(hopper_gemm.shared_transforms(self.dtype)),
                self._each_row,
                *[SCALAR] * 3,
            )
        )
        def start(_, w, ring, rows, stage, column, valid):
            row_bytes = self.tile // BOX * _BOX_BYTES  # of eight slots
            lines = [
                f"{{ {PLACE} .reg .pred p, q; .reg .b32 d, n; .reg .b64 a, s; mul.wide.u32 s, c, 16;",
                # 16 bytes of row r % 8 of a box of slots r / 8
                "and.b32 t, r, 7; xor.b32 c, c, t; shl.b32 c, c, 4; shl.b32 t, t, 7; add.s32 d, t, c;",
                f"shr.u32 t, r, 3; mad.lo.s32 d, t, {row_bytes}, d;",
                f"mad.lo.s32 d, $2, {self.tile * self.depth * 2}, d; add.s32 d, d, $1; sub.s32 r, $4, r;",
                "mul.wide.s32 a, $3, 2; add.s64 s, s, a; add.s64 s, s, $0;",
            ]
            for group in range(self.depth // ROWS_AT_ONCE):
                first = group * ROWS_AT_ONCE
                lines.append(
                    f"setp.gt.s32 p, r, {first}; selp.b32 n, 16, 0, p; "
                    f"mul.wide.u32 a, ${5 + group}, {2 * self.d_model}; add.s64 a, a, s;"
                )
                for box in range(self.tile // BOX):
                    to = first // 8 * row_bytes + box * _BOX_BYTES
                    size = "n"
                    if self.d_model % self.tile:
                        lines.append(
                            f"add.s32 t, $3, {box * BOX}; setp.lt.s32 q, t, {self.d_model}; "
                            f"selp.b32 t, n, 0, q;"
                        )
                        size = "t"
                    source = f"[a+{box * BOX * 2}]"
                    lines.append(f"cp.async.cg.shared.global.L2::128B [d+{to}], {source}, 16, {size};")
            lines.append("cp.async.commit_group; }")
            count = self.depth // ROWS_AT_ONCE
            own = words_of(rows.registers.flat[part * count : (part + 1) * count])
            operands = [address(w, 64), address(ring, 32), *map(word_of, (stage, column, valid)), *own]
            assemble("\n".join(lines), operands, ",".join(["l", *["r"] * (len(operands) - 1)]))

        start(w, ring, rows, stage, column, valid)

    # -- the multiplying warpgroups

    @property
    def _accumulator(self):
        return plgpu.ShapeDtypeStruct((ROWS, self.tile), jnp.float32, layout=plgpu.Layout.WGMMA)

    def zeros(self):
        """A sum of nothing: (64, tile) f32."""

        @plgpu.inline_mgpu(return_type=self._accumulator)
        def make(_):
            zero = mgpu_utils.c(0.0, ir.F32Type.get())
            return mgpu.FragmentedArray.splat(
                zero, (ROWS, self.tile), layout=mgpu.WGMMA_LAYOUT, is_signed=None
            )

        return make()

    def multiply(self, acc, h, w, stage, half):
        """Starts adding the product of half of a slice's tokens and its columns, as one group. What it
        returns is the sum once that group is done; until then it is for the next product alone."""
        transforms = plgpu.RefType(hopper_gemm.shared_transforms(self.dtype))

        @plgpu.inline_mgpu(
            arg_types=(plgpu.Layout.WGMMA, transforms, transforms, SCALAR, SCALAR),
            return_type=self._accumulator,
        )
        def start(_, acc, h, w, stage, half):
            f32 = ir.F32Type.get()
            registers = acc.registers
            width = ir.VectorType(registers.flat[0].type).shape[0]
            values = [
                llvm.extractelement(register, mgpu_utils.c(n, ir.IntegerType.get_signless(32)))
                for register in registers.flat
                for n in range(width)
            ]
            n = len(values)
            h_step, w_step = TILE_M // BOX * _BOX_BYTES, self.tile // BOX * _BOX_BYTES
            kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(self.dtype).name]

            def descriptor(step):
                """How an operand stands: a box behind the other in columns, and so many bytes on in slots."""
                constant = (_BOX_BYTES >> 4) << 16 | (step >> 4) << 32 | 1 << 62
                return f"{constant:#x}"

            # 2 n: h's address, 2 n + 1: w's, then stage and half
            lines = [
                "{ .reg .pred p; .reg .b32 t; .reg .b64 a, b; setp.ne.b32 p, 1, 0;",
                f"mad.lo.s32 t, ${2 * n + 2}, {TILE_M * self.depth * 2}, ${2 * n};",
                f"mad.lo.s32 t, ${2 * n + 3}, {_BOX_BYTES}, t;",
                "and.b32 t, t, 0x3FFFF; shr.u32 t, t, 4; cvt.u64.u32 a, t;",
                f"or.b64 a, a, {descriptor(h_step)};",
                f"mad.lo.s32 t, ${2 * n + 2}, {self.tile * self.depth * 2}, ${2 * n + 1};",
                "and.b32 t, t, 0x3FFFF; shr.u32 t, t, 4; cvt.u64.u32 b, t;",
                f"or.b64 b, b, {descriptor(w_step)};",
                "wgmma.fence.sync.aligned;",
            ]
            sums = ",".join(f"${k}" for k in range(n))
            for k in range(self.depth // _DEPTH):
                if k:
                    lines.append(f"add.s64 a, a, {2 * h_step >> 4}; add.s64 b, b, {2 * w_step >> 4};")
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{self.tile}k16.f32.{kind}.{kind} "
                    f"{{{sums}}}, a, b, p, 1, 1, 1, 1;"
                )
            lines.append("wgmma.commit_group.sync.aligned; }")
            constraints = ["=f"] * n + [str(k) for k in range(n)] + ["r"] * 4
            result = llvm.StructType.get_literal([f32] * n)
            found: Any = llvm.inline_asm(
                result,
                [*values, address(h, 32), address(w, 32), word_of(stage), word_of(half)],
                "\n".join(lines),
                ",".join(constraints),
                has_side_effects=True,
            )
            new = registers.copy()
            words = [llvm.extractvalue(f32, found, [k]) for k in range(n)]
            vector = ir.VectorType.get((width,), f32)
            i32 = ir.IntegerType.get_signless(32)
            for place in range(new.size):
                value = llvm.mlir_undef(vector)
                for m in range(width):
                    value = llvm.insertelement(value, words[place * width + m], mgpu_utils.c(m, i32))
                new.flat[place] = value
            return mgpu.FragmentedArray(_registers=new, _layout=acc.layout, _is_signed=acc.is_signed)

        return start(acc, h, w, stage, half)

    def store(self, acc, buffer, y, half, row, column):
        """Rounds a (64 tokens, tile) sum and writes it to y from (row, column) on, but for what is past its
        edges."""

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, REF, REF, *[SCALAR] * 3))
        def store(_, acc, buffer, y, half, row, column):
            values = hopper_gemm.values(acc)
            tokens = ir.MemRefType(y.type).shape[0]
            convert = hopper_gemm.CONVERT[jnp.dtype(self.dtype).name]
            per_row = len(values) // 2
            for slab in range(self.tile // BOX):
                # Of a group of eight columns a thread has two, in two rows.
                own = [values[hh * per_row + slab * 16 + k] for hh in range(2) for k in range(16)]
                lines = [
                    "{ .reg .pred p, q; .reg .b32 t, l, w, m, i, s, d, r, v0, v1, v2, v3; .reg .b64 a;",
                    "mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 l, t, 31; shr.u32 w, t, 5;",
                    # The warp's 16 rows of 128 bytes.
                    f"mad.lo.s32 w, $34, 4, w; mad.lo.s32 w, w, {16 * BOX * 2}, $32;",
                    "and.b32 i, l, 7; shr.u32 m, l, 3; and.b32 s, m, 1; shl.b32 s, s, 3; add.s32 s, s, i;",
                    "shl.b32 s, s, 7; add.s32 s, s, w; shr.u32 m, m, 1; xor.b32 m, m, i; shl.b32 m, m, 4;",
                    "add.s32 s, s, m;",
                    "bar.warp.sync -1;",
                ]
                for pair in range(4):
                    for nth in range(4):
                        first = nth % 2 * 16 + 2 * (2 * pair + nth // 2)
                        lines.append(f"{convert} v{nth}, ${first + 1}, ${first};")
                    lines.append(
                        f"xor.b32 d, s, {pair << 5}; "
                        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [d], {v0, v1, v2, v3};"
                    )
                lines += [
                    "bar.warp.sync -1;",
                    # Eight threads read a row's 128 bytes, a warp four rows.
                    "and.b32 m, l, 7; shr.u32 i, l, 3; shr.u32 r, t, 5; shl.b32 r, r, 4; add.s32 r, r, i;",
                    "add.s32 r, r, $35;",
                    f"mul.wide.s32 a, r, {2 * self.d_model}; add.s64 a, a, $33;",
                    f"shl.b32 d, m, 3; add.s32 d, d, $36; add.s32 d, d, {slab * BOX};",
                    f"setp.lt.s32 q, d, {self.d_model};",
                ]
                lines.append(".reg .b64 b; mul.wide.s32 b, d, 2; add.s64 a, a, b;")
                for step in range(4):
                    lines.append(
                        f"add.s32 s, i, {4 * step}; and.b32 d, s, 7; xor.b32 d, d, m; shl.b32 d, d, 4; "
                        "shl.b32 s, s, 7; add.s32 d, d, s; add.s32 d, d, w; "
                        "ld.shared.v4.b32 {v0, v1, v2, v3}, [d]; "
                        f"add.s32 s, r, {4 * step}; setp.lt.and.s32 p, s, {tokens}, q; "
                        f"@p st.global.v4.b32 [a+{4 * step * 2 * self.d_model}], {{v0, v1, v2, v3}};"
                    )
                lines.append("}")
                operands = [*own, address(buffer, 32), address(y, 64), *map(word_of, (half, row, column))]
                assemble("\n".join(lines), operands, ",".join(["f"] * 32 + ["r", "l", "r", "r", "r"]))

        store(acc, buffer, y, half, row, column)
