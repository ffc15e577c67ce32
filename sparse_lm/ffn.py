"""The drop-in module: a feed-forward layer whose hidden activations an L1 term makes sparse."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels import FFNOptions, FFNStats, sparse_ffn, sparse_mlp


class SparseFFN(nnx.Module):
    """A Llama-style feed-forward layer, exact at any sparsity (arXiv 2603.23198, section 2).

    ``y = (act(x Wg^T) * (x Wu^T)) Wd`` if gated, ``y = act(x Wu^T) Wd`` if not, ``act`` being
    ``FFNOptions.activation``, ReLU unless another is asked for. Parameters, all
    neuron-major ``(F, D)``: ``w_gate`` (gated only), ``w_up``, ``w_down``. They are kept in ``param_dtype``
    and rounded to ``dtype`` in the call. Their gradients are summed in f32; those of f32 parameters are never
    rounded to ``dtype``, unless ``FFNOptions.weight_gradients`` asks for it.

    The kernels see local arrays. Under an ambient mesh (``jax.set_mesh``) the call runs in a
    ``jax.shard_map`` over ``batch_axes`` and returns the statistics of the whole batch; inside ``shard_map``
    or ``pmap`` it is local already, and so are its statistics (``FFNStats.all_reduce`` combines them).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        rngs: nnx.Rngs,
        gated: bool = True,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        init_std: float = 0.02,
        options: FFNOptions | None = None,
        use_bias: bool = False,
        batch_axes: str | tuple[str, ...] | None = None,
    ) -> None:
        """Draws the weights from ``rngs.params()``, normal with standard deviation ``init_std``.

        Args:
          d_model: D, model width.
          d_ff: F, hidden neurons.
          rngs: source of the initial weights.
          gated: with a gate projection, or the plain two-matrix form.
          dtype: compute type: bfloat16, float16 or float32.
          param_dtype: type of the master weights.
          init_std: standard deviation of the initial weights.
          options: how the kernels run; the default lets them choose.
          use_bias: must be false; see Raises.
          batch_axes: axes of the ambient mesh that the first axis of ``x`` is split over; ``None`` means all.

        Raises:
          ValueError: a size under 1, or ``use_bias=True``.
        """
        if d_model < 1 or d_ff < 1:
            raise ValueError(f"SparseFFN needs d_model and d_ff of at least 1; got {d_model} and {d_ff}")
        if use_bias:
            raise ValueError(
                "SparseFFN takes no biases: its kernels compute a neuron from its weight row alone and skip "
                "it where its gate is silent, and a positive gate bias would keep the neuron active for "
                "every token, which is what the L1 term works against; use use_bias=False"
            )
        init = nnx.initializers.normal(init_std)

        def draw() -> nnx.Param:
            return nnx.Param(init(rngs.params(), (d_ff, d_model), param_dtype))

        self.w_gate = draw() if gated else None
        self.w_up = draw()
        self.w_down = draw()
        self.d_model = d_model
        self.dtype = jnp.dtype(dtype)
        self.options = FFNOptions() if options is None else options
        self.batch_axes = (batch_axes,) if isinstance(batch_axes, str) else batch_axes

    def __call__(self, x: jax.Array) -> tuple[jax.Array, FFNStats]:
        """Applies the layer.

        Args:
          x: (..., D), cast to ``dtype``.

        Returns:
          ``y`` (..., D) in ``dtype`` and the call's statistics.

        Raises:
          ValueError: ``x`` has another width, or a name in ``batch_axes`` is no axis of the ambient mesh.
        """
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"SparseFFN expected x of shape (..., {self.d_model}); got {x.shape}")
        parameters = [p for p in (self.w_gate, self.w_up, self.w_down) if p is not None]
        # The layer itself rounds f32 weights, and so can give their gradients in f32.
        weights = [p[...] if p.dtype == jnp.float32 else p[...].astype(self.dtype) for p in parameters]
        x = x.astype(self.dtype)
        axes = _split_axes(self.batch_axes)
        return self._local(x, *weights) if not axes else self._sharded(axes, x, weights)

    def _local(self, x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, FFNStats]:
        kernel = sparse_mlp if self.w_gate is None else sparse_ffn
        return kernel(x, *weights, options=self.options)

    def _sharded(
        self, axes: tuple[str, ...], x: jax.Array, weights: list[jax.Array]
    ) -> tuple[jax.Array, FFNStats]:
        mesh = jax.sharding.get_abstract_mesh()
        # A batch that the devices cannot share evenly is computed whole by each of them.
        shared = x.ndim > 1 and x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
        split = PartitionSpec(axes) if shared else PartitionSpec()

        def local(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, FFNStats]:
            y, stats = self._local(x, *weights)
            return y, stats.all_reduce(axes) if shared else stats

        if AxisType.Explicit in mesh.axis_types:
            # Arrays of an explicit mesh carry their sharding in their type, and shard_map will not move them.
            x = jax.sharding.reshard(x, split)
            weights = [jax.sharding.reshard(weight, PartitionSpec()) for weight in weights]
        # Kernels do not declare over which axes their outputs vary, so that check has nothing to read.
        return jax.shard_map(
            local,
            in_specs=(split, *(PartitionSpec() for _ in weights)),
            out_specs=(split, PartitionSpec()),
            check_vma=False,
        )(x, *weights)


def _split_axes(batch_axes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of the ambient mesh to split the batch over; none without a mesh or where arrays are local."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return ()
    axes = mesh.axis_names if batch_axes is None else batch_axes
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(
            "SparseFFN.batch_axes must name axes of the ambient mesh, which has "
            f"{', '.join(mesh.axis_names)}; got {', '.join(unknown)}"
        )
    return axes if math.prod(mesh.shape[axis] for axis in axes) > 1 else ()
