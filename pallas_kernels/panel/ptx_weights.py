"""What threads of the weight gradients on Mosaic GPU do that JAX has no operation for, in PTX."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import hopper_gemm
from pallas_kernels.common.hopper_gemm import TILE_M, WARPGROUP, address, assemble
from pallas_kernels.panel.ptx_gathered import (
    PLACE,
    REF,
    ROW_BYTES,
    ROWS_AT_ONCE,
    SCALAR,
    Copies,
    register_of,
    strided,
    word_of,
    words_of,
)

_GROUPS = range(TILE_M // ROWS_AT_ONCE)
_EACH_ROW = plgpu.Layout.WG_STRIDED((len(_GROUPS) * WARPGROUP,), vec_size=1)
_WORDS = plgpu.ShapeDtypeStruct((len(_GROUPS) * WARPGROUP,), jnp.int32, layout=_EACH_ROW)
_PIECE = 32  # accumulators of a row that are stored together


def _chosen(name, count, first, which):
    """PTX that leaves in ``name`` the address of one of the operands from ``first`` on."""
    lines = [f"mov.b64 {name}, ${first};"]
    for nth in range(1, count):
        lines.append(f"setp.eq.s32 p, {which}, {nth}; selp.b64 {name}, ${first + nth}, {name}, p;")
    return " ".join(lines)


@dataclasses.dataclass(frozen=True)
class Steps(Copies):
    """The steps for ``count`` gradients (d_ff, d_model) of type ``out_dtype`` from values of ``dtype``."""

    count: int
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    d_model: int
    d_ff: int

    # -- the loading warpgroup

    def neurons(self, order, row, n_hot):
        """The neurons of a thread's rows of a tile whose first is the ``row``-th; -1 if not hot."""

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR), return_type=_WORDS)
        def load(_, order, row, n_hot):
            found = []
            for group in _GROUPS:
                text = (
                    f"{{ {PLACE} .reg .pred p; .reg .b64 a; add.s32 r, r, {group * ROWS_AT_ONCE}; "
                    "add.s32 r, r, $2; setp.lt.s32 p, r, $3; mul.wide.s32 a, r, 4; add.s64 a, a, $1; "
                    "mov.b32 $0, -1; @p ld.global.nc.b32 $0, [a]; }"
                )
                operands = [address(order, 64), word_of(row), word_of(n_hot)]
                found.append(register_of(assemble(text, operands, "=&r,l,r,r", "i32")))
            return strided(found, 1, is_signed=True)

        return load(order, row, n_hot)

    def slots(self, slots, neurons, panel):
        """The slots of neurons in a panel, -1 where one has none."""

        @plgpu.inline_mgpu(arg_types=(REF, _EACH_ROW, SCALAR), return_type=_WORDS)
        def load(_, slots, neurons, panel):
            found = []
            for neuron in words_of(neurons.registers.flat):
                text = (
                    "{ .reg .pred p; .reg .b64 a, b; setp.ge.s32 p, $2, 0; "
                    f"mul.wide.s32 a, $3, {4 * self.d_ff}; mul.wide.s32 b, $2, 4; add.s64 a, a, b; "
                    "add.s64 a, a, $1; mov.b32 $0, -1; @p ld.global.nc.b32 $0, [a]; }"
                )
                operands = [address(slots, 64), neuron, word_of(panel)]
                found.append(register_of(assemble(text, operands, "=&r,l,r,r", "i32")))
            return strided(found, 1, is_signed=True)

        return load(slots, neurons, panel)

    def gather(self, zs, ring, slots, which, stage, part):
        """Starts copying half of the tokens of the slots' values, zeros where there is no slot, to a stage of
        the ring, as one group."""

        @plgpu.inline_mgpu(
            arg_types=(
                *[REF] * self.count,
                plgpu.RefType(hopper_gemm.shared_transforms(self.dtype)),
                _EACH_ROW,
                SCALAR,
                SCALAR,
            )
        )
        def start(_, *args):
            zs, (ring, slots, which, stage) = args[: self.count], args[self.count :]
            n = self.count
            lines = [
                f"{{ {PLACE} .reg .pred p; .reg .b32 d, n; .reg .b64 a, s, b;",
                _chosen("s", n, 0, f"${n + 1}"),
                f"mul.wide.u32 b, c, 16; add.s64 s, s, b; add.s64 s, s, {part * ROW_BYTES};",
                "and.b32 t, r, 7; xor.b32 c, c, t; shl.b32 c, c, 4;",
                "shl.b32 t, r, 7; add.s32 d, t, c;",
                f"mad.lo.s32 d, ${n + 2}, {TILE_M * ROW_BYTES}, d; add.s32 d, d, ${n};",
            ]
            for group in _GROUPS:
                slot = f"${n + 3 + group}"
                lines.append(
                    f"setp.ge.s32 p, {slot}, 0; selp.b32 n, 16, 0, p; max.s32 t, {slot}, 0; "
                    f"mul.wide.u32 a, t, {2 * TILE_M}; add.s64 a, a, s; "
                    f"cp.async.cg.shared.global.L2::128B [d+{group * ROWS_AT_ONCE * ROW_BYTES}], [a], 16, n;"
                )
            lines.append("cp.async.commit_group; }")
            operands = [*[address(z, 64) for z in zs], address(ring, 32), word_of(which), word_of(stage)]
            operands += words_of(slots.registers.flat)
            assemble("\n".join(lines), operands, ",".join(["l"] * n + ["r"] * (len(operands) - n)))

        start(*zs, ring, slots, which, stage)

    # -- the multiplying warpgroups

    def store(self, acc, order, outputs, which, row, column, n_hot):
        """Rounds a (64 neurons, 256 columns) sum and writes it to rows ``order[row]``, ... of an output, from
        a column on, but for neurons that are not hot and columns past the edge."""

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *[REF] * (1 + self.count), *[SCALAR] * 4))
        def store(_, acc, order, *args):
            outputs, scalars = args[: self.count], args[self.count :]
            values = hopper_gemm.values(acc)
            size, per_row = self.out_dtype.itemsize, len(values) // 2
            convert = hopper_gemm.CONVERT.get(self.out_dtype.name)
            for half in range(2):
                for first in range(0, per_row, _PIECE):
                    own = values[half * per_row + first : half * per_row + first + _PIECE]
                    at, n = len(own), self.count  # order, outputs, which, row, column, n_hot
                    which, row, column, n_hot = (f"${at + 1 + n + k}" for k in range(4))
                    lines = [
                        "{ .reg .pred p, q; .reg .b32 t, l, r, c, v; .reg .b64 a, b;",
                        _chosen("a", n, at + 1, which),
                        "mov.u32 t, %tid.x; and.b32 t, t, 127; and.b32 l, t, 31; shr.u32 t, t, 5;",
                        f"shl.b32 t, t, 4; shr.u32 r, l, 2; add.s32 r, r, t; add.s32 r, r, {8 * half};",
                        f"add.s32 r, r, {row}; setp.lt.s32 p, r, {n_hot};",
                        f"mul.wide.s32 b, r, 4; add.s64 b, b, ${at}; mov.b32 r, 0;",
                        "@p ld.global.nc.b32 r, [b];",
                        f"mul.wide.s32 b, r, {size * self.d_model}; add.s64 a, a, b;",
                        f"and.b32 c, l, 3; shl.b32 c, c, 1; add.s32 c, c, {column};",
                        f"add.s32 c, c, {4 * first}; mul.wide.s32 b, c, {size}; add.s64 a, a, b;",
                    ]
                    for k in range(0, _PIECE, 2):
                        if self.d_model % 256:
                            lines.append(f"add.s32 t, c, {4 * k}; setp.lt.and.s32 q, t, {self.d_model}, p;")
                        guard = "@q" if self.d_model % 256 else "@p"
                        to = f"[a+{4 * k * size}]"
                        if convert is None:
                            lines.append(f"{guard} st.global.v2.f32 {to}, {{${k}, ${k + 1}}};")
                        else:
                            lines.append(f"{convert} v, ${k + 1}, ${k}; {guard} st.global.b32 {to}, v;")
                    lines.append("}")
                    operands = [*own, address(order, 64), *[address(out, 64) for out in outputs]]
                    operands += map(word_of, scalars)
                    constraints = ",".join(["f"] * at + ["l"] * (1 + n) + ["r"] * 4)
                    assemble("\n".join(lines), operands, constraints)

        store(acc, order, *outputs, which, row, column, n_hot)
