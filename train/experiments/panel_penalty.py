"""A penalty on the unions of panels, in a dense feed-forward layer of plain JAX.

A panel of P tokens costs the neurons that any of them activates, and L1 counts activations of tokens. The
group-sparse penalty counts a neuron's activations over a panel together, so that it is cheaper to activate
few neurons often than many neurons once each:

    panel_l1 = (1/M) sum over panels, neurons j of sqrt(P) ||h_j||        ||.|| over the panel's P tokens
    dpanel_l1 / dh_ij = (sqrt(P) / M) h_ij / ||h_j||                      0 where the neuron is silent

It is divided by tokens, as l1 is, so that λ means the same: it equals l1 where a neuron is as active in all
tokens of a panel, and is sqrt(P) times as large where one token alone activates it.

Numerics are those of `pallas_kernels.reference`: the two terms of the gradient of h are added in f32 and
rounded once.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import FFNStats, dense, reference
from pallas_kernels.activations import Rule
from pallas_kernels.common.products import CONTRACT_FIRST, CONTRACT_LAST, multiply
from sparse_lm import SparseFFN, SparseLM
from train.config import TrainConfig
from train.state import Program, build_program

Weights = tuple[jax.Array | None, jax.Array, jax.Array]


def panel_l1(h: jax.Array, panel: int) -> jax.Array:
    """The penalty of h (M, F), () f32, without a gradient of its own.

    Raises:
      ValueError: M is no multiple of ``panel``.
    """
    return math.sqrt(panel) * jnp.sum(_norms(h, panel)) / len(h)


def _norms(h: jax.Array, panel: int) -> jax.Array:
    """(panels, F) f32, of each neuron over each panel."""
    if len(h) % panel:
        raise ValueError(f"panel_l1 needs whole panels of {panel} tokens; got {len(h)} tokens")
    wide = h.astype(jnp.float32).reshape(-1, panel, h.shape[1])
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=1))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def panel_ffn(x: jax.Array, weights: Weights, rule: Rule, panel: int) -> tuple[jax.Array, FFNStats]:
    """The dense layer whose statistics hold the penalty in the place of l1.

    Args:
      x: (M, D).
      weights: w_gate (F, D) or None, w_up and w_down (F, D), rounded to x's type in the call.
      rule: of the activation.
      panel: P, which must divide M.
    """
    return _forward(x, weights, rule, panel)[0]


def _forward(x, weights, rule, panel):
    x, w_gate, w_up, w_down = dense.rounded(x, *weights)
    gate, up = reference.projections(x, w_gate, w_up)
    h, mask = reference.hidden(gate, up, rule)
    stats = dataclasses.replace(FFNStats.of_dense(h, mask), l1=panel_l1(h, panel))
    return (multiply(h, w_down), stats), (x, weights, gate, up)


def _backward(rule, panel, kept, cotangents):
    (x, weights, gate, up), (dy, dstats) = kept, cotangents
    _, w_gate, w_up, w_down = dense.rounded(x, *weights)
    h, mask = reference.hidden(gate, up, rule)
    from_y = multiply(dy, w_down, CONTRACT_LAST, dtype=jnp.float32)
    norms = _norms(h, panel)
    scale = jnp.where(norms > 0, math.sqrt(panel) / len(h) * dstats.l1 / jnp.where(norms > 0, norms, 1), 0)
    dh = (from_y + jnp.repeat(scale, panel, axis=0) * h.astype(jnp.float32)).astype(h.dtype)
    dg, du = reference.pull_back(gate, up, dh, mask, rule)
    inner = [(dg, w_up)] if w_gate is None else [(dg, w_gate), (du, w_up)]
    dx = sum(multiply(z, weight) for z, weight in inner)
    *dw_gate, dw_up = (multiply(z, x, CONTRACT_FIRST, dtype=weights[1].dtype) for z, _ in inner)
    dw_down = multiply(h, dy, CONTRACT_FIRST, dtype=weights[2].dtype)
    return dx, (dw_gate[0] if dw_gate else None, dw_up, dw_down)


panel_ffn.defvjp(_forward, _backward)


class PanelPenaltyFFN(SparseFFN):
    """`SparseFFN` with its weights and its order of tokens, computed by `panel_ffn` whatever its format."""

    def __init__(self, ffn: SparseFFN, panel: int) -> None:
        """Takes over the weights of ``ffn``; ``panel`` is P."""
        self.w_gate, self.w_up, self.w_down = ffn.w_gate, ffn.w_up, ffn.w_down
        self.d_model, self.dtype, self.options = ffn.d_model, ffn.dtype, ffn.options
        self.batch_axes = ffn.batch_axes
        self.panel = panel

    def _apply(self, x: jax.Array) -> tuple[jax.Array, FFNStats]:
        w_gate = None if self.w_gate is None else self.w_gate[...]
        weights = w_gate, self.w_up[...], self.w_down[...]
        tokens = x.astype(self.dtype or x.dtype).reshape(-1, self.d_model)
        y, stats = panel_ffn(tokens, weights, self.options.rule, self.panel)
        return y.reshape(x.shape), stats


def penalised(config: TrainConfig, panel: int) -> Program:
    """The run whose λ weighs the penalty on panels of so many tokens; its parameters are those of any run."""

    def build() -> SparseLM:
        model = SparseLM(config.model, rngs=nnx.Rngs(0))
        assert isinstance(model.blocks.ffn, SparseFFN), "SiLU has no silent neurons"
        model.blocks.ffn = PanelPenaltyFFN(model.blocks.ffn, panel)
        return model

    return dataclasses.replace(build_program(config), graphdef=nnx.split(nnx.eval_shape(build))[0])
