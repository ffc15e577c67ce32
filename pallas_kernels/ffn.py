"""The two public calls: they check their arguments, choose a path and shape the tokens for it."""

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import batching, dense, dispatch, partition
from pallas_kernels.checks import check_ffn_arguments
from pallas_kernels.common import varying_axes
from pallas_kernels.options import FFNOptions, FFNStats
from pallas_kernels.reference import Weights


def sparse_ffn(
    x: Float[Array, "*tokens D"],
    w_gate: Float[Array, "F D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    *,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
) -> tuple[Float[Array, "*tokens D"], FFNStats]:
    """Gated sparse feed-forward layer: ``h = a(x Wg^T) * (x Wu^T)``, ``y = h Wd`` (paper section 2).

    Args:
      x: (..., D) tokens in any leading shape; bf16, f16 or f32.
      w_gate: (F, D), neuron-major, of the same type as x; or f32 master weights beside a 16-bit x, which are
        rounded to x's type and get the gradients that ``options.weight_gradients`` describes.
      w_up: (F, D), as w_gate.
      w_down: (F, D), as w_gate: a Hugging Face ``down_proj.weight`` is (D, F) and wants ``.T``.
      options: the activation a, and how the call runs; the result does not depend on the latter, but for how
        weight gradients are rounded.

    Returns:
      y (..., D) in x's type, and the call's FFNStats over all tokens. Differentiable in every array, through
      y and through ``stats.l1``, once and in reverse mode: x's gradient has x's type, and a weight's the
      weight's. In float16 the L1 gradient of one activation is λ / M, which is under the least float16 number
      (6e-8) in every usual training: scale the loss, as float16 training does.

    Raises:
      ValueError, TypeError: arguments that do not fit, or options that cannot run here.
    """
    return _layer(x, w_gate, w_up, w_down, options)


def sparse_mlp(
    x: Float[Array, "*tokens D"],
    w_up: Float[Array, "F D"],
    w_down: Float[Array, "F D"],
    *,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
) -> tuple[Float[Array, "*tokens D"], FFNStats]:
    """Non-gated sparse feed-forward layer: ``h = a(x Wu^T)``, ``y = h Wd``; otherwise as `sparse_ffn`."""
    return _layer(x, None, w_up, w_down, options)


def _layer(
    x: jax.Array, w_gate: jax.Array | None, w_up: jax.Array, w_down: jax.Array, options: FFNOptions
) -> tuple[jax.Array, FFNStats]:
    check_ffn_arguments(x, w_gate, w_up, w_down, options)
    weights = (w_up, w_down) if w_gate is None else (w_gate, w_up, w_down)
    if (shared := partition.ffn(x, *weights, options=options)) is not None:
        return shared
    tokens = x.reshape(-1, x.shape[-1])
    arguments: Weights = (tokens, w_gate, w_up, w_down)
    if options.weight_gradients == "input":
        arguments = dense.rounded(*arguments)
    # Out here, so that the transpose of a weight's cast adds its gradient up over the axes.
    arguments = varying_axes.vary_alike(*arguments)
    y, stats = batching.apply(arguments, options)
    return y.reshape(x.shape), stats


def path(
    x: jax.Array,
    w_up: jax.Array,
    options: FFNOptions = FFNOptions(),  # noqa: B008 - frozen
) -> dispatch.Choice | None:
    """What `sparse_ffn` or `sparse_mlp` runs for x (M, D) and weights like w_up (F, D), all of one type.

    None where devices share the call, each of which chooses for its own part.

    Raises:
      RequestError: options that cannot run here.
    """
    return None if partition.is_shared(x, w_up) else dispatch.choose(options, dispatch.Call.of(x, w_up))


def ffn_on_mesh(
    mesh: AbstractMesh,
    x: tuple[jax.Array, PartitionSpec],
    *weights: tuple[jax.Array, PartitionSpec],
    options: FFNOptions,
) -> tuple[jax.Array, FFNStats]:
    """`sparse_ffn`, or of two weights `sparse_mlp`, split over a mesh as partition specs say.

    Each array stands beside its spec: axes of x's leading dimensions split the tokens, others of the weights'
    F the neurons, and what remains of a weight's spec is how it is stored.
    """
    w_gate, w_up, w_down = (None, *weights) if len(weights) == 2 else weights
    check_ffn_arguments(x[0], None if w_gate is None else w_gate[0], w_up[0], w_down[0], options)
    return partition.ffn_on_mesh(mesh, x, *weights, options=options)
