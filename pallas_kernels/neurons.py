"""Which neurons stand next to which, and which are kept: chosen once for a trained layer, at no cost a call.

Every format works in tiles or panels of neighbouring neurons. In a trained layer a few neurons fire often and
many hardly ever, at random places: ordered by activity, the hot ones share tiles and the cold tiles are
mostly empty. Neurons that never fire at all can be dropped, as far as the data at use resembles the data they
were counted on; `Pruned.verify` says whether it does.

D model width, F hidden neurons. Weights are neuron-major, so that both are a choice of rows: in ``w_up``,
``w_down`` and, for the gated layer, ``w_gate``, each (F, D).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import reference
from pallas_kernels.activations import Activation, rule

_REQUIRED = ("w_up", "w_down")
_NAMES = ("w_gate", *_REQUIRED)

Counts = jax.Array | np.ndarray


def neuron_order(hits: Counts) -> jax.Array:
    """The neurons by activity, most active first; equally active ones keep their order.

    Args:
      hits: (F,) of an integer type, for how many tokens each neuron was active: ``FFNStats.neuron_hits``, or
        the sum over many calls.

    Returns:
      (F,) int32, a permutation: place i belongs to neuron ``order[i]``. Traceable.

    Raises:
      TypeError: hits are no array or not integers.
      ValueError: hits are not of one axis.
    """
    _check_integers("hits", hits, None)
    # A NumPy array may hold 64-bit sums, which would wrap in JAX's 32 bits.
    argsort = np.argsort if isinstance(hits, np.ndarray) else jnp.argsort
    ascending = argsort(hits[::-1], stable=True)
    return jnp.asarray(hits.shape[0] - 1 - ascending[::-1], jnp.int32)


def inverse_order(order: Counts) -> jax.Array:
    """Undoes an order: ``hits[inverse_order(order)]`` are a reordered layer's hits in the old order.

    Args:
      order: (F,) of an integer type, a permutation of 0 to F - 1.

    Returns:
      (F,) int32, the permutation with ``inverse[order[i]] = i``. Traceable.

    Raises:
      TypeError: order is no array or not integers.
      ValueError: order is not of one axis, or (outside ``jit``) no permutation.
    """
    _check_permutation(order, None)
    return jnp.argsort(jnp.asarray(order, jnp.int32)).astype(jnp.int32)


def reorder(weights: Mapping[str, jax.Array], order: Counts) -> dict[str, jax.Array]:
    """The same layer with its neurons in another order.

    It computes the same sums in another order: y and l1 agree up to the rounding of that, l0 and max_nnz as
    long as no gate is within rounding of zero, and ``neuron_hits`` come out permuted: see `inverse_order`.

    Args:
      weights: ``w_up``, ``w_down`` and optionally ``w_gate``, each (F, D). Whatever belongs to the weights
        row by row, such as an optimizer's moments, is reordered by a second call.
      order: (F,) of an integer type, a permutation: row i of the result is row ``order[i]``.

    Returns:
      A dict of the same names, shapes and types. Traceable and differentiable; ``jax.vmap`` takes weights and
      orders with a leading layer axis. Inside ``jit`` an order cannot be checked: a row out of range is NaN.

    Raises:
      TypeError: weights are no mapping of arrays, or order is no array of integers.
      ValueError: names or shapes that do not fit, or (outside ``jit``) an order that is no permutation.
    """
    d_ff = _check_weights(weights)
    _check_permutation(order, d_ff)
    rows = jnp.asarray(order, jnp.int32)
    return {name: _rows(weight, rows) for name, weight in weights.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PruneCheck:
    """What pruning lost on one batch; both zero: the pruned layer gave the unpruned layer's result.

    Checks of several batches add up: ``jax.tree.map(jnp.add, first, second)``.

    Attributes:
      missed_activations: () int32, (token, neuron) pairs whose dropped gate is active.
      affected_tokens: () int32, tokens with at least one such pair.
    """

    missed_activations: jax.Array
    affected_tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruned:
    """A layer without its silent neurons, and what it takes to check that they stay silent.

    Attributes:
      weights: ``w_up``, ``w_down`` and, if there was one, ``w_gate``, each (F_kept, D).
      kept: (F_kept,) int32, the neurons kept, ascending: ``zeros.at[kept].set(hits)`` maps hits back.
      dropped_gate: (F_dropped, D), the rows that decided whether a dropped neuron was active: of ``w_gate``,
        or of ``w_up`` where there is no gate.
      expected_misses: estimate of ``missed_activations`` a token on more data of the same kind; None where
        the number of calibration tokens was not given. It is the number of neurons that fired exactly once,
        over the tokens (Good and Turing): nearly unbiased for independent tokens, too low for a neuron that
        fires in bursts.
    """

    weights: dict[str, jax.Array]
    kept: jax.Array
    dropped_gate: jax.Array
    expected_misses: float | None = dataclasses.field(default=None, metadata={"static": True})

    def verify(self, x: jax.Array, activation: Activation = "relu") -> PruneCheck:
        """Counts what the dropped neurons would have contributed to a batch, by the reference's own gate.

        It costs the gate product of the dropped neurons and holds (tokens, F_dropped) gates: a check to run
        on samples of the traffic. A gate within rounding of zero may fall on the other side in a product of
        another shape.

        Args:
          x: (..., D) tokens in any leading shape, in the weights' type; what the layer reads.
          activation: the layer's.

        Returns:
          The counts of this batch; traceable, so ``jax.jit(pruned.verify)`` works. They are int32: a call
          holds fewer than 2^31 pairs. A NaN token counts as active for every neuron, as it does in the layer.

        Raises:
          TypeError: x is no array or not of the weights' type.
          ValueError: x is not of width D.
        """
        _check_tokens(x, self.dropped_gate)
        tokens = x.reshape(-1, x.shape[-1])
        missed = rule(activation).active(reference.project(tokens, self.dropped_gate))
        return PruneCheck(
            missed_activations=jnp.sum(missed, dtype=jnp.int32),
            affected_tokens=jnp.sum(jnp.any(missed, axis=1), dtype=jnp.int32),
        )


def prune_silent(
    weights: Mapping[str, jax.Array], hits: Counts, *, tokens: int | None = None, multiple: int = 1
) -> Pruned:
    """Drops the neurons that never fired on the calibration data that ``hits`` were counted on.

    Assumes that inputs at use look like the calibration data. A dropped neuron contributes nothing only while
    its gate stays at or under zero: then the result is the unpruned layer's up to summation order. An input
    that would wake it loses its contribution, silently: no format or backend can notice, `Pruned.verify` can.
    The hits must be of these very weights: training on, or casting to another type, makes them stale. A
    dropped neuron is gone: it cannot come back to life in later training.

    Runs on the host, for the shapes of the result depend on the values of ``hits``. Neurons keep their
    relative order, so pruning and reordering combine: `reorder` first and the hot neurons stay in front.

    Args:
      weights: ``w_up``, ``w_down`` and optionally ``w_gate``, each (F, D).
      hits: (F,) of an integer type, for how many calibration tokens each neuron was active. Over more than
        2^31 tokens, add up in NumPy's int64.
      tokens: how many tokens the hits were counted on, for ``Pruned.expected_misses``.
      multiple: keep a multiple of this many neurons, such as a kernel's tile (8, 128 or 256), by retaining
        the first silent ones; all F where there are too few to fill it.

    Returns:
      The layer that is left, which neurons it has, and the gate rows of the others.

    Raises:
      TypeError: weights are no mapping of arrays, hits no array of integers, or hits are traced.
      ValueError: names, shapes or counts that do not fit, or no neuron fired at all.
    """
    d_ff = _check_weights(weights)
    _check_integers("hits", hits, d_ff)
    if isinstance(hits, jax.core.Tracer):
        raise TypeError(
            "prune_silent must run on the host, for it changes shapes; got traced hits: call it outside jit"
        )
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1; got {multiple}")
    counts = np.asarray(hits)
    _check_counts(counts, tokens)

    fired = int(np.count_nonzero(counts))
    silent = np.flatnonzero(counts == 0)
    stays = counts > 0
    stays[silent[: -fired % multiple]] = True
    # Indices, not a mask: where the weights are traced, their shapes still have to be known.
    kept = jnp.asarray(np.flatnonzero(stays), jnp.int32)
    dropped = jnp.asarray(np.flatnonzero(~stays), jnp.int32)
    return Pruned(
        weights={name: _rows(weight, kept) for name, weight in weights.items()},
        kept=kept,
        dropped_gate=_rows(weights.get("w_gate", weights["w_up"]), dropped),
        expected_misses=None if tokens is None else int(np.count_nonzero(counts == 1)) / tokens,
    )


def _rows(weight: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(weight), rows, axis=0)


def _check_weights(weights: Mapping[str, jax.Array]) -> int:
    """F of weights that belong together."""
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights must be a mapping from names to arrays; got {type(weights).__name__}: pass "
            f"{{'w_up': ..., 'w_down': ...}}"
        )
    unknown = [name for name in weights if name not in _NAMES]
    if unknown:
        raise ValueError(
            f"weights must be named w_gate, w_up and w_down; got {unknown[0]!r}: rename or remove it"
        )
    for name in _REQUIRED:
        if name not in weights:
            raise ValueError(
                f"weights must have w_up and w_down; got {', '.join(weights) or 'none'}: add {name}"
            )
    for name, weight in weights.items():
        if weight is None:
            raise TypeError(f"{name} must be an array; got None: leave w_gate out of a layer without one")
        _check_array(name, weight)
        if weight.ndim != 2:
            raise ValueError(
                f"{name} must have shape (F, D), one row a neuron; got {weight.shape}: pass one layer, or "
                f"vmap over layers"
            )
    expected = weights["w_up"].shape
    for name, weight in weights.items():
        if weight.shape == expected:
            continue
        if weight.shape == expected[::-1]:
            raise ValueError(
                f"{name} must have the shape (F, D) of w_up, {expected}; got {weight.shape}, which looks "
                f"like (D, F): pass {name}.T"
            )
        raise ValueError(
            f"{name} must have the shape (F, D) of w_up, {expected}; got {weight.shape}: pass "
            f"weights of one layer"
        )
    return expected[0]


def _check_integers(name: str, value: Counts, d_ff: int | None) -> None:
    _check_array(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers, one a neuron; got {value.dtype}: pass {_SOURCE[name]}, unscaled"
        )
    if value.ndim != 1 or d_ff not in (None, value.shape[0]):
        expected = "(F,)" if d_ff is None else f"(F,) = ({d_ff},), F from the weights"
        raise ValueError(f"{name} must have shape {expected}; got {value.shape}: pass those of one layer")


_SOURCE = {"hits": "FFNStats.neuron_hits", "order": "the result of neuron_order"}


def _check_permutation(order: Counts, d_ff: int | None) -> None:
    _check_integers("order", order, d_ff)
    if isinstance(order, jax.core.Tracer):
        return
    rows = np.asarray(order).astype(np.int64)
    times = np.bincount(rows[(rows >= 0) & (rows < rows.size)], minlength=rows.size)
    if (times != 1).any():
        neuron = int(np.argmax(times != 1))
        raise ValueError(
            f"order must hold each of 0 to {rows.size - 1} once; got {neuron} {times[neuron]} times: pass "
            f"the result of neuron_order"
        )


def _check_counts(counts: np.ndarray, tokens: int | None) -> None:
    """Of hits on the host: nothing that a count of tokens cannot be, and something that fired."""
    least, most = int(counts.min(initial=0)), int(counts.max(initial=0))
    if least < 0:
        raise ValueError(
            f"hits must be counts of at least 0; got {least}, as when an int32 sum wraps: add up in "
            f"NumPy's int64"
        )
    if most == 0:
        raise ValueError(
            "hits must be above 0 for at least one neuron; got none that fired, which leaves no layer: count "
            "them on calibration data"
        )
    if tokens is not None and tokens < most:
        raise ValueError(
            f"tokens must be at least the hits of every neuron, {most}; got {tokens}: pass the number of "
            f"tokens that the hits were counted on"
        )


def _check_tokens(x: jax.Array, gate: jax.Array) -> None:
    _check_array("x", x)
    if x.ndim < 1 or x.shape[-1] != gate.shape[1]:
        raise ValueError(
            f"x must have shape (..., D) with D={gate.shape[1]} as in the pruned weights; got {x.shape}: "
            f"pass what the layer reads"
        )
    if x.dtype != gate.dtype:
        raise TypeError(
            f"x must be {gate.dtype} as the pruned weights are; got {x.dtype}: cast one of them, for "
            f"rounding decides which gates are active"
        )


def _check_array(name: str, value: object) -> None:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} must be an array; got {type(value).__name__}: convert it with jax.numpy.asarray"
        )
