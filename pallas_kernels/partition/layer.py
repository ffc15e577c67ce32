"""The layer on the arrays of one device: infer, forward and backward by themselves, for tokens in any
shape."""

import dataclasses
from typing import Any

import jax

from pallas_kernels import differentiation, dispatch
from pallas_kernels.differentiation import LayerCall
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights

Arrays = tuple[jax.Array, ...]
"""x (..., D), w_gate (F, D) if there is one, w_up and w_down (F, D); or their cotangents."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call under its options. What runs it depends on how many tokens and neurons the device has."""

    options: FFNOptions

    def infer(self, arguments: Arrays) -> tuple[jax.Array, FFNStats]:
        """y (..., D) and the statistics."""
        flat, call = self._prepared(arguments)
        y, stats = differentiation.infer(flat, call)
        return y.reshape(arguments[0].shape), stats

    def forward(self, arguments: Arrays) -> tuple[tuple[jax.Array, FFNStats], Any]:
        """The same, and what ``backward`` needs beside the arguments."""
        flat, call = self._prepared(arguments)
        (y, stats), kept = differentiation.forward(flat, call)
        return (y.reshape(arguments[0].shape), stats), kept

    def backward(
        self, arguments: Arrays, kept: Any, dy: jax.Array, dl1: jax.Array, *, weights: bool
    ) -> Arrays:
        """The cotangents of x and, if they are wanted, the weights, each in its own type."""
        flat, call = self._prepared(arguments)
        dy = dy.reshape(flat[0].shape)
        dx, *gradients = differentiation.backward(flat, kept, dy, dl1, call, weights=weights)
        wanted = [gradient for gradient in gradients if gradient is not None] if weights else []
        return dx.reshape(arguments[0].shape), *wanted

    def _prepared(self, arguments: Arrays) -> tuple[Weights, LayerCall]:
        x, *w_gate, w_up, w_down = arguments
        tokens = x.reshape(-1, x.shape[-1])
        choice = dispatch.choose(self.options, dispatch.Call.of(tokens, w_up))
        flat = tokens, w_gate[0] if w_gate else None, w_up, w_down
        return flat, LayerCall(self.options, choice.layout.name, choice.backend)
