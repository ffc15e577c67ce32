"""What the persistent kernels on Mosaic GPU share: their launch, and a ring of shared-memory stages between
the warpgroups that load slices of operands and those that multiply them.

Slices are numbered over all tiles of a program, and slice n uses stage n mod ``stages``. The barriers:

full[stage]: what a slice is made of has arrived.
empty[stage]: all multiplying warpgroups have read a slice. A multiplier says so when it has issued the
  product of the slice behind it, or at the end of a tile. On Blackwell the tensor cores say so by themselves.

A loading warpgroup that gathers with cp.async says of slice n that it has arrived once it has started slice
n + ``lag``: its threads have then waited for their copies and fenced them. Before it loads over a slice it
waits until that is empty, and at the end for the last ones, so that every phase of a barrier is seen. Nobody
waits in a circle: before it starts slice n the loader waits until slice n - ``stages`` has been read, for
which slice n - ``stages`` + 1 must have arrived, of which it has said so, for ``lag`` is at most
``stages`` - 2.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(
    kernel: Callable[..., None], *, out_type: Any, programs: int, warpgroups: int, name: str, interpret: Any
) -> Callable[..., Any]:
    """A kernel of so many programs and warpgroups in each, as a function of its inputs.

    Args:
      kernel: called with references to the inputs and outputs, in a grid of one axis ``"program"`` and with
        the thread axis ``"warpgroup"``.
      out_type: what `plgpu.kernel` takes by this name, and ``interpret`` too.
      name: what profilers call it.
    """
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )


def ceil_div(value: Any, by: Any) -> Any:
    """Of an int32 that is not negative."""
    divisor = jnp.int32(by)
    return lax.div(value + divisor - 1, divisor)


def over_tiles(
    count: Any, look_up: Callable[[Any], Any], body: Callable[[Any, Any, Any, Any], Any], carry: Any
) -> Any:
    """The carry behind ``body(nth, its place, the following one, carry)`` for ``count`` tiles.

    What ``look_up`` says of the nth tile comes from loads that wait for each other: they are made a tile
    ahead.
    """

    def one(nth, state):
        place, carry = state
        following = look_up(nth + 1)
        return following, body(nth, place, following, carry)

    return lax.fori_loop(0, count, one, (look_up(jnp.int32(0)), carry))[1]


class Ring(NamedTuple):
    """The barriers of a ring.

    Attributes:
      full, empty: references to a barrier for each stage.
      stages: slices that have room.
      lag: slices on their way when a loader that gathers waits for an older one.
    """

    full: Any
    empty: Any
    stages: int
    lag: int = 0

    def stage_of(self, number: Any) -> Any:
        return lax.rem(number, jnp.int32(self.stages))

    def release(self, number: Any) -> None:
        """A multiplier has read a slice."""
        plgpu.barrier_arrive(self.empty.at[self.stage_of(number)])

    def multiply(
        self,
        acc: Any,
        first: Any,
        count: int,
        operands: Callable[[Any], tuple[Any, Any]],
        release: Callable[[Any], None],
    ) -> Any:
        """Adds the products of ``count`` slices from ``first`` on to an accumulator, and gives its value.

        Args:
          operands: what is multiplied of the slice in a stage.
          release: called for each slice once it has been read.
        """

        def issue(k):
            stage = self.stage_of(first + k)
            plgpu.barrier_wait(self.full.at[stage])
            plgpu.wgmma(acc, *operands(stage))

        def step(k, _):
            issue(k)
            plgpu.wgmma_wait(1)
            release(first + k - 1)

        issue(0)
        lax.fori_loop(1, count, step, None)
        product = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA)
        release(first + count - 1)
        return product

    def claim(self, number: Any) -> Any:
        """The stage of a slice that the loader is about to load, once it may."""
        stage = self.stage_of(number)
        pl.when(number >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[stage]))
        return stage

    def hand_over(self, number: Any, landed: Callable[[int], None]) -> None:
        """The loader has started a slice: what is ``lag`` slices older has arrived when ``landed`` returns,
        which waits for all gathered slices but so many."""
        landed(self.lag)
        pl.when(number >= self.lag)(
            lambda: plgpu.barrier_arrive(self.full.at[self.stage_of(number - self.lag)])
        )

    def drain(self, count: Any, landed: Callable[[int], None]) -> None:
        """The loader has started all of its ``count`` slices, of which there is one at least."""
        landed(0)
        for act, barriers, slices in (
            (plgpu.barrier_arrive, self.full, self.lag),
            (plgpu.barrier_wait, self.empty, self.stages),
        ):
            for number in (count - back for back in range(slices, 0, -1)):
                pl.when(number >= 0)(partial(act, barriers.at[self.stage_of(jnp.maximum(number, 0))]))
