"""What both ways of running a shared call keep between its forward and its backward."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.differentiation import Fact, as_array
from pallas_kernels.options import FFNStats
from pallas_kernels.partition.layer import Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saved:
    """The arguments as they came, what is kept beside them, and whether any weight is differentiated."""

    arguments: Arrays
    kept: Any
    weights: Fact

    def cotangents(self, cotangents: tuple[Any, FFNStats]) -> tuple[jax.Array, jax.Array]:
        """Those of y and l1 as arrays, from those of all outputs."""
        dl1 = cotangents[1].l1
        zero = jnp.zeros((), jnp.float32)
        return as_array(cotangents[0], self.arguments[0]), zero if isinstance(dl1, SymbolicZero) else dl1

    def wanted(self, of_arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of things that belong to the arguments, those of the ones that are differentiated."""
        return of_arguments if self.weights else of_arguments[:1]

    def gradients(self, wanted: list[jax.Array]) -> tuple[jax.Array | None, ...]:
        """One for each argument, from those that are wanted; None for the others."""
        return *wanted, *(None,) * (len(self.arguments) - len(wanted))


@jax.custom_jvp
def once(arrays: Any) -> Any:
    """The arrays themselves; to differentiate what is made of them is an error."""
    return arrays


@once.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "sparse_ffn and sparse_mlp are differentiated once, in reverse mode, on arrays that several devices "
        "share; where a second derivative is needed, call them with format='dense' inside a jax.shard_map"
    )
