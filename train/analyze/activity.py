"""Counts from one pass of a trained model over text: which neurons its tokens activate, layer by layer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from train.bench import order_counts
from train.bench.order_counts import TEXT, MakeOrder
from train.bench.text_layers import TextLayers


@dataclasses.dataclass(frozen=True)
class Activity:
    """What was counted of M tokens in L layers of F neurons.

    Attributes:
      ids: (M,) int32, the tokens: whole sequences of ``context_length``, one after the other.
      context_length: S.
      d_ff: F.
      nnz: (L, M) int32, active neurons of each token.
      hits: (L, F) int64, for how many tokens each neuron was active.
      panels: P, numbers of tokens whose neurons are counted together.
      unions: by order of the tokens, ``"text"`` first: (L, number of panel sizes) f64, the mean number of
        neurons that P tokens activate together.
    """

    ids: np.ndarray
    context_length: int
    d_ff: int
    nnz: np.ndarray
    hits: np.ndarray
    panels: tuple[int, ...]
    unions: Mapping[str, np.ndarray]


def count(
    layers: TextLayers,
    orders: Mapping[str, MakeOrder],
    *,
    panels: Sequence[int],
    call: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Activity:
    """Counts all tokens of ``layers``.

    Args:
      layers: the model and its text.
      orders: of the tokens, beside the text's own.
      panels: P; sizes beyond a call are left out, and a text that is shorter than all of them is one panel.
      call: tokens that are put in order at a time, as one forward's are; what is left of the text behind the
        last whole call is part of all figures but the unions.
      on_progress: told how many parts of the work are done, and of how many.
    """
    tokens, first = len(layers.tokens), layers.entering(0)
    call = min(call, tokens)
    panels = tuple(panel for panel in panels if panel <= call) or (call,)
    parts = [slice(at, min(at + call, tokens)) for at in range(0, tokens, call)]
    in_order = [_orders(orders, layers.tokens[part], first[part]) for part in parts]
    nnz, hits, unions = [], [], []
    for layer in range(layers.num_layers):
        entering = layers.entering(layer)
        found_nnz, found_hits, found_unions = [], np.zeros(layers.model.config.d_ff, np.int64), []
        for nth, (part, places) in enumerate(zip(parts, in_order, strict=True)):
            counted = _counts(layers.active(layer, entering[part]), places, panels)
            part_nnz, part_hits, part_unions = jax.device_get(counted)
            found_nnz.append(part_nnz)
            found_hits += part_hits
            if len(part_nnz) == call:
                found_unions.append(np.asarray(part_unions, np.float64))
            on_progress(layer * len(parts) + nth + 1, layers.num_layers * len(parts))
        nnz.append(np.concatenate(found_nnz))
        hits.append(found_hits)
        unions.append(np.mean(found_unions, axis=0))
    by_order = np.stack(unions, axis=1)  # (order, layer, panel size)
    return Activity(
        ids=np.asarray(layers.tokens),
        context_length=layers.config.model.context_length,
        d_ff=layers.model.config.d_ff,
        nnz=np.stack(nnz),
        hits=np.stack(hits),
        panels=panels,
        unions=dict(zip((TEXT, *orders), by_order, strict=True)),
    )


def _orders(orders: Mapping[str, MakeOrder], ids: jax.Array, first: jax.Array) -> jax.Array:
    """(R, M) int32, the text's order and then the others."""
    made = [make(ids, first).order for make in orders.values()]
    return jnp.stack([jnp.arange(len(ids), dtype=jnp.int32), *made])


@partial(jax.jit, static_argnames="panels")
def _counts(mask: jax.Array, orders: jax.Array, panels: tuple[int, ...]):
    fitting = tuple(panel for panel in panels if panel <= len(mask))
    nnz = jnp.sum(mask, axis=1, dtype=jnp.int32)
    hits = jnp.sum(mask, axis=0, dtype=jnp.int32)
    empty = jnp.zeros((len(orders), 0))
    return nnz, hits, order_counts.mean_unions(mask, orders, fitting) if fitting else empty
