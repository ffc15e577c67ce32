"""The steps of the Mosaic GPU up projection without PTX, for the interpreter: `ptx_up.Steps`."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.activations import Rule
from pallas_kernels.common.hopper_gemm import ROWS, TILE_K
from pallas_kernels.panel.config import SEGMENT
from pallas_kernels.panel.pallas_triton import hidden


@dataclasses.dataclass(frozen=True)
class PlainSteps:
    """Copies land where they start, row by row, and each program's sum is that of its first warp."""

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

    def store(self, product, buffer):
        buffer[pl.ds(0, product.shape[1]), :] = product.astype(buffer.dtype).T

    def take(self, buffer):
        return buffer[...]

    def nothing(self):
        return jnp.float32(0)

    def pack(self, ups, values, neurons, segments, h, place, half, sums):
        tokens = pl.ds(half * ROWS, ROWS)
        segment = half * (ROWS // SEGMENT) + lax.iota(jnp.int32, ROWS) // SEGMENT

        def pack_row(row, sums):
            bits = segments[place.slot + row].astype(jnp.int32)
            listed = (bits >> segment & 1 > 0) & (row < place.valid)
            gate = jnp.where(listed, values[place.panel, neurons[place.slot + row], tokens], 0)
            up = lax.dynamic_index_in_dim(ups, row, keepdims=False)
            value = hidden(gate.astype(ups.dtype), up, self.rule)
            h[place.slot + row, tokens] = value
            return sums + jnp.sum(jnp.abs(value.astype(jnp.float32)))

        return lax.fori_loop(0, place.rows, pack_row, sums)

    def put_sums(self, sums, l1, program):
        l1[pl.ds(4 * program, 4)] = jnp.where(lax.iota(jnp.int32, 4) == 0, sums, 0)
