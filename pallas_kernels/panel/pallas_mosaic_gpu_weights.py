"""The weight gradients of PanelELL's hot neurons for Hopper: gathered rows of gradients on Mosaic GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_gemm import COMPUTE_WARPGROUPS, ROWS, TILE_K, TILE_M, shared_transforms
from pallas_kernels.panel import ptx_weights

TILE_D = 256
_STAGES = 4
_LAG = 2
_MULTIPLY_REGISTERS, _LOAD_REGISTERS = 208, 88


def hot(
    zs: list[jax.Array],
    xs: list[jax.Array],
    order: jax.Array,
    n_hot: jax.Array,
    slots: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    steps: Any = None,
    interpret: Any = None,
    stages: int = _STAGES,
    lag: int = _LAG,
) -> tuple[jax.Array, ...]:
    """For each z (n_slots, P) and its x (M, D): the rows of hot neurons of ``dW = z^T x`` (F, D)."""
    x, dy = (jnp.pad(each, ((0, -each.shape[0] % 8), (0, 0))) for each in (xs[0], xs[-1]))
    d_ff, d_model = order.shape[0], x.shape[1]
    if steps is None:
        steps = ptx_weights.Steps(len(zs), x.dtype, jnp.dtype(dtype), d_model, d_ff)
    programs = device.current().cores or 1
    outputs = plgpu.kernel(
        partial(
            _kernel,
            steps=steps,
            count=len(zs),
            transforms=shared_transforms(x.dtype),
            programs=programs,
            stages=stages,
            lag=lag,
        ),
        out_type=(jax.ShapeDtypeStruct((d_ff, d_model), dtype),) * len(zs),
        grid=(programs,),
        grid_names=("program",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="panel_dw_hot",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(order, n_hot, slots, *zs, x, dy)
    return tuple(varying_axes.vary_with(zs[0], outputs))


def _kernel(order, n_hot_ref, slots, *refs, steps, count, transforms, programs, stages, lag):
    zs, (x, dy), outputs = refs[:count], refs[count : count + 2], refs[count + 2 :]
    n_panels, n_columns = slots.shape[0], pl.cdiv(x.shape[1], TILE_D)
    per_panel = TILE_M // TILE_K
    n_slices = n_panels * per_panel
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    @partial(
        pl.run_scoped,
        z_ring=plgpu.SMEM((stages, TILE_M, TILE_K), x.dtype, transforms=transforms),
        x_ring=plgpu.SMEM((stages, TILE_K, TILE_D), x.dtype, transforms=transforms),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
        collective_axes="warpgroup",
    )
    def _program(z_ring, x_ring, full, empty):
        n_hot = n_hot_ref[0]
        n_tiles = lax.div(n_hot + (TILE_M - 1), jnp.int32(TILE_M)) * (n_columns * count)
        n_mine = lax.div(jnp.maximum(n_tiles - program, 0) + programs - 1, jnp.int32(programs))
        n_all = n_mine * n_slices

        def stage_of(number):
            return lax.rem(number, jnp.int32(stages))

        def place_of(nth):
            """Which gradient, the first of the hot neurons and of the columns."""
            number = program + nth * programs
            tile_id, which = lax.div(number, jnp.int32(count)), lax.rem(number, jnp.int32(count))
            row, column = lax.div(tile_id, jnp.int32(n_columns)), lax.rem(tile_id, jnp.int32(n_columns))
            return which, row * TILE_M, column * TILE_D

        def release(number):
            plgpu.barrier_arrive(empty.at[stage_of(number)])

        def multiply():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

            def multiply_tile(nth, _):
                which, row, column = place_of(nth)
                first = nth * n_slices

                def with_accumulator(acc):
                    def issue(k):
                        stage = stage_of(first + k)
                        plgpu.barrier_wait(full.at[stage])
                        plgpu.wgmma(acc, z_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)], x_ring.at[stage])

                    def step(k, _):
                        issue(k)
                        plgpu.wgmma_wait(1)
                        release(first + k - 1)

                    issue(0)
                    lax.fori_loop(1, n_slices, step, None)
                    product = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
                    release(first + n_slices - 1)
                    steps.store(product, order, outputs, which, row + warpgroup * ROWS, column, n_hot)

                pl.run_scoped(with_accumulator, plgpu.ACC((ROWS, TILE_D), jnp.float32))

            lax.fori_loop(0, n_mine, multiply_tile, None)

        def load():
            plgpu.set_max_registers(_LOAD_REGISTERS, action="decrease")

            def load_tile(nth, _):
                which, row, column = place_of(nth)
                neurons = steps.neurons(order, row, n_hot)

                def load_panel(panel, own):
                    ahead = steps.slots(slots, neurons, jnp.minimum(panel + 1, n_panels - 1))
                    for part in range(per_panel):
                        number = (nth * n_panels + panel) * per_panel + part
                        stage = stage_of(number)
                        pl.when(number >= stages)(partial(plgpu.barrier_wait, empty.at[stage]))
                        place = pl.ds(panel * TILE_M + part * TILE_K, TILE_K), pl.ds(column, TILE_D)

                        def copy(source, place=place, stage=stage):
                            plgpu.copy_gmem_to_smem(source.at[place], x_ring.at[stage], full.at[stage])

                        pl.when(which < count - 1)(partial(copy, x))
                        pl.when(which == count - 1)(partial(copy, dy))
                        steps.gather(zs, z_ring, own, which, stage, part)
                        steps.landed(but=lag)

                        @pl.when(number >= lag)
                        def _(number=number):
                            plgpu.barrier_arrive(full.at[stage_of(number - lag)])

                    return ahead

                lax.fori_loop(0, n_panels, load_panel, steps.slots(slots, neurons, jnp.int32(0)))

            lax.fori_loop(0, n_mine, load_tile, None)

            @pl.when(n_mine > 0)
            def _():
                steps.landed(but=0)
                for act, barriers, slices in (
                    (plgpu.barrier_arrive, full, lag),
                    (plgpu.barrier_wait, empty, stages),
                ):
                    for number in (n_all - back for back in range(slices, 0, -1)):
                        pl.when(number >= 0)(partial(act, barriers.at[stage_of(jnp.maximum(number, 0))]))

        lax.cond(warpgroup < COMPUTE_WARPGROUPS, multiply, load)
