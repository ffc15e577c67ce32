"""What a caller may choose about a sparse feed-forward call, and what the call reports back."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Format = Literal["auto", "twell", "hybrid", "panel", "dense"]
Backend = Literal["auto", "triton", "mosaic_gpu", "xla", "interpret"]
WeightGradients = Literal["auto", "input", "float32"]

RESIDUAL_NAMES = (
    "sparse_ffn_lists",
    "sparse_ffn_gate",
    "sparse_ffn_up",
    "sparse_ffn_indices",
    "sparse_ffn_nnz",
)
"""Names of all that the sparse layers keep between forward and backward: lists and values of `PanelELL`,
triples of `HybridELL`. For ``jax.checkpoint_policies.save_only_these_names``."""


@dataclasses.dataclass(frozen=True)
class FFNOptions:
    """Choices that change how a result is computed, never what it is; and how weight gradients are rounded.

    Attributes:
      format: how the gate activations are stored between the projections. ``"auto"`` decides inside the
        program, call by call, between ``"panel"`` and ``"dense"``, and is ``"dense"`` where that cannot be; a
        format asked for by name that cannot run a call raises the reason. `dispatch.explain` tells
        what would run.
      backend: what runs the call. ``"auto"`` is the first that can of those a format has: XLA for
        ``"dense"``, else Mosaic GPU for the gate on Hopper, and Triton. ``"interpret"`` runs Triton kernels'
        own code slowly on any device, for tests.
      tile: T, columns in a TwELL tile (paper section 3.1: 256).
      compression: C, the ratio T / S of a tile's columns to its packed slots (paper: 8). A tile that holds
        more than S - 1 non-zeros sends its row to the dense backup.
      width: W, non-zeros of a HybridELL row (paper section 3.3). A row with more goes to the dense backup.
      backup_rows: B, how many overflowing rows the dense backup computes at a time; it takes as many rounds
        as there are rows. ``None`` picks a bound from the number of tokens.
      panel: P, consecutive tokens that share one list of neurons in PanelELL; fewer where the call has fewer.
      capacity: share of all (panel, neuron) pairs that PanelELL has room to keep between forward and
        backward. A call with more active pairs keeps nothing and takes the dense path there; without a
        gradient to compute there is room for all.
      weight_gradients: what the weights' gradients, summed over tokens in f32, are rounded to. JAX gives a
        gradient its argument's type, and float32 weights beside a 16-bit x are master weights, rounded to x's
        type for every product. ``"auto"``: to the weights' own type, so that those of master weights are not
        rounded and add up in f32 over micro-batches and devices. ``"input"``: to x's type first, as if the
        caller had cast the weights: half the bytes to write, and to add up over devices (XLA may leave that
        rounding out). ``"float32"``: as ``"auto"``, and weights of another type raise.

    Raises:
      ValueError: a field outside its range, with the law in the message.
    """

    format: Format = "auto"
    backend: Backend = "auto"
    tile: int = 256
    compression: int = 8
    width: int = 128
    backup_rows: int | None = None
    panel: int = 128
    capacity: float = 0.25
    weight_gradients: WeightGradients = "auto"

    def __post_init__(self) -> None:
        for name, literal in (
            ("format", Format),
            ("backend", Backend),
            ("weight_gradients", WeightGradients),
        ):
            value, choices = getattr(self, name), get_args(literal)
            if value not in choices:
                raise ValueError(f"FFNOptions.{name} must be one of {', '.join(choices)}; got {value!r}")
        if self.tile < 32 or self.tile & (self.tile - 1):
            raise ValueError(f"FFNOptions.tile must be a power of two of at least 32; got {self.tile}")
        if self.compression < 1 or self.tile % self.compression or self.slots < 2:
            raise ValueError(
                f"FFNOptions.compression must divide tile={self.tile} and leave at least 2 slots a tile; "
                f"got {self.compression}"
            )
        if self.width < 1:
            raise ValueError(f"FFNOptions.width must be at least 1; got {self.width}")
        if self.backup_rows is not None and self.backup_rows < 1:
            raise ValueError(f"FFNOptions.backup_rows must be at least 1; got {self.backup_rows}")
        if not 16 <= self.panel <= 128 or self.panel & (self.panel - 1):
            raise ValueError(f"FFNOptions.panel must be a power of two from 16 to 128; got {self.panel}")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"FFNOptions.capacity must be above 0 and at most 1; got {self.capacity}")

    @property
    def slots(self) -> int:
        """S, the packed words of a TwELL tile: one count and S - 1 non-zeros."""
        return self.tile // self.compression


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FFNStats:
    """What every path reports of a call, at no second pass over dense data.

    Attributes:
      l1: () f32, mean over tokens of ``sum_j |h_j|``; differentiable, so that a training loss may add it.
      l0: () f32, mean over tokens of the number of active gates.
      neuron_hits: (F,) int32, for how many tokens each neuron was active.
      max_nnz: () int32, the most active neurons of any token.
      overflow_rows: () int32, tokens that did not fit the compact format and were computed densely.
    """

    l1: jax.Array
    l0: jax.Array
    neuron_hits: jax.Array
    max_nnz: jax.Array
    overflow_rows: jax.Array

    def all_reduce(self, axis_name: str | tuple[str, ...]) -> "FFNStats":
        """The statistics of the whole batch, inside ``shard_map`` or ``pmap``, from equal local batches."""
        return FFNStats(
            l1=jax.lax.pmean(self.l1, axis_name),
            l0=jax.lax.pmean(self.l0, axis_name),
            neuron_hits=jax.lax.psum(self.neuron_hits, axis_name),
            max_nnz=jax.lax.pmax(jax.lax.stop_gradient(self.max_nnz), axis_name),
            overflow_rows=jax.lax.psum(self.overflow_rows, axis_name),
        )

    @property
    def dead_fraction(self) -> jax.Array:
        """() f32, share of neurons that no token of the call activated."""
        return jnp.mean(self.neuron_hits == 0, dtype=jnp.float32)
