"""What the threads of a gathered product on Mosaic GPU do that JAX has no operation for, in PTX.

A warpgroup's 128 threads share an array of 16-bit values, rows of 64, as 16 rows of eight threads: thread t
has the eight values from ``8 (t % 8)`` on of the rows ``t / 8``, ``t / 8 + 16``, and so on, 16 bytes of each.
So eight neighbouring threads read or write 128 bytes. In shared memory, group g of eight values of row r
stands at place ``g ^ (r % 8)`` of the row: the swizzle that wgmma reads, with which eight threads that access
16 bytes each of eight rows meet in no bank.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.activations import Rule
from pallas_kernels.common import hopper_gemm
from pallas_kernels.common.hopper_gemm import ROWS, TILE_K, TILE_M, WARPGROUP, address, assemble

ROWS_AT_ONCE = 16
"""Rows that a warpgroup's threads have 16 bytes each of."""
ROW_BYTES = 2 * TILE_K
PART = 64
"""Rows of an epilogue that are in registers together."""
SCALAR, REF = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
QUAD = "!llvm.struct<(i32, i32, i32, i32)>"
PLACE = ".reg .b32 t, r, c; mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 c, t, 7; shr.u32 r, t, 3;"
"""The thread's first row and its 16 bytes of one."""


class Copies:
    """What loaders that gather with cp.async have in common."""

    def landed(self, but):
        """Waits until all of a thread's groups have landed but the last few, and hands what landed to wgmma,
        which reads shared memory past the threads' own path."""

        @plgpu.inline_mgpu()
        def wait(_):
            assemble(f"cp.async.wait_group {but}; fence.proxy.async.shared::cta;", [], "")

        wait()


@dataclasses.dataclass(frozen=True)
class Steps(Copies):
    """The steps for tiles of at most ``tile`` neurons, a multiple of 16, of values of ``dtype``: those that
    all epilogues have, and what an epilogue is made of.

    Attributes:
      d_model: D, in whose rows the weights stand.
    """

    tile: int
    dtype: jnp.dtype
    d_model: int
    rule: Rule

    @property
    def groups(self) -> range:
        """Of `ROWS_AT_ONCE` rows of a tile."""
        return range(self.tile // ROWS_AT_ONCE)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """First rows and sizes."""
        return [(first, min(PART, self.tile - first)) for first in range(0, self.tile, PART)]

    @property
    def _each_row(self):
        return plgpu.Layout.WG_STRIDED((len(self.groups) * WARPGROUP,), vec_size=1)

    def rows_type(self, rows: int) -> plgpu.ShapeDtypeStruct:
        return plgpu.ShapeDtypeStruct((rows * ROWS,), self.dtype, layout=row_layout(rows))

    # -- the loading warpgroup

    def offsets(self, neurons, slot, valid):
        """Where a thread copies from, in bytes from the weights' first: (tile / 16 * 128,) int32, one for
        each of its rows. Row n is the neuron of slot ``slot + n``, or from ``valid`` on that of the last one.
        """

        @plgpu.inline_mgpu(
            arg_types=(REF, SCALAR, SCALAR),
            return_type=plgpu.ShapeDtypeStruct(
                (len(self.groups) * WARPGROUP,), jnp.int32, layout=self._each_row
            ),
        )
        def load(_, neurons, slot, valid):
            found = []
            for group in self.groups:
                text = (
                    f"{{ {PLACE} .reg .b64 a; add.s32 r, r, {group * ROWS_AT_ONCE}; "
                    "sub.s32 t, $3, 1; min.s32 r, r, t; add.s32 r, r, $2; "
                    "mul.wide.s32 a, r, 4; add.s64 a, a, $1; ld.global.nc.b32 r, [a]; "
                    f"mul.lo.s32 r, r, {2 * self.d_model}; shl.b32 c, c, 4; add.s32 $0, r, c; }}"
                )
                operands = [address(neurons, 64), word_of(slot), word_of(valid)]
                found.append(register_of(assemble(text, operands, "=r,l,r,r", "i32")))
            return strided(found, 1, is_signed=True)

        return load(neurons, slot, valid)

    def gather(self, w, ring, offsets, stage, k, valid):
        """Starts copying slice ``k`` of the first ``valid`` rows to a stage of the ring, as one group."""

        @plgpu.inline_mgpu(
            arg_types=(
                REF,
                plgpu.RefType(hopper_gemm.shared_transforms(self.dtype)),
                self._each_row,
                *[SCALAR] * 3,
            )
        )
        def start(_, w, ring, offsets, stage, k, valid):
            lines = [
                f"{{ {PLACE} .reg .pred p; .reg .b32 d; .reg .b64 a, s;",
                "and.b32 t, r, 7; xor.b32 c, c, t; shl.b32 c, c, 4;",
                "shl.b32 t, r, 7; add.s32 d, t, c;",
                f"mad.lo.s32 d, $2, {self.tile * ROW_BYTES}, d; add.s32 d, d, $1; sub.s32 r, $4, r;",
                f"mul.wide.s32 s, $3, {ROW_BYTES}; add.s64 s, s, $0;",
            ]
            for group in self.groups:
                first = group * ROWS_AT_ONCE
                lines.append(
                    f"setp.gt.s32 p, r, {first}; cvt.u64.u32 a, ${5 + group}; add.s64 a, a, s; "
                    f"@p cp.async.cg.shared.global.L2::128B [d+{first * ROW_BYTES}], [a], 16;"
                )
            lines.append("cp.async.commit_group; }")
            own = words_of(offsets.registers.flat)
            operands = [address(w, 64), address(ring, 32), *map(word_of, (stage, k, valid)), *own]
            assemble("\n".join(lines), operands, ",".join(["l", *["r"] * (len(operands) - 1)]))

        start(w, ring, offsets, stage, k, valid)

    # -- the multiplying warpgroups

    def store(self, product, buffer, refs):
        """Rounds a (64 tokens, n neurons) product into the first n rows of 64 tokens of the buffer."""
        self.round_into(product, buffer)

    def round_into(self, product, buffer, *scale):
        """As `store`; with a scale, f32, its products with the signs that `lay_signs` has left in the buffer
        are added first."""
        scaled = len(scale)

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, REF, *[SCALAR] * scaled))
        def store(_, product, buffer, *scale):
            values = hopper_gemm.values(product)
            groups, factor = len(values) // 4, f"${len(values) + 1}"  # groups of eight neurons
            convert = hopper_gemm.CONVERT[jnp.dtype(self.dtype).name]
            lines = [
                "{ .reg .b32 t, m, i, c, d, v0, v1, v2, v3; .reg .f32 low, high; "
                "mov.u32 t, %tid.x; and.b32 t, t, 127;",
                # Lane 8 m + i names the row of neuron i of matrix m: eight tokens of the warp's 16, m % 2, in
                # the group's or the next group's row, m / 2.
                "and.b32 i, t, 7; shr.u32 m, t, 3; and.b32 m, m, 3; shr.u32 c, t, 5; shl.b32 c, c, 1;",
                "and.b32 d, m, 1; add.s32 c, c, d; xor.b32 c, c, i; shl.b32 c, c, 4;",
                "shr.u32 m, m, 1; shl.b32 m, m, 10; shl.b32 i, i, 7;",
                f"add.s32 d, c, m; add.s32 d, d, i; add.s32 d, d, ${len(values)};",
            ]
            for group in range(0, groups, 2):
                words = [f"v{n}" for n in range(4 if group + 1 < groups else 2)]
                matrices, place = f"m8n8.x{len(words)}.trans.shared.b16", f"[d+{group * 8 * ROW_BYTES}]"
                listed = ", ".join(words)
                if scaled:
                    lines.append(f"ldmatrix.sync.aligned.{matrices} {{{listed}}}, {place};")
                for n, word in enumerate(words):
                    first = n % 2 * 2 * groups + 2 * (group + n // 2)
                    low, high = f"${first}", f"${first + 1}"
                    if scaled:
                        # Signs are bf16: the upper half of an f32. Their products are exact.
                        lines.append(
                            f"shl.b32 t, {word}, 16; mov.b32 low, t; fma.rn.f32 low, low, {factor}, {low}; "
                            f"and.b32 t, {word}, 0xffff0000; mov.b32 high, t; "
                            f"fma.rn.f32 high, high, {factor}, {high};"
                        )
                        low, high = "low", "high"
                    lines.append(f"{convert} {word}, {high}, {low};")
                lines.append(f"stmatrix.sync.aligned.{matrices} {place}, {{{listed}}};")
            lines.append("}")
            operands = [*values, address(buffer, 32), *map(word_of, scale)]
            assemble("\n".join(lines), operands, ",".join(["f"] * len(values) + ["r"] + ["f"] * scaled))

        store(product, buffer, *scale)

    # -- the packing warpgroup

    def take(self, buffer):
        """All rows of the buffer, in parts."""

        def load_part(first, size):
            @plgpu.inline_mgpu(arg_types=(REF,), return_type=self.rows_type(size))
            def load(_, buffer):
                found = []
                for row in range(first, first + size, ROWS_AT_ONCE):
                    text = (
                        f"{{ {PLACE} .reg .b32 d; and.b32 d, r, 7; xor.b32 c, c, d; shl.b32 c, c, 4; "
                        "shl.b32 r, r, 7; add.s32 d, r, c; add.s32 d, d, $4; "
                        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [d+{row * ROW_BYTES}]; }}"
                    )
                    found.append(self.eight(assemble(text, [address(buffer, 32)], "=r,=r,=r,=r,r", QUAD)))
                return strided(found, 8)

            return load(buffer)

        return [load_part(*part) for part in self.parts]

    def prepare(self, refs, place, half):
        """What an epilogue wants to have done, or in registers, before the product of a half is there."""

    def lay(self, prepared, buffer):
        """Leaves in the buffer, for `store`, what `prepare` gave."""

    def nothing(self):
        """What `pack` carries from half to half, at first."""

    def finish(self, carry, refs, program):
        """Writes what `pack` has carried over all tiles of a program."""

    def get(self, ref, first, size, place, half):
        """A part of an array over the slots; zero past the rows of the tile that are wanted."""

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR, SCALAR), return_type=self.rows_type(size))
        def load(_, ref, slot, rows, half):
            found = []
            for row in range(first, first + size, ROWS_AT_ONCE):
                text = (
                    f"{{ {PLACE} .reg .pred p; .reg .b64 a, b; add.s32 r, r, {row}; "
                    f"setp.lt.s32 p, r, $6; add.s32 r, r, $5; mul.wide.s32 a, r, {2 * TILE_M}; "
                    f"mul.wide.s32 b, $7, {ROW_BYTES}; add.s64 a, a, b; mul.wide.s32 b, c, 16; "
                    "add.s64 a, a, b; add.s64 a, a, $4; "
                    "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
                    "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [a]; }"
                )
                operands = [address(ref, 64), *map(word_of, (slot, rows, half))]
                found.append(self.eight(assemble(text, operands, "=&r,=&r,=&r,=&r,l,r,r,r", QUAD)))
            return strided(found, 8)

        return load(ref, place.slot, place.rows, half)

    def put(self, value, first, size, ref, place, half):
        """Stores a part to its slots, but for what is past the rows of the tile that are wanted."""

        @plgpu.inline_mgpu(arg_types=(row_layout(size), REF, SCALAR, SCALAR, SCALAR))
        def store(_, value, ref, slot, rows, half):
            i32 = ir.IntegerType.get_signless(32)
            for row, register in zip(
                range(first, first + size, ROWS_AT_ONCE), value.registers.flat, strict=True
            ):
                text = (
                    f"{{ {PLACE} .reg .pred p; .reg .b64 a, b; add.s32 r, r, {row}; "
                    f"setp.lt.s32 p, r, $6; add.s32 r, r, $5; mul.wide.s32 a, r, {2 * TILE_M}; "
                    f"mul.wide.s32 b, $7, {ROW_BYTES}; add.s64 a, a, b; mul.wide.s32 b, c, 16; "
                    "add.s64 a, a, b; add.s64 a, a, $4; @p st.global.v4.b32 [a], {$0, $1, $2, $3}; }"
                )
                vector = llvm.bitcast(ir.VectorType.get((4,), i32), register)
                words = [llvm.extractelement(vector, mgpu_utils.c(n, i32)) for n in range(4)]
                operands = [*words, address(ref, 64), *map(word_of, (slot, rows, half))]
                assemble(text, operands, "r,r,r,r,l,r,r,r")

        store(value, ref, place.slot, place.rows, half)

    def eight(self, quad: ir.Value) -> ir.Value:
        """Four words as a vector of eight values."""
        i32 = ir.IntegerType.get_signless(32)
        vector = llvm.mlir_undef(ir.VectorType.get((4,), i32))
        for n in range(4):
            word = llvm.extractvalue(i32, quad, [n])
            vector = llvm.insertelement(vector, word, mgpu_utils.c(n, i32))
        return llvm.bitcast(ir.VectorType.get((8,), mgpu_utils.dtype_to_ir_type(self.dtype)), vector)


def row_layout(rows: int) -> plgpu.Layout:
    return plgpu.Layout.WG_STRIDED((rows * ROWS,), vec_size=8)


def constant(value: int) -> ir.Value:
    """A word."""
    return mgpu_utils.c(value, ir.IntegerType.get_signless(32))


def word_of(scalar: mgpu.FragmentedArray) -> ir.Value:
    return scalar.registers.flat[0]


def words_of(registers: Iterable[ir.Value]) -> list[ir.Value]:
    """A thread's words, of its registers of an array of 32-bit integers."""
    i32 = ir.IntegerType.get_signless(32)
    return [llvm.bitcast(i32, register) for register in registers]


def register_of(word: ir.Value) -> ir.Value:
    """A word as `strided` takes it."""
    return llvm.bitcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), word)


def strided(
    registers: Sequence[ir.Value], vec_size: int, is_signed: bool | None = None
) -> mgpu.FragmentedArray:
    """The array of a warpgroup's registers, a thread's ``vec_size`` neighbouring values in each."""
    layout = mgpu.WGStridedFragLayout(shape=(len(registers) * WARPGROUP * vec_size,), vec_size=vec_size)
    return mgpu.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout, _is_signed=is_signed
    )
