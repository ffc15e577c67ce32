"""The steps of the gathered products on Mosaic GPU without PTX, for the interpreter: `ptx_gathered.Steps`
with the epilogues of `ptx_up` and `ptx_dh`."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.activations import Rule
from pallas_kernels.common.hopper_gemm import ROWS, TILE_K
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import hidden
from pallas_kernels.panel.pallas_triton_backward import projection_gradients


@dataclasses.dataclass(frozen=True)
class _PlainSteps:
    """Copies land where they start, row by row."""

    rule: Rule

    def offsets(self, neurons, slot, valid):
        return neurons, slot

    def gather(self, w, ring, offsets, stage, k, valid):
        neurons, slot = offsets

        def copy_row(row, _):
            ring[stage, row, :] = w[neurons[slot + row], pl.ds(k * TILE_K, TILE_K)]

        lax.fori_loop(0, valid, copy_row, None)

    def landed(self, but):
        pass

    def prepare(self, refs, place, half):
        pass

    def lay(self, prepared, buffer):
        pass

    def store(self, product, buffer, refs):
        buffer[pl.ds(0, product.shape[1]), :] = product.astype(buffer.dtype).T

    def take(self, buffer):
        return buffer[...]

    def nothing(self):
        return jnp.float32(0)

    def finish(self, carry, refs, program):
        pass


class PlainUp(_PlainSteps):
    """Each program's sum is that of its first warp."""

    def pack(self, ups, refs, place, half, sums):
        neurons, segments, values, h, _, *kept = refs
        tokens = pl.ds(half * ROWS, ROWS)
        segment = half * (ROWS // SEGMENT) + lax.iota(jnp.int32, ROWS) // SEGMENT

        def pack_row(row, sums):
            bits = segments[place.slot + row].astype(jnp.int32)
            listed = (bits >> segment & 1 > 0) & (row < place.valid)
            gate = jnp.where(listed, values[place.panel, neurons[place.slot + row], tokens], 0)
            gate, up = gate.astype(ups.dtype), lax.dynamic_index_in_dim(ups, row, keepdims=False)
            value = hidden(gate, up, self.rule)
            for ref, array in zip((h, *kept), (value, gate, up), strict=False):
                ref[place.slot + row, tokens] = array
            return sums + jnp.sum(jnp.abs(value.astype(jnp.float32)))

        return lax.fori_loop(0, place.rows, pack_row, sums)

    def finish(self, sums, refs, program):
        refs[4][pl.ds(4 * program, 4)] = jnp.where(lax.iota(jnp.int32, 4) == 0, sums, 0)


@dataclasses.dataclass(frozen=True)
class PlainDh(_PlainSteps):
    """The signs of h wait in the buffer in its own type."""

    tile: int
    scaled: bool

    def prepare(self, refs, place, half):
        _, gate, up, *_, h = refs
        tokens = pl.ds(half * ROWS, ROWS)

        def sign_of(row, signs):
            value = hidden(gate[place.slot + row, tokens], up[place.slot + row, tokens], self.rule)
            h[place.slot + row, tokens] = value
            sign = (value > 0).astype(h.dtype) - (value < 0).astype(h.dtype)
            return lax.dynamic_update_index_in_dim(signs, sign, row, 0)

        return lax.fori_loop(0, place.rows, sign_of, jnp.zeros((self.tile, ROWS), h.dtype))

    def lay(self, prepared, buffer):
        if self.scaled:
            buffer[...] = prepared

    def store(self, product, buffer, refs):
        rows = pl.ds(0, product.shape[1])
        if self.scaled:
            product = product + refs[3][0] * buffer[rows, :].astype(jnp.float32).T
        buffer[rows, :] = product.astype(buffer.dtype).T

    def pack(self, dhs, refs, place, half, carry):
        _, gate, up, *_, dg, du, _ = refs
        tokens = pl.ds(half * ROWS, ROWS)

        def pack_row(row, _):
            slot = place.slot + row
            dh = lax.dynamic_index_in_dim(dhs, row, keepdims=False).astype(jnp.float32)
            found = projection_gradients(dh, gate[slot, tokens], up[slot, tokens], self.rule)
            for ref, value in zip((dg, du), found, strict=True):
                ref[slot, tokens] = value

        lax.fori_loop(0, place.rows, pack_row, None)
        return carry
