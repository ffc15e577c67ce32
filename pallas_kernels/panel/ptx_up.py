"""What the threads of the up projection on Mosaic GPU do that JAX has no operation for, in PTX.

A warpgroup's 128 threads share an array of 16-bit values, rows of 64, as 16 rows of eight threads: thread t
has the eight values from ``8 (t % 8)`` on of the rows ``t / 8``, ``t / 8 + 16``, and so on, 16 bytes of each.
So eight neighbouring threads read or write 128 bytes. In shared memory, group g of eight values of row r
stands at place ``g ^ (r % 8)`` of the row: the swizzle that wgmma reads, with which eight threads that access
16 bytes each of eight rows meet in no bank.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.activations import Rule
from pallas_kernels.common import hopper_gemm
from pallas_kernels.common.hopper_gemm import ROWS, TILE_K, TILE_M, WARPGROUP, address, assemble
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import hidden

ROWS_AT_ONCE = 16
"""Rows that a warpgroup's threads have 16 bytes each of."""
_ROW_BYTES = 2 * TILE_K
_PART = 64  # rows of the epilogue whose gates are in registers together
_SCALAR, _REF = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
_QUAD = "!llvm.struct<(i32, i32, i32, i32)>"
_PLACE = ".reg .b32 t, r, c; mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 c, t, 7; shr.u32 r, t, 3;"
"""The thread's first row and its 16 bytes of one."""
_SUM = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps for tiles of at most ``tile`` neurons, a multiple of 16, of values of ``dtype``.

    Attributes:
      d_model: D, in whose rows the weights stand.
      width: F' of the gates (n_panels, F', P).
    """

    tile: int
    dtype: jnp.dtype
    d_model: int
    width: int
    rule: Rule

    @property
    def _groups(self) -> range:
        return range(self.tile // ROWS_AT_ONCE)

    @property
    def _parts(self) -> list[tuple[int, int]]:
        """First rows and sizes."""
        return [(first, min(_PART, self.tile - first)) for first in range(0, self.tile, _PART)]

    @property
    def _each_row(self):
        return plgpu.Layout.WG_STRIDED((len(self._groups) * WARPGROUP,), vec_size=1)

    def _rows(self, rows: int) -> plgpu.ShapeDtypeStruct:
        return plgpu.ShapeDtypeStruct((rows * ROWS,), self.dtype, layout=_layout(rows))

    # -- the loading warpgroup

    def offsets(self, neurons, slot, valid):
        """Where a thread copies from, in bytes from the weights' first: (tile / 16 * 128,) int32, one for
        each of its rows. Row n is the neuron of slot ``slot + n``, or from ``valid`` on that of the last one.
        """

        @plgpu.inline_mgpu(
            arg_types=(_REF, _SCALAR, _SCALAR),
            return_type=plgpu.ShapeDtypeStruct(
                (len(self._groups) * WARPGROUP,), jnp.int32, layout=self._each_row
            ),
        )
        def load(_, neurons, slot, valid):
            i32 = ir.IntegerType.get_signless(32)
            found = []
            for group in self._groups:
                text = (
                    f"{{ {_PLACE} .reg .b64 a; add.s32 r, r, {group * ROWS_AT_ONCE}; "
                    "sub.s32 t, $3, 1; min.s32 r, r, t; add.s32 r, r, $2; "
                    "mul.wide.s32 a, r, 4; add.s64 a, a, $1; ld.global.nc.b32 r, [a]; "
                    f"mul.lo.s32 r, r, {2 * self.d_model}; shl.b32 c, c, 4; add.s32 $0, r, c; }}"
                )
                operands = [address(neurons, 64), _value(slot), _value(valid)]
                found.append(
                    llvm.bitcast(ir.VectorType.get((1,), i32), assemble(text, operands, "=r,l,r,r", "i32"))
                )
            return _strided(found, 1, is_signed=True)

        return load(neurons, slot, valid)

    def gather(self, w, ring, offsets, stage, k, valid):
        """Starts copying slice ``k`` of the first ``valid`` rows to a stage of the ring, as one group."""

        @plgpu.inline_mgpu(
            arg_types=(
                _REF,
                plgpu.RefType(hopper_gemm.shared_transforms(self.dtype)),
                self._each_row,
                *[_SCALAR] * 3,
            )
        )
        def start(_, w, ring, offsets, stage, k, valid):
            lines = [
                f"{{ {_PLACE} .reg .pred p; .reg .b32 d; .reg .b64 a, s;",
                "and.b32 t, r, 7; xor.b32 c, c, t; shl.b32 c, c, 4;",
                "shl.b32 t, r, 7; add.s32 d, t, c;",
                f"mad.lo.s32 d, $2, {self.tile * _ROW_BYTES}, d; add.s32 d, d, $1; sub.s32 r, $4, r;",
                f"mul.wide.s32 s, $3, {_ROW_BYTES}; add.s64 s, s, $0;",
            ]
            for group in self._groups:
                first = group * ROWS_AT_ONCE
                lines.append(
                    f"setp.gt.s32 p, r, {first}; cvt.u64.u32 a, ${5 + group}; add.s64 a, a, s; "
                    f"@p cp.async.cg.shared.global.L2::128B [d+{first * _ROW_BYTES}], [a], 16;"
                )
            lines.append("cp.async.commit_group; }")
            i32 = ir.IntegerType.get_signless(32)
            own = [llvm.bitcast(i32, register) for register in offsets.registers.flat]
            operands = [address(w, 64), address(ring, 32), *map(_value, (stage, k, valid)), *own]
            assemble("\n".join(lines), operands, ",".join(["l", *["r"] * (len(operands) - 1)]))

        start(w, ring, offsets, stage, k, valid)

    def landed(self, but):
        """Waits until all of a thread's groups have landed but the last few, and hands what landed to wgmma,
        which reads shared memory past the threads' own path."""

        @plgpu.inline_mgpu()
        def wait(_):
            assemble(f"cp.async.wait_group {but}; fence.proxy.async.shared::cta;", [], "")

        wait()

    # -- the multiplying warpgroups

    def store(self, product, buffer):
        """Rounds a (64 tokens, n neurons) product into the first n rows of 64 tokens of the buffer."""

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _REF))
        def store(_, product, buffer):
            values = hopper_gemm.values(product)
            groups = len(values) // 4  # of eight neurons
            convert = hopper_gemm.CONVERT[jnp.dtype(self.dtype).name]
            lines = [
                "{ .reg .b32 t, m, i, c, d, v0, v1, v2, v3; mov.u32 t, %tid.x; and.b32 t, t, 127;",
                # Lane 8 m + i names the row of neuron i of matrix m: eight tokens of the warp's 16, m % 2, in
                # the group's or the next group's row, m / 2.
                "and.b32 i, t, 7; shr.u32 m, t, 3; and.b32 m, m, 3; shr.u32 c, t, 5; shl.b32 c, c, 1;",
                "and.b32 d, m, 1; add.s32 c, c, d; xor.b32 c, c, i; shl.b32 c, c, 4;",
                "shr.u32 m, m, 1; shl.b32 m, m, 10; shl.b32 i, i, 7;",
                f"add.s32 d, c, m; add.s32 d, d, i; add.s32 d, d, ${len(values)};",
            ]
            for group in range(0, groups, 2):
                words = [f"v{n}" for n in range(4 if group + 1 < groups else 2)]
                for n, word in enumerate(words):
                    first = n % 2 * 2 * groups + 2 * (group + n // 2)
                    lines.append(f"{convert} {word}, ${first + 1}, ${first};")
                lines.append(
                    f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 "
                    f"[d+{group * 8 * _ROW_BYTES}], {{{', '.join(words)}}};"
                )
            lines.append("}")
            assemble("\n".join(lines), [*values, address(buffer, 32)], ",".join(["f"] * len(values) + ["r"]))

        store(product, buffer)

    # -- the packing warpgroup

    def take(self, buffer):
        """All rows of the buffer, in parts."""

        def load_part(first, size):
            @plgpu.inline_mgpu(arg_types=(_REF,), return_type=self._rows(size))
            def load(_, buffer):
                found = []
                for row in range(first, first + size, ROWS_AT_ONCE):
                    text = (
                        f"{{ {_PLACE} .reg .b32 d; and.b32 d, r, 7; xor.b32 c, c, d; shl.b32 c, c, 4; "
                        "shl.b32 r, r, 7; add.s32 d, r, c; add.s32 d, d, $4; "
                        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [d+{row * _ROW_BYTES}]; }}"
                    )
                    found.append(self._eight(assemble(text, [address(buffer, 32)], "=r,=r,=r,=r,r", _QUAD)))
                return _strided(found, 8)

            return load(buffer)

        return [load_part(*part) for part in self._parts]

    def nothing(self):
        """Each thread's sum of nothing: (128,) f32."""

        @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=_SUM))
        def make(_):
            f32 = ir.F32Type.get()
            zero = mgpu_utils.c(0.0, f32)
            return _strided([llvm.bitcast(ir.VectorType.get((1,), f32), zero)], 1)

        return make()

    def pack(self, ups, values, neurons, segments, h, place, half, sums):
        """Writes h of half of a tile's tokens, from what `take` gave; adds each thread's |h| to its sum."""
        for (first, size), up in zip(self._parts, ups, strict=True):
            gate = self._gates(first, size, values, neurons, segments, place, half)
            value = hidden(gate, up, self.rule)
            sums = self._add(value, sums, size)
            self._put(value, first, size, h, place, half)
        return sums

    def _gates(self, first, size, values, neurons, segments, place, half):
        """The gates of a part, zero where a segment has none and past the tile's neurons."""

        @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF, *[_SCALAR] * 4), return_type=self._rows(size))
        def load(_, values, neurons, segments, panel, slot, valid, half):
            panel, slot, valid, half = map(_value, (panel, slot, valid, half))
            rows = range(first, first + size, ROWS_AT_ONCE)
            packed = []
            # Neuron, and whether its segment was written, of all rows first: their latencies overlap.
            for row in rows:
                text = (
                    f"{{ {_PLACE} .reg .pred p; .reg .b32 s, n; .reg .b64 a; add.s32 r, r, {row}; "
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
                    f"{{ {_PLACE} .reg .pred p; .reg .b32 n, s; .reg .b64 a, b; "
                    "and.b32 s, $7, 1; setp.ne.u32 p, s, 0; shr.u32 n, $7, 1; "
                    f"mul.wide.s32 b, $5, {self.width}; cvt.s64.s32 a, n; add.s64 a, a, b; "
                    f"mul.lo.s64 a, a, {2 * TILE_M}; mul.wide.s32 b, $6, {_ROW_BYTES}; add.s64 a, a, b; "
                    "mul.wide.s32 b, c, 16; add.s64 a, a, b; add.s64 a, a, $4; "
                    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                    "@p ld.global.v4.b32 {$0, $1, $2, $3}, [a]; }"
                )
                operands = [address(values, 64), panel, half, word]
                found.append(self._eight(assemble(text, operands, "=&r,=&r,=&r,=&r,l,r,r,r", _QUAD)))
            return _strided(found, 8)

        return load(values, neurons, segments, place.panel, place.slot, place.valid, half)

    def _add(self, value, sums, size):
        """The sums, and each thread's |h| of a part."""

        @plgpu.inline_mgpu(
            arg_types=(_layout(size), _SUM),
            return_type=plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.float32, layout=_SUM),
        )
        def add(_, wide, sums):
            f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
            total = llvm.bitcast(f32, sums.registers.flat[0])
            for register in wide.registers.flat:
                for nth in range(8):
                    total = arith.addf(total, llvm.extractelement(register, mgpu_utils.c(nth, i32)))
            return _strided([llvm.bitcast(ir.VectorType.get((1,), f32), total)], 1)

        return add(lax.abs(value.astype(jnp.float32)), sums)

    def _put(self, value, first, size, h, place, half):
        """Stores a part to its slots, but for what is past the rows of the tile that are wanted."""

        @plgpu.inline_mgpu(arg_types=(_layout(size), _REF, _SCALAR, _SCALAR, _SCALAR))
        def store(_, value, h, slot, rows, half):
            i32 = ir.IntegerType.get_signless(32)
            for row, register in zip(
                range(first, first + size, ROWS_AT_ONCE), value.registers.flat, strict=True
            ):
                text = (
                    f"{{ {_PLACE} .reg .pred p; .reg .b64 a, b; add.s32 r, r, {row}; "
                    f"setp.lt.s32 p, r, $6; add.s32 r, r, $5; mul.wide.s32 a, r, {2 * TILE_M}; "
                    f"mul.wide.s32 b, $7, {_ROW_BYTES}; add.s64 a, a, b; mul.wide.s32 b, c, 16; "
                    "add.s64 a, a, b; add.s64 a, a, $4; @p st.global.v4.b32 [a], {$0, $1, $2, $3}; }"
                )
                vector = llvm.bitcast(ir.VectorType.get((4,), i32), register)
                words = [llvm.extractelement(vector, mgpu_utils.c(n, i32)) for n in range(4)]
                operands = [*words, address(h, 64), *map(_value, (slot, rows, half))]
                assemble(text, operands, "r,r,r,r,l,r,r,r")

        store(value, h, place.slot, place.rows, half)

    def put_sums(self, sums, l1, program):
        """Writes a program's sums, each warp's as one: l1 (4 programs,)."""

        @plgpu.inline_mgpu(arg_types=(_SUM, _REF, _SCALAR))
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
            assemble(text, [total, address(l1, 64), _value(program)], "f,l,r")

        store(sums, l1, program)

    def _eight(self, quad: ir.Value) -> ir.Value:
        """Four words as a vector of eight values."""
        i32 = ir.IntegerType.get_signless(32)
        vector = llvm.mlir_undef(ir.VectorType.get((4,), i32))
        for n in range(4):
            word = llvm.extractvalue(i32, quad, [n])
            vector = llvm.insertelement(vector, word, mgpu_utils.c(n, i32))
        return llvm.bitcast(ir.VectorType.get((8,), mgpu_utils.dtype_to_ir_type(self.dtype)), vector)


def _layout(rows: int) -> plgpu.Layout:
    return plgpu.Layout.WG_STRIDED((rows * ROWS,), vec_size=8)


def _value(scalar: mgpu.FragmentedArray) -> ir.Value:
    return scalar.registers.flat[0]


def _strided(
    registers: Sequence[ir.Value], vec_size: int, is_signed: bool | None = None
) -> mgpu.FragmentedArray:
    """The array of a warpgroup's registers, a thread's ``vec_size`` neighbouring values in each."""
    layout = mgpu.WGStridedFragLayout(shape=(len(registers) * WARPGROUP * vec_size,), vec_size=vec_size)
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout, _is_signed=is_signed
    )
