"""Synthetic layers whose gates are as sparse as asked, for benchmarks, the tuner and tests.

A gate is ``b_j + s_i + w_j . z_i`` with standard normal z and unit w: neuron j is active with a probability
that its bias b sets, and the token's shift s makes rows uneven. Neurons' rates are log-normal and a share of
them is dead. A token's z is partly its topic's, ``sqrt(r) t + sqrt(1 - r) e``, and topics follow each other
at random. So neighbours share little more than independent tokens do, which at the measured spreads is what
32 and 128 neighbouring tokens of a trained model share, to within 12 %; and tokens of one topic share much,
as do those that a model's order of its tokens puts side by side.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from pallas_kernels import reference
from pallas_kernels.activations import RELU
from pallas_kernels.errors import RequestError

_HIGHEST_RATE = 0.95
_NEVER = -40.0
_WEIGHT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Activity:
    """How active a layer's neurons are.

    Attributes:
      mean_nnz: active gates of a token, on average over tokens.
      dead: share of the neurons that no token activates.
      rate_spread: standard deviation of the logarithm of the other neurons' rates.
      token_spread: standard deviation of a token's shift, in units of a gate's own.
      topic_share: r, the share of a gate's variance over tokens that their topics explain.
      topics: how many topics there are, all as frequent.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    mean_nnz: float = 30.0
    dead: float = 0.3
    rate_spread: float = 1.5
    token_spread: float = 0.35
    topic_share: float = 0.0
    topics: int = 64

    def __post_init__(self) -> None:
        if not self.mean_nnz > 0:
            raise ValueError(f"Activity.mean_nnz must be above 0; got {self.mean_nnz}")
        if not 0 <= self.dead < 1:
            raise ValueError(f"Activity.dead must be at least 0 and under 1; got {self.dead}")
        if self.rate_spread < 0 or self.token_spread < 0:
            raise ValueError(
                f"Activity.rate_spread and token_spread must be at least 0; got {self.rate_spread}, "
                f"{self.token_spread}"
            )
        if not 0 <= self.topic_share <= 1 or self.topics < 1:
            raise ValueError(
                f"Activity.topic_share must be from 0 to 1, and topics at least 1; got {self.topic_share}, "
                f"{self.topics}"
            )


_TOPIC_SHARE = 0.65

PROFILES = {
    "layer-0": Activity(334, 0.0, 1.6, 0.5, _TOPIC_SHARE),
    "layer-1": Activity(31, 0.78, 2.0, 0.4, _TOPIC_SHARE),
    "layer-3": Activity(45, 0.81, 2.0, 0.2, _TOPIC_SHARE),
    "layer-5": Activity(154, 0.54, 2.0, 0.2, _TOPIC_SHARE),
    "layer-6": Activity(273, 0.34, 2.0, 0.2, _TOPIC_SHARE),
    "layer-7": Activity(477, 0.01, 1.6, 0.4, _TOPIC_SHARE),
    "no-l1": Activity(900, 0.0, 1.0, 0.3, _TOPIC_SHARE),
}
"""Layers of a trained 8-layer model with F = 5632: mean nnz and dead share as measured, spreads fitted to the
99th percentile of a token's nnz and to the neurons that 32 and 128 consecutive tokens activate together. With
their topics' share, 128 tokens of one topic activate about half of what as many consecutive ones do.
``no-l1`` has the mean nnz of a layer trained without the L1 term, and spreads that nobody measured."""

_PROFILED_D_FF = 5632
_LADDER = (
    Activity(5, 0.95, 1.8, 0.3, _TOPIC_SHARE),
    *(PROFILES[f"layer-{n}"] for n in (1, 3, 5, 6, 7)),
    PROFILES["no-l1"],
)
"""By mean nnz: the sparsest middle layer of the same model under ten times the L1 term (130 neurons in 128
tokens), the profiles, and no L1. The first layer is left out: it reads embeddings, and shares less than its
neighbours in nnz do."""


def like_trained(mean_nnz: float, d_ff: int = _PROFILED_D_FF) -> Activity:
    """The activity of a trained layer of that mean nnz: dead share and spreads between those
    of measured layers.

    They follow straight lines over log nnz, and stay what they are at the ends beyond them. Layers of another
    F are taken to be alike where the same share of their neurons is active.

    Raises:
      ValueError: ``mean_nnz`` is not above 0.
    """
    Activity(mean_nnz)
    place = math.log(mean_nnz * _PROFILED_D_FF / d_ff)
    rungs = [math.log(each.mean_nnz) for each in _LADDER]

    def at(field: str) -> float:
        return float(np.interp(place, rungs, [getattr(each, field) for each in _LADDER]))

    return Activity(mean_nnz, at("dead"), at("rate_spread"), at("token_spread"), at("topic_share"))


def ffn_inputs(
    key: jax.Array,
    activity: Activity,
    *,
    tokens: int,
    d_model: int,
    d_ff: int,
    gated: bool = True,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    alike: bool = False,
) -> dict[str, jax.Array]:
    """Arguments of `sparse_ffn` (or, without ``w_gate``, of `sparse_mlp`): x (M, D) and weights (F, D).

    With ``alike`` the tokens of a topic stand together, as a model's order of its tokens puts them. All but
    the key is static under ``jit``. The mean nnz is the activity's up to sampling noise, under 5 % from a
    thousand tokens on.

    Raises:
      ValueError: no token, D under 4, or more active gates asked for than the live neurons can give.
    """
    if tokens < 1 or d_model < 4:
        raise ValueError(
            f"synthetic inputs need M of at least 1 and D of at least 4; got {tokens} and {d_model}"
        )
    live = d_ff - round(d_ff * activity.dead)
    if activity.mean_nnz > live * _HIGHEST_RATE * 0.9:
        raise RequestError(
            f"a mean nnz of {activity.mean_nnz:g} needs more than the {live} live neurons of F={d_ff}: ask "
            "for fewer, or for a smaller dead share"
        )
    for_order, for_tokens, for_shift, for_gate, for_up, for_down = jax.random.split(key, 6)
    shift = activity.token_spread * _normal_quantiles(tokens)[:, None]
    rates = jnp.pad(_rates(activity, live), (0, d_ff - live))
    bias = jnp.where(rates > 0, ndtri(rates) * math.hypot(1, activity.token_spread), _NEVER)[:, None]
    directions = jax.random.normal(for_gate, (d_ff, d_model - 2))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
    x = jnp.concatenate(
        [
            jnp.ones((tokens, 1)),
            jax.random.permutation(for_shift, shift),
            token_values(for_tokens, activity, tokens=tokens, width=d_model - 2, alike=alike),
        ],
        axis=1,
    )
    gate = jnp.concatenate([jax.random.permutation(for_order, bias), jnp.ones((d_ff, 1)), directions], axis=1)
    down = _WEIGHT_STD * jax.random.normal(for_down, (d_ff, d_model))
    inputs = {"x": x, "w_up": gate, "w_down": down}
    if gated:
        inputs |= {"w_gate": gate, "w_up": _WEIGHT_STD * jax.random.normal(for_up, (d_ff, d_model))}
    return {name: value.astype(dtype) for name, value in inputs.items()}


def token_values(
    key: jax.Array, activity: Activity, *, tokens: int, width: int, alike: bool = False
) -> jax.Array:
    """z of tokens: (M, width) f32, standard normal, alike where topics are; with ``alike`` topic by topic."""
    own = jax.random.normal(key, (tokens, width))
    if not activity.topic_share:
        return own
    for_topics, for_choice = jax.random.split(jax.random.fold_in(key, 1))
    topics = jax.random.normal(for_topics, (activity.topics, width))
    chosen = jax.random.randint(for_choice, (tokens,), 0, activity.topics)
    chosen = jnp.sort(chosen) if alike else chosen
    return math.sqrt(activity.topic_share) * topics[chosen] + math.sqrt(1 - activity.topic_share) * own


def measure(x: jax.Array, weight: jax.Array) -> dict[str, float]:
    """What an input was found to be: x (M, D) and the weight (F, D) whose product is rectified.

    Returns:
      ``mean_nnz``, ``p99_nnz`` and ``max_nnz`` of a token, ``dead_fraction`` of the neurons, and ``union_32``
      and ``union_128``: how many neurons so many consecutive tokens activate, on average.
    """
    return {name: float(value) for name, value in _measure(x, weight).items()}


@jax.jit
def _measure(x, weight):
    mask = RELU.active(reference.project(x, weight))
    nnz = jnp.sum(mask, axis=1, dtype=jnp.int32)

    def union(tokens):
        tokens = min(tokens, len(mask))
        groups = mask[: len(mask) // tokens * tokens].reshape(-1, tokens, mask.shape[1])
        return jnp.mean(jnp.sum(jnp.any(groups, axis=1), axis=1, dtype=jnp.float32))

    return {
        "mean_nnz": jnp.mean(nnz.astype(jnp.float32)),
        "p99_nnz": jnp.percentile(nnz.astype(jnp.float32), 99),
        "max_nnz": jnp.max(nnz),
        "dead_fraction": jnp.mean(~jnp.any(mask, axis=0), dtype=jnp.float32),
        "union_32": union(32),
        "union_128": union(128),
    }


def _normal_quantiles(n: int) -> jax.Array:
    """(n,) f32: a sample of the standard normal whose moments are not left to chance."""
    return ndtri((jnp.arange(n) + 0.5) / n)


def _rates(activity: Activity, live: int) -> jax.Array:
    """(live,) f32 log-normal probabilities, at most `_HIGHEST_RATE`, that sum to the mean nnz."""
    log_rates = activity.rate_spread * _normal_quantiles(live)

    def scaled(log_scale):
        return jnp.minimum(jnp.exp(log_rates + log_scale), _HIGHEST_RATE)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(scaled(middle)) >= activity.mean_nnz
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bounds = (jnp.float32(-50.0), jnp.float32(50.0))
    low, high = lax.fori_loop(0, 40, halve, bounds)
    return scaled((low + high) / 2)
