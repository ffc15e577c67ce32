"""What orders of tokens cost, and what a trained model's feed-forward layers take in them."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.bench import timing
from pallas_kernels.options import Format
from sparse_lm import SparseFFN
from sparse_lm.layers import RMSNorm
from sparse_lm.order import Permutation
from sparse_lm.ordered import add_scattered, gathered_norm
from train.bench.order_counts import MakeOrder
from train.bench.text_layers import TextLayers


def order_costs(layers: TextLayers, orders: Mapping[str, MakeOrder], tokens: int) -> dict[str, float]:
    """Microseconds of making each order for one call of so many tokens: once a forward."""
    arguments = layers.tokens[:tokens], layers.entering(0)[:tokens]
    compiled = {name: jax.jit(make).lower(*arguments).compile() for name, make in orders.items()}
    calls = {name: partial(program, *arguments) for name, program in compiled.items()}
    return {name: 1e3 * each.median_ms for name, each in timing.measure(calls).items()}


@dataclasses.dataclass(frozen=True)
class MoveCosts:
    """Microseconds of what stands before and behind a layer, with and without an order.

    Attributes:
      norm, ordered_norm: the norm, and with its result in an order.
      sum, ordered_sum: the residual's sum, and with its second term given back from an order.
    """

    norm: float
    ordered_norm: float
    sum: float
    ordered_sum: float

    @property
    def of_order(self) -> float:
        """What the order adds to a layer."""
        return self.ordered_norm - self.norm + self.ordered_sum - self.sum


def move_costs(layers: TextLayers, make: MakeOrder, tokens: int) -> MoveCosts:
    """Of the model's first layer, for so many tokens in an order."""
    block, places = layers.block(0), _made(layers, make, tokens)
    arguments = layers.stream(0)[:tokens], layers.stream(layers.num_layers - 1)[:tokens], places
    programs: dict[str, Callable[..., jax.Array]] = {
        "norm": lambda x, y, places: block.ffn_norm(x),
        "ordered_norm": lambda x, y, places: _gathered(block.ffn_norm, x, places)[1],
        "sum": lambda x, y, places: x + y,
        "ordered_sum": lambda x, y, places: add_scattered(x, y, places),
    }
    compiled = {name: jax.jit(program).lower(*arguments).compile() for name, program in programs.items()}
    calls = {name: partial(program, *arguments) for name, program in compiled.items()}
    return MoveCosts(**{name: 1e3 * each.median_ms for name, each in timing.measure(calls).items()})


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of each layer's norm, feed-forward part and sum, one number a layer.

    Attributes:
      direction: ``"forward"``, or ``"train"``: forward and backward.
      format: the sparse one.
      tokens: of a call.
      dense: of the dense format, tokens as they come.
      text: of the sparse format, tokens as they come; ``ordered``, tokens in an order.
    """

    direction: str
    format: Format
    tokens: int
    dense: tuple[float, ...]
    text: tuple[float, ...]
    ordered: tuple[float, ...]


def layer_times(
    layers: TextLayers, make: MakeOrder, *, format: Format, tokens: int, train: bool
) -> LayerTimes:
    """Times all layers of a model on its own inputs: dense, sparse, and sparse in the order that ``make``
    makes, which is given to the layers and not timed with them.

    Raises:
      RequestError: the format cannot run here.
    """
    places = _made(layers, make, tokens)
    contestants = {"dense": ("dense", None), "text": (format, None), "ordered": (format, places)}
    compiled = timing.compile_all(
        {
            name: (_program(layers, with_format, train), _arguments(layers, 0, tokens, given))
            for name, (with_format, given) in contestants.items()
        }
    )
    programs: dict[str, Callable[..., Any]] = {}
    for name, program in compiled.items():
        if isinstance(program, Exception):
            raise program
        programs[name] = program
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for layer in range(layers.num_layers):
        calls = {}
        for name, (_, given) in contestants.items():
            calls[name] = partial(programs[name], *_arguments(layers, layer, tokens, given))
        for name, each in timing.measure(calls).items():
            found[name].append(each.median_ms)
    times = {name: tuple(values) for name, values in found.items()}
    return LayerTimes("train" if train else "forward", format, tokens, **times)


def _made(layers: TextLayers, make: MakeOrder, tokens: int) -> Permutation:
    return jax.jit(make)(layers.tokens[:tokens], layers.entering(0)[:tokens])


def _arguments(layers: TextLayers, layer: int, tokens: int, places: Permutation | None) -> tuple[Any, ...]:
    block = layers.block(layer)
    return nnx.state(block.ffn), nnx.state(block.ffn_norm), layers.stream(layer)[:tokens], places


def _gathered(norm: RMSNorm, x: jax.Array, places: Permutation) -> tuple[jax.Array, jax.Array]:
    return gathered_norm(x, norm.scale[...], places, eps=norm.eps, dtype=norm.dtype)


def _program(layers: TextLayers, format: Format, train: bool) -> Any:
    """``(weights, norm, stream, order) -> new stream``, or the gradients of the first three."""
    block = layers.block(0)
    assert isinstance(block.ffn, SparseFFN)  # TextLayers takes no other model
    options = block.ffn.options.with_format(format, "auto")
    ffn_graphdef, norm_graphdef = nnx.split(block.ffn)[0], nnx.split(block.ffn_norm)[0]

    def forward(weights, norm, x, places):
        ffn = nnx.merge(ffn_graphdef, weights)
        assert isinstance(ffn, SparseFFN)
        ffn.options = options
        if places is None:
            y, stats = ffn(nnx.merge(norm_graphdef, norm)(x))
            return x + y, stats.l1
        x, entering = _gathered(nnx.merge(norm_graphdef, norm), x, places)
        y, stats = ffn(entering)
        return add_scattered(x, y, places), stats.l1

    def gradients(weights, norm, x, places):
        def loss(weights, norm, x):
            y, l1 = forward(weights, norm, x, places)
            return jnp.mean(jnp.square(y.astype(jnp.float32))) + 1e-5 * l1

        return jax.grad(loss, argnums=(0, 1, 2))(weights, norm, x)

    return gradients if train else lambda *arguments: forward(*arguments)[0]


def speedups(times: LayerTimes, order_ms: float) -> dict[str, float]:
    """How many times as fast as dense all layers together are, tokens as they come (``text``) and in the
    order (``ordered``), which is made once."""
    dense = sum(times.dense)
    return {"text": dense / sum(times.text), "ordered": dense / (sum(times.ordered) + order_ms)}
