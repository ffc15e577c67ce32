"""The steps of the hot neurons' weight gradients without PTX, for the interpreter: `ptx_weights.Steps`."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common.hopper_gemm import ROWS, TILE_K, TILE_M


@dataclasses.dataclass(frozen=True)
class PlainSteps:
    """Copies land where they start, row by row."""

    def neurons(self, order, row, n_hot):
        object.__setattr__(self, "order", order)
        return row, n_hot

    def slots(self, slots, neurons, panel):
        row, n_hot = neurons
        object.__setattr__(self, "table", slots)
        return row, n_hot, panel

    def gather(self, zs, ring, slots, which, stage, part):
        first, n_hot, panel = slots
        for nth, z in enumerate(zs):

            @pl.when(which == nth)
            def _(z=z):
                def copy_row(row, _):
                    hot = first + row < n_hot
                    neuron = self.order[jnp.where(hot, first + row, 0)]
                    slot = self.table[panel, neuron]
                    value = z[jnp.maximum(slot, 0), pl.ds(part * TILE_K, TILE_K)]
                    ring[stage, row, :] = jnp.where(hot & (slot >= 0), value, 0).astype(ring.dtype)

                lax.fori_loop(0, TILE_M, copy_row, None)

    def landed(self, but):
        pass

    def store(self, acc, order, outputs, which, row, column, n_hot):
        for nth, out in enumerate(outputs):

            @pl.when(which == nth)
            def _(out=out):
                def store_row(k, _):
                    for box in range(0, acc.shape[1], 64):

                        @pl.when((row + k < n_hot) & (column + box < out.shape[1]))
                        def _(box=box):
                            value = lax.dynamic_slice_in_dim(acc, k, 1)[0, box : box + 64]
                            out[order[row + k], pl.ds(column + box, 64)] = value.astype(out.dtype)

                lax.fori_loop(0, ROWS, store_row, None)
