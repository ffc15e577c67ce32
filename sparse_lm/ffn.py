"""The drop-in module: a feed-forward layer whose hidden activations an L1 term makes sparse."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.spmd import get_var_pspec
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jax.typing import DTypeLike

from pallas_kernels import FFNOptions, FFNStats, sparse_ffn, sparse_mlp
from pallas_kernels.ffn import ffn_on_mesh
from sparse_lm.order import Permutation

_DTYPES = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32)))


class SparseFFN(nnx.Module):
    """A Llama-style feed-forward layer, exact at any sparsity (arXiv 2603.23198, section 2).

    ``y = (act(x Wg^T) * (x Wu^T)) Wd`` if gated, ``y = act(x Wu^T) Wd`` if not, ``act`` being
    ``FFNOptions.activation``, ReLU unless another is asked for. Parameters, all
    neuron-major ``(F, D)``: ``w_gate`` (gated only), ``w_up``, ``w_down``. They are kept in ``param_dtype``
    and rounded to ``dtype`` in the call. Their gradients are summed in f32; those of f32 parameters are never
    rounded to ``dtype``, unless ``FFNOptions.weight_gradients`` asks for it.

    Where several devices share the arrays, each computes its own tokens and neurons (`docs/meshes.md`).
    Under an ambient mesh with axes of type Auto (``jax.set_mesh``), tokens are split over ``batch_axes``,
    and neurons over the axes that the weights' metadata names for F. Elsewhere the call splits as its arrays
    are. Inside ``shard_map`` or ``pmap`` it is local already, and so are its statistics
    (``FFNStats.all_reduce`` combines them).

    With an ``order`` the layer takes its tokens in that order, and gives ``y`` in their own. Alike tokens
    side by side activate fewer neurons together, which is what a panel's time depends on; the result is the
    same up to the order of sums. One order serves all layers of a forward (`sparse_lm.order`):

        order = by_id(tokens)
        y, stats = ffn(x, order=order)
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        rngs: nnx.Rngs,
        gated: bool = True,
        dtype: DTypeLike | None = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        init_std: float = 0.02,
        kernel_init: nnx.Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
        options: FFNOptions | None = None,
        use_bias: bool = False,
        batch_axes: str | tuple[str, ...] | None = None,
    ) -> None:
        """Draws the weights from ``rngs.params()``: with ``kernel_init``, or normal with standard deviation
        ``init_std``.

        Args:
          d_model: D, model width.
          d_ff: F, hidden neurons.
          rngs: source of the initial weights.
          gated: with a gate projection, or the plain two-matrix form.
          dtype: compute type: bfloat16, float16 or float32; None is the type of the input.
          param_dtype: type of the master weights.
          init_std: standard deviation of the initial weights.
          kernel_init: instead of ``init_std``, what draws each weight (F, D). One wrapped by
            ``nnx.with_partitioning(init, ("model", None))`` also says how all three are split.
          kernel_metadata: metadata of the three parameters, as `nnx.Linear` takes it: with
            ``{"out_sharding": ("model", None)}`` their neurons are split over the mesh axis ``"model"``.
          options: how the kernels run; the default lets them choose.
          use_bias: must be false; see Raises.
          batch_axes: axes of the ambient mesh that the first axis of ``x`` is split over; ``None`` means, on
            axes of type Auto, all that do not split the neurons, and on Explicit ones, those that it comes
            split over.

        Raises:
          ValueError: a size under 1, or ``use_bias=True``.
          TypeError: a ``dtype`` that the kernels do not have, or ``options`` that are no FFNOptions.
        """
        if d_model < 1 or d_ff < 1:
            raise ValueError(f"SparseFFN needs d_model and d_ff of at least 1; got {d_model} and {d_ff}")
        if use_bias:
            raise ValueError(
                "SparseFFN takes no biases: its kernels compute a neuron from its weight row alone and skip "
                "it where its gate is silent, and a positive gate bias would keep the neuron active for "
                "every token, which is what the L1 term works against; use use_bias=False"
            )
        if dtype is not None and jnp.dtype(dtype) not in _DTYPES:
            raise TypeError(
                "SparseFFN computes in bfloat16, float16 or float32, or with dtype=None in its input's type; "
                f"got dtype {jnp.dtype(dtype)}"
            )
        if options is not None and not isinstance(options, FFNOptions):
            raise TypeError(
                "options must be FFNOptions, such as FFNOptions(format='panel'); got "
                f"{type(options).__name__}"
            )
        init = nnx.initializers.normal(init_std) if kernel_init is None else kernel_init

        def draw() -> nnx.Param:
            return nnx.Param(init(rngs.params(), (d_ff, d_model), param_dtype), **(kernel_metadata or {}))

        self.w_gate = draw() if gated else None
        self.w_up = draw()
        self.w_down = draw()
        self.d_model = d_model
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.options = FFNOptions() if options is None else options
        self.batch_axes = (batch_axes,) if isinstance(batch_axes, str) else batch_axes

    def __call__(self, x: jax.Array, *, order: Permutation | None = None) -> tuple[jax.Array, FFNStats]:
        """Applies the layer.

        Args:
          x: (..., D), cast to ``dtype`` if one was given.
          order: of the tokens (...), for the kernels. Under an ambient mesh each device's part of it must be
            an order of that device's tokens: `over_local_tokens` makes one from a function of local arrays.

        Returns:
          ``y`` (..., D) in ``dtype`` and the call's statistics.

        Raises:
          TypeError: ``x`` is no array.
          ValueError: ``x`` has another width, ``order`` is of other tokens, or ``batch_axes`` or the weights'
            metadata name what is no axis of the ambient mesh.
        """
        if not hasattr(x, "shape"):
            raise TypeError(f"SparseFFN expected x to be an array; got {type(x).__name__}")
        if x.ndim < 1 or x.shape[-1] != self.d_model:
            raise ValueError(f"SparseFFN expected x of shape (..., {self.d_model}); got {x.shape}")
        if order is None:
            return self._apply(x)
        order.check(x)
        mesh = jax.sharding.get_abstract_mesh()
        batch_axes = None if mesh.empty else self._token_axes(mesh)
        gathered = over_local_tokens(lambda x, order: order.gather(x), x, order, batch_axes=batch_axes)
        y, stats = self._apply(gathered)
        return over_local_tokens(lambda y, order: order.scatter(y), y, order, batch_axes=batch_axes), stats

    def _apply(self, x: jax.Array) -> tuple[jax.Array, FFNStats]:
        parameters = self._parameters
        # The layer itself rounds f32 weights, and so can give their gradients in f32.
        x = x.astype(self.dtype or x.dtype)
        weights = [p[...] if p.dtype == jnp.float32 else p[...].astype(x.dtype) for p in parameters]
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.manual_axes:
            return self._call(x, *weights)
        _check_names(mesh, self.batch_axes or (), "SparseFFN.batch_axes")
        if AxisType.Explicit in mesh.axis_types:  # arrays carry how they are split in their types
            if self.batch_axes is not None and x.ndim > 1:
                x = jax.sharding.reshard(x, PartitionSpec(self.batch_axes))
            return self._call(x, *weights)
        specs = [_partition_spec(mesh, parameter) for parameter in parameters]
        split = PartitionSpec(self._token_axes(mesh)) if x.ndim > 1 else PartitionSpec()
        return ffn_on_mesh(mesh, (x, split), *zip(weights, specs, strict=True), options=self.options)

    @property
    def _parameters(self) -> list[nnx.Param]:
        return [p for p in (self.w_gate, self.w_up, self.w_down) if p is not None]

    def _token_axes(self, mesh: AbstractMesh) -> tuple[str, ...]:
        """Axes (Auto) of a mesh that split the tokens: those asked for, or all that split no neurons."""
        if self.batch_axes is not None:
            return self.batch_axes
        specs = [_partition_spec(mesh, parameter) for parameter in self._parameters]
        neurons = {axis for spec in specs for axis in _axes(spec[0])}
        return tuple(axis for axis in mesh.axis_names if axis not in neurons)

    def _call(self, x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, FFNStats]:
        kernel = sparse_mlp if self.w_gate is None else sparse_ffn
        return kernel(x, *weights, options=self.options)


def over_local_tokens(
    function: Callable[..., Any],
    *arrays: Any,
    whole: tuple[Any, ...] = (),
    batch_axes: tuple[str, ...] | None = None,
) -> Any:
    """``function`` of each device's own tokens under an ambient mesh: an order of them, for example.

    Without a mesh, and where arrays are local already, it is just the call.

    Args:
      function: of arrays whose first axis is the batch, and of ``whole``, to a tree of such arrays.
      arrays: all of the same first axis, or trees of them.
      whole: arrays that every device has all of, or trees of them.
      batch_axes: axes of type Auto that the batch is split over, all by default. Arrays of a mesh of type
        Explicit say by themselves how they are split, and the first decides.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = batch_split(mesh, jax.tree.leaves(arrays)[0], batch_axes)
    if split is None:
        return function(*arrays, *whole)
    if AxisType.Explicit in mesh.axis_types:
        arrays, whole = jax.sharding.reshard((arrays, whole), (split, PartitionSpec()))
    specs = (split,) * len(arrays) + (PartitionSpec(),) * len(whole)
    return jax.shard_map(function, in_specs=specs, out_specs=split, check_vma=False)(*arrays, *whole)


def local_token_count(shape: tuple[int, ...]) -> int:
    """How many tokens of that shape (...) `over_local_tokens` gives one device, on axes of type Auto."""
    mesh = jax.sharding.get_abstract_mesh()
    split = batch_split(mesh, jax.ShapeDtypeStruct(shape, jnp.int32), None)
    devices = 1 if split is None else math.prod(mesh.shape[axis] for entry in split for axis in _axes(entry))
    return math.prod(shape) // devices


def batch_split(
    mesh: AbstractMesh, array: jax.Array | jax.ShapeDtypeStruct, batch_axes: tuple[str, ...] | None
) -> PartitionSpec | None:
    """How the first axis is split; not at all where the devices cannot share it evenly."""
    if mesh.empty or mesh.manual_axes:
        return None
    _check_names(mesh, batch_axes or (), "SparseFFN.batch_axes")
    axes = mesh.axis_names if batch_axes is None else batch_axes
    if AxisType.Explicit in mesh.axis_types:
        spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else PartitionSpec()
        axes = _axes(spec[0]) if len(spec) else ()
    devices = math.prod(mesh.shape[axis] for axis in axes)
    shared = array.ndim > 0 and array.shape[0] % devices == 0
    return PartitionSpec(axes) if shared and axes else PartitionSpec()


def _partition_spec(mesh: AbstractMesh, parameter: nnx.Param) -> PartitionSpec:
    """How metadata says that a weight (F, D) is split; whole if it says nothing."""
    spec = get_var_pspec(parameter) or PartitionSpec()
    # A stack of layers may have put axes in front, and its scan taken them from the array alone.
    spec = PartitionSpec(*((None, None, *spec)[-2:] if len(spec) > 1 else (*spec, None, None)[:2]))
    names = [axis for entry in spec for axis in _axes(entry)]
    _check_names(mesh, names, "the sharding metadata of SparseFFN's weights")
    return spec


def _axes(entry: Any) -> tuple[str, ...]:
    """Of one dimension in a partition spec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _check_names(mesh: AbstractMesh, names: Any, what: str) -> None:
    unknown = [name for name in names if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"{what} must name axes of the ambient mesh, which has {', '.join(mesh.axis_names)}; "
            f"got {', '.join(map(str, unknown))}"
        )
