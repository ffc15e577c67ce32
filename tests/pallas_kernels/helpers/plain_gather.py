"""The gather of `blackwell_gathered` without the copy engine, for the interpreter: as of JAX 0.12 it takes
the index of a copy for whole numbers, and a gather's is an array. All else of the kernels it runs as is."""

from functools import partial

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_BOX = 64


def plain_gather(array, rows, columns, to, barrier):
    """Copies land where they start; columns past the array's keep what they had."""

    def copy_box(box):
        to[:, pl.ds(box, _BOX)] = jnp.take(array[:, pl.ds(columns.start + box, _BOX)], rows, axis=0)

    for box in range(0, columns.size, _BOX):
        pl.when(columns.start + box < array.shape[1])(partial(copy_box, box))
    plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
