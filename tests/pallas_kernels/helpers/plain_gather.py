"""The gather of `blackwell_gathered` without the copy engine, whose copies of listed rows JAX's interpreter does
not know: as of 0.12 the index of a copy must be whole numbers."""

from functools import partial

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_BOX = 64


def plain_gather(array, rows, columns, to, barrier):
    """Copies land where they start, row by row, but for columns past the array's, which keep what they had."""

    def copy_row(nth, _):
        row = lax.dynamic_index_in_dim(rows, nth, keepdims=False)

        def copy_box(box):
            to[nth, pl.ds(box, _BOX)] = array[row, pl.ds(columns.start + box, _BOX)]

        for box in range(0, columns.size, _BOX):
            pl.when(columns.start + box < array.shape[1])(partial(copy_box, box))

    lax.fori_loop(0, rows.shape[0], copy_row, None)
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
