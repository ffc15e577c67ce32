"""The steps of the Mosaic GPU down projection without PTX, for the interpreter: `ptx_down.Steps`."""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.hopper_gemm import ROWS
from pallas_kernels.common.products import CONTRACT_FIRST, dot


@dataclasses.dataclass(frozen=True)
class PlainSteps:
    """Copies land where they start, row by row, and products are made where they are issued."""

    tile: int
    depth: int
    chunk: int
    box: int = 64

    def look_up(self, neurons, slot, valid):
        return neurons[pl.ds(slot, self.chunk)]

    def gather(self, w, ring, rows, stage, part, column, valid):
        d_model = w.shape[1]

        def copy_row(row, _):
            neuron = lax.dynamic_index_in_dim(rows, part * self.depth + row, keepdims=False)
            for box in range(0, self.tile, self.box):
                inside = (row < valid) & (column + box < d_model)
                columns = pl.ds(jnp.minimum(column + box, d_model - self.box), self.box)
                value = w[jnp.where(row < valid, neuron, 0), columns]
                ring[stage, row, pl.ds(box, self.box)] = jnp.where(inside, value, 0).astype(ring.dtype)

        lax.fori_loop(0, self.depth, copy_row, None)

    def landed(self, but):
        pass

    def zeros(self):
        return jnp.zeros((ROWS, self.tile), jnp.float32)

    def multiply(self, acc, h, w, stage, half):
        acc += dot(h[stage, :, pl.ds(half * ROWS, ROWS)], w[stage], CONTRACT_FIRST)
        plgpu.commit_smem()  # these reads, unlike those of wgmma, must be ordered before the next TMA write
        return acc

    def store(self, acc, buffer, y, half, row, column):
        tokens, d_model = y.shape

        def store_box(nth, box):
            value = lax.dynamic_slice_in_dim(acc, nth, 1)[0, box : box + self.box]
            y[row + nth, pl.ds(column + box, self.box)] = value.astype(y.dtype)

        def store_row(nth, _):
            for box in range(0, self.tile, self.box):
                inside = (row + nth < tokens) & (column + box < d_model)
                pl.when(inside)(partial(store_box, nth, box))

        lax.fori_loop(0, ROWS, store_row, None)
