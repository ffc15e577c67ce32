"""The weight gradients of PanelELL's hot neurons for Hopper: gathered rows of gradients on Mosaic GPU.

    dW[j] = sum over tokens of z[j] x      z (n_slots, P) of dg, du and h, x (M, D) of x, x and dy

Why it exists. In `pallas_triton_weights.panel_dw_hot` the threads that multiply also load. Here one warpgroup
loads and two multiply, a tile of 128 neurons by 256 columns between them: TMA brings rows of x, cp.async the
panels' values of the tile's neurons, 16 bytes a thread, to where TMA would have put them. A program walks all
tokens for a tile, and all gradients are one launch.

What was measured, in ms, on one NVIDIA H200, D 2048, F 5632, bf16, the product of hot neurons alone; to the
bit what Triton's gives.

    tokens                                         16,384    65,536    16,384    65,536
    active neurons of a panel, hot neurons       596, 640  596, 640     1,614     1,613, 1,408 hot
    this design                                     0.194     0.727     0.388     1.468
    one slice on its way behind the loader's        0.199     0.744     0.398     1.550
    `pallas_triton_weights.panel_dw_hot`            0.269     1.042     0.543     1.978

Work: 6 M hot D FLOPs, of hot neurons filled up to a multiple of 128. Bytes, mostly from L2: 6 M hot D / 256
of z and 6 M hot D / 128 of x and dy; it writes 3 hot D results.

Numerics. As on Triton: f32 accumulation over all tokens, one rounding to the result's type. Tokens past M are
zeros of x.

Limits. Panels of 128 tokens in 16 bits; D a multiple of 64 and at least 256. The interpreter cannot run the
PTX of `ptx_weights`: there a caller gives steps of another kind.
"""

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.common import varying_axes
from pallas_kernels.common.hopper_gemm import COMPUTE_WARPGROUPS, ROWS, TILE_K, TILE_M, shared_transforms
from pallas_kernels.common.hopper_ring import Ring, launch
from pallas_kernels.panel import ptx_weights
from pallas_kernels.panel.pallas_triton_weights import Ranking

TILE_D = 256
_STAGES = 4  # they take 192 of 227 KiB of shared memory
_LAG = 2  # slices on their way when the loader waits for an older one
_MULTIPLY_REGISTERS, _LOAD_REGISTERS = 208, 88


class Steps(Protocol):
    """What warpgroups do that JAX has no operation for: `ptx_weights.Steps`, which says what each is."""

    def neurons(self, order: Any, row: Any, n_hot: Any) -> Any: ...

    def slots(self, slots: Any, neurons: Any, panel: Any) -> Any: ...

    def gather(self, zs: Any, ring: Any, slots: Any, which: Any, stage: Any, part: int) -> None: ...

    def landed(self, but: int) -> None: ...

    def store(
        self, acc: Any, order: Any, outputs: Any, which: Any, row: Any, column: Any, n_hot: Any
    ) -> None: ...


def unsupported_reason(d_model: int, dtype: jax.typing.DTypeLike, panel: int) -> str | None:
    """What of a call this kernel cannot do, in one sentence; None if it can."""
    if panel != TILE_M:
        return f"dw_backend='mosaic_gpu' has panels of {TILE_M} tokens; got panel={panel}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"dw_backend='mosaic_gpu' multiplies 16-bit values; got {jnp.dtype(dtype).name}"
    if d_model < TILE_D or d_model % TILE_K:
        return f"dw_backend='mosaic_gpu' needs D of {TILE_D} or more, a multiple of {TILE_K}; got D={d_model}"
    return None


def panel_dw_hot(
    zs: list[jax.Array],
    xs: list[jax.Array],
    ranking: Ranking,
    slots: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    steps: Steps | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """`pallas_triton_weights.panel_dw_hot`: for each z (n_slots, P) and its x (M, D) the rows of hot neurons
    of an (F, D) gradient; other rows are not written.

    Args:
      slots: (n_panels, F) int32, below zero where a panel has no slot of a neuron.
      steps: other steps than those in PTX, for the interpreter.
    """
    order, n_hot = ranking.order, ranking.n_hot
    x, dy = (jnp.pad(each, ((0, -each.shape[0] % 8), (0, 0))) for each in (xs[0], xs[-1]))
    d_ff, d_model = order.shape[0], x.shape[1]
    if steps is None:
        steps = ptx_weights.Steps(len(zs), x.dtype, jnp.dtype(dtype), d_model, d_ff)
    programs = device.current().cores or 1
    outputs = launch(
        partial(_kernel, steps=steps, transforms=shared_transforms(x.dtype), programs=programs),
        out_type=(jax.ShapeDtypeStruct((d_ff, d_model), dtype),) * len(zs),
        programs=programs,
        warpgroups=COMPUTE_WARPGROUPS + 1,
        name="panel_dw_hot",
        interpret=interpret,
    )(order, n_hot, slots, *zs, x, dy)
    return tuple(varying_axes.vary_with(zs[0], outputs))


def _kernel(order, n_hot_ref, slots, *refs, steps, transforms, programs):
    """Warpgroups 0 and 1 multiply 64 neurons of a tile each, 2 loads.

    Slices of tokens go around a `Ring`: the copy of x or dy arrives by itself, and for what is gathered the
    loader says so.
    """
    count = (len(refs) - 2) // 2
    zs, (x, dy), outputs = refs[:count], refs[count : count + 2], refs[count + 2 :]
    n_panels, n_columns = slots.shape[0], pl.cdiv(x.shape[1], TILE_D)
    per_panel = TILE_M // TILE_K
    n_slices = n_panels * per_panel
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    @partial(
        pl.run_scoped,
        z_ring=plgpu.SMEM((_STAGES, TILE_M, TILE_K), x.dtype, transforms=transforms),
        x_ring=plgpu.SMEM((_STAGES, TILE_K, TILE_D), x.dtype, transforms=transforms),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=_STAGES),
        collective_axes="warpgroup",
    )
    def _program(z_ring, x_ring, full, empty):
        n_hot = n_hot_ref[0]
        n_tiles = lax.div(n_hot + (TILE_M - 1), jnp.int32(TILE_M)) * (n_columns * count)
        n_mine = lax.div(jnp.maximum(n_tiles - program, 0) + programs - 1, jnp.int32(programs))
        n_all = n_mine * n_slices

        ring = Ring(full, empty, _STAGES, _LAG)

        def place_of(nth):
            """Which gradient, the first of the hot neurons and of the columns."""
            number = program + nth * programs
            tile_id, which = lax.div(number, jnp.int32(count)), lax.rem(number, jnp.int32(count))
            row, column = lax.div(tile_id, jnp.int32(n_columns)), lax.rem(tile_id, jnp.int32(n_columns))
            return which, row * TILE_M, column * TILE_D

        def multiply():
            plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")

            def multiply_tile(nth, _):
                which, row, column = place_of(nth)
                first = nth * n_slices

                def operands(stage):
                    return z_ring.at[stage, pl.ds(warpgroup * ROWS, ROWS)], x_ring.at[stage]

                def with_accumulator(acc):
                    product = ring.multiply(acc, first, n_slices, operands, ring.release)
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
                        stage = ring.claim(number)
                        place = pl.ds(panel * TILE_M + part * TILE_K, TILE_K), pl.ds(column, TILE_D)

                        def copy(source, place=place, stage=stage):
                            plgpu.copy_gmem_to_smem(source.at[place], x_ring.at[stage], full.at[stage])

                        pl.when(which < count - 1)(partial(copy, x))
                        pl.when(which == count - 1)(partial(copy, dy))
                        steps.gather(zs, z_ring, own, which, stage, part)
                        ring.hand_over(number, steps.landed)

                    return ahead

                lax.fori_loop(0, n_panels, load_panel, steps.slots(slots, neurons, jnp.int32(0)))

            lax.fori_loop(0, n_mine, load_tile, None)

            pl.when(n_mine > 0)(lambda: ring.drain(n_all, steps.landed))

        # A branch for each role, for ptxas to know whose registers are whose.
        lax.cond(warpgroup < COMPUTE_WARPGROUPS, multiply, load)
