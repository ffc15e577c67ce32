"""What a caller may choose about a sparse feed-forward call, and what the call reports back."""

import dataclasses
import re
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import activations
from pallas_kernels.activations import Activation, Rule
from pallas_kernels.common.groups import Groups, by_group, group_size

Format = Literal["auto", "twell", "hybrid", "panel", "decode", "dense"]
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


class _Layout:
    """What the formats' options share: their name, and a text from which `parse_layout` makes them again."""

    name: ClassVar[Format]

    def __str__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name


@dataclasses.dataclass(frozen=True)
class Dense(_Layout):
    """No format: the layer as XLA compiles it.

    Attributes:
      tokens: P of the panels whose pairs `FFNStats.pairs` counts, as if they had been made; 0 counts none.
    """

    tokens: int = 0
    name: ClassVar[Format] = "dense"

    def __post_init__(self) -> None:
        if self.tokens:
            _check_panel_tokens("Dense", self.tokens)


@dataclasses.dataclass(frozen=True)
class Panel(_Layout):
    """`PanelELL`: tokens that stand together share one list of neurons.

    Attributes:
      tokens: P, consecutive tokens of a panel, a power of two from 16 to 128; fewer where the call has fewer.
      capacity: share of all (panel, neuron) pairs that there is room to keep between forward and backward. A
        call with more active pairs keeps nothing and takes the dense path there; without a gradient to
        compute there is room for all. Below 1 the program asks in the forward and in the backward whether
        there is room: inside a CUDA graph where the driver is of CUDA 12.3 or newer and the call is in no
        loop, else a GPU's host waits for the answer.
      block_tokens: most tokens that a call without a gradient takes at a time, a multiple of 128, which its
        temporary memory follows; None takes all at once, which is faster. Calls of up to 64 panels are not
        cut.
    """

    tokens: int = 128
    capacity: float = 0.25
    block_tokens: int | None = None
    name: ClassVar[Format] = "panel"

    def __post_init__(self) -> None:
        _check_panel_tokens("Panel", self.tokens)
        _check_block_tokens("Panel", self.block_tokens)
        if not 0 < self.capacity <= 1:
            raise ValueError(f"Panel.capacity must be above 0 and at most 1; got {self.capacity}")


@dataclasses.dataclass(frozen=True)
class Hybrid(_Layout):
    """`HybridELL`: rows of non-zeros with a dense backup (paper section 3.3).

    Attributes:
      width: W, non-zeros of a row. A row with more goes to the dense backup.
      backup_rows: B, how many overflowing rows the backup computes at a time; it takes as many rounds as
        there are rows. None picks a bound from the number of tokens.
      tile: T, columns that the gate stage packs together, a power of two of at least 32.
    """

    width: int = 128
    backup_rows: int | None = None
    tile: int = 256
    name: ClassVar[Format] = "hybrid"

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"Hybrid.width must be at least 1; got {self.width}")
        _check_backup_rows("Hybrid", self.backup_rows)
        _check_tile("Hybrid", self.tile)


@dataclasses.dataclass(frozen=True)
class Twell(_Layout):
    """`TwELL`: gates packed tile by tile (paper section 3.1).

    Attributes:
      tile: T, columns of a tile, a power of two of at least 32 (paper: 256).
      compression: C, the ratio T / S of a tile's columns to its packed slots (paper: 8). A tile that holds
        more than S - 1 non-zeros sends its row to the dense backup.
      backup_rows: B, as in `Hybrid`.
    """

    tile: int = 256
    compression: int = 8
    backup_rows: int | None = None
    name: ClassVar[Format] = "twell"

    def __post_init__(self) -> None:
        _check_tile("Twell", self.tile)
        if self.compression < 1 or self.tile % self.compression or self.slots < 2:
            raise ValueError(
                f"Twell.compression must divide tile={self.tile} and leave at least 2 slots a tile; "
                f"got {self.compression}"
            )
        _check_backup_rows("Twell", self.backup_rows)

    @property
    def slots(self) -> int:
        """S, the packed words of a tile: one count and S - 1 non-zeros."""
        return self.tile // self.compression


@dataclasses.dataclass(frozen=True)
class Decode(_Layout):
    """No format: kernels for a few tokens, which read the up and down rows of active neurons alone."""

    name: ClassVar[Format] = "decode"


@dataclasses.dataclass(frozen=True)
class Auto(_Layout):
    """For a few tokens `Decode` (up to 64 on Hopper, elsewhere two); for more the program decides, call by
    call, between `Panel` and `Dense`, but where a decision would take as long as a good part of the layer.

    Attributes:
      tokens: P of its panels.
      block_tokens: as in `Panel`; where the call is dense, a third of it, for there three arrays take the
        room of one.
    """

    tokens: int = 128
    block_tokens: int | None = None
    name: ClassVar[Format] = "auto"

    def __post_init__(self) -> None:
        _check_panel_tokens("Auto", self.tokens)
        _check_block_tokens("Auto", self.block_tokens)


def _check_panel_tokens(owner: str, tokens: int) -> None:
    if not 16 <= tokens <= 128 or tokens & (tokens - 1):
        raise ValueError(f"{owner}.tokens must be a power of two from 16 to 128; got {tokens}")


def _check_block_tokens(owner: str, tokens: int | None) -> None:
    if tokens is not None and (tokens < 128 or tokens % 128):
        raise ValueError(f"{owner}.block_tokens must be a multiple of 128, or None; got {tokens}")


def _check_tile(owner: str, tile: int) -> None:
    if tile < 32 or tile & (tile - 1):
        raise ValueError(f"{owner}.tile must be a power of two of at least 32; got {tile}")


def _check_backup_rows(owner: str, rows: int | None) -> None:
    if rows is not None and rows < 1:
        raise ValueError(f"{owner}.backup_rows must be at least 1; got {rows}")


Layout = Auto | Panel | Hybrid | Twell | Decode | Dense
_LAYOUTS: dict[str, type[Layout]] = {kind.name: kind for kind in get_args(Layout)}


def parse_layout(text: str) -> Layout:
    """The layout that ``str`` of one gives: ``"panel"``, ``"panel(tokens=64, capacity=0.5)"``.

    Raises:
      ValueError: an unknown format, an option that the format does not have, or a value out of its range.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    kind = _LAYOUTS.get(match[1]) if match else None
    if match is None or kind is None:
        raise ValueError(f"FFNOptions.format must be one of {', '.join(_LAYOUTS)}; got {text!r}")
    fields: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(kind)]
    for item in filter(None, (item.strip() for item in (match[2] or "").split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise ValueError(f"format {kind.name!r} {has}; got {item!r} in {text!r}")
        try:
            fields[name] = None if value == "None" else float(value) if name == "capacity" else int(value)
        except ValueError:
            raise ValueError(f"{kind.__name__}.{name} must be a number; got {value!r} in {text!r}") from None
    return kind(**fields)


@dataclasses.dataclass(frozen=True)
class FFNOptions:
    """How a call computes its result, which changes no result but for how weight gradients are rounded;
    and the layer's activation, which does.

    Attributes:
      format: how the gate activations are stored between the projections: `Panel`, `Hybrid`, `Twell`,
        `Decode`, `Dense`, `Auto`, or such a one's name for its defaults, also with options as in
        ``"panel(tokens=64)"``. ``"auto"`` is ``"decode"`` for a few tokens (up to 64 on Hopper,
        elsewhere two), and ``"panel"`` for a forward of 1,024 to 8,192 on Hopper; from 2,048 on it decides
        inside the program, call by call, between ``"panel"`` and ``"dense"``; else it is ``"dense"``. A
        format asked for by name that cannot run a call raises the reason. `dispatch.explain` tells what would
        run.
      activation: ``"relu"``, ``"relu2"``, `Threshold` or ``"drelu"`` (`activations`).
      backend: what runs the call. ``"auto"`` is the first that can of those a format has: XLA for
        ``"dense"``, else Mosaic GPU for the gate on Hopper, and Triton. ``"interpret"`` runs Triton kernels'
        own code slowly on any device, for tests.
      weight_gradients: what the weights' gradients, summed over tokens in f32, are rounded to. JAX gives a
        gradient its argument's type, and float32 weights beside a 16-bit x are master weights, rounded to x's
        type for every product. ``"auto"``: to the weights' own type, so that those of master weights are not
        rounded and add up in f32 over micro-batches and devices. ``"input"``: to x's type first, as if the
        caller had cast the weights: half the bytes to write, and to add up over devices (XLA may leave that
        rounding out). ``"float32"``: as ``"auto"``, and weights of another type raise.

    Raises:
      ValueError: an unknown name, or an option out of its range or of another format.
    """

    format: Format | Layout | str = "auto"
    activation: Activation = "relu"
    backend: Backend = "auto"
    weight_gradients: WeightGradients = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.format, str | Layout):
            raise ValueError(
                f"FFNOptions.format must be one of {', '.join(_LAYOUTS)}, or such a one's options as in "
                f"Panel(tokens=64); got {self.format!r}"
            )
        if isinstance(self.format, str):
            parse_layout(self.format)
        activations.rule(self.activation)
        for name, literal in (("backend", Backend), ("weight_gradients", WeightGradients)):
            value, choices = getattr(self, name), get_args(literal)
            if value not in choices:
                raise ValueError(f"FFNOptions.{name} must be one of {', '.join(choices)}; got {value!r}")

    @property
    def layout(self) -> Layout:
        """The format with all its options."""
        return parse_layout(self.format) if isinstance(self.format, str) else self.format

    def with_format(self, name: Format, backend: Backend) -> "FFNOptions":
        """The same on another backend and of another format; of the same format, with its options."""
        format = self.format if self.layout.name == name else name
        return dataclasses.replace(self, format=format, backend=backend)

    @property
    def rule(self) -> Rule:
        """What the activation means for the kernels."""
        return activations.rule(self.activation)


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
      pairs: () int32, (panel, neuron) pairs with an active token, which is what PanelELL's time follows; 0
        where no panels were made or counted (`Dense`).
      dense_tokens: () int32, tokens that were computed densely, whatever the reason: the format, a lack of
        room, or `Auto`'s choice.

    Where devices split the neurons of one call, ``max_nnz`` is the sum of each part's most, which no token
    exceeds, and ``overflow_rows`` and ``dense_tokens`` are those of the part that has most of them.
    """

    l1: jax.Array
    l0: jax.Array
    neuron_hits: jax.Array
    max_nnz: jax.Array
    overflow_rows: jax.Array
    pairs: jax.Array
    dense_tokens: jax.Array

    @classmethod
    def of_dense(cls, h: jax.Array, mask: jax.Array, panel: int = 0) -> "FFNStats":
        """Of a call that was computed densely: its hidden activations (M, F) and active neurons (M, F).

        With ``panel``, pairs are counted for panels of so many tokens, in the pass that counts the hits.
        """
        tokens = jnp.asarray(h.shape[0], jnp.int32)
        count = jnp.maximum(tokens, 1).astype(jnp.float32)
        zero = jnp.zeros((), jnp.int32)
        panels = _by_panel(mask, panel)
        in_panel = jnp.sum(panels, axis=1, dtype=jnp.int32)
        hits = jnp.sum(in_panel, axis=0, dtype=jnp.int32)
        return cls(
            l1=jnp.sum(jnp.abs(h), dtype=jnp.float32) / count,
            l0=jnp.sum(hits, dtype=jnp.float32) / count,
            neuron_hits=hits,
            max_nnz=jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32), initial=0),
            overflow_rows=zero,
            pairs=jnp.sum(in_panel > 0, dtype=jnp.int32) if panel else zero,
            dense_tokens=tokens,
        )

    @classmethod
    def of_rows(
        cls,
        l1: jax.Array,
        nnz: jax.Array,
        overflows: jax.Array,
        neuron_hits: jax.Array,
        groups: Groups = None,
    ) -> "FFNStats":
        """From each token's sum of |h| (M,) f32, active gates (M,) int32 and whether it overflowed (M,) bool;
        ``neuron_hits`` as the field, with ``groups`` in front where there are such."""
        size = group_size(l1.shape[0], groups)
        l1, nnz, overflows = (by_group(rows, groups) for rows in (l1, nnz, overflows))
        dense = jnp.sum(overflows, axis=-1, dtype=jnp.int32)
        return cls(
            l1=jnp.sum(l1, axis=-1) / size,
            l0=jnp.sum(nnz, axis=-1, dtype=jnp.float32) / size,
            neuron_hits=neuron_hits,
            max_nnz=jnp.max(nnz, axis=-1),
            overflow_rows=dense,
            pairs=jnp.zeros_like(dense),
            dense_tokens=dense,
        )

    @classmethod
    def merged(cls, parts: "FFNStats") -> "FFNStats":
        """The statistics of a whole from those of equal parts, stacked on axis 0."""
        return cls(**{name: _OF_PARTS[how[0]](getattr(parts, name)) for name, how in _REDUCTIONS.items()})

    def all_reduce(
        self, axis_name: str | tuple[str, ...], neuron_axes: str | tuple[str, ...] = ()
    ) -> "FFNStats":
        """The statistics of a whole call, inside ``shard_map`` or ``pmap``, from those of equal parts.

        Args:
          axis_name: the mapped axes that split the tokens.
          neuron_axes: those that split the neurons; ``neuron_hits`` stays split over them.
        """
        reduced = {}
        for name, (over_tokens, over_neurons) in _REDUCTIONS.items():
            reduced[name] = getattr(self, name)
            for reduction, axes in ((over_neurons, neuron_axes), (over_tokens, axis_name)):
                if axes and reduction is not None:
                    reduced[name] = _OVER_DEVICES[reduction](reduced[name], axes)
        return FFNStats(**reduced)

    @property
    def dead_fraction(self) -> jax.Array:
        """() f32, share of neurons that no token of the call activated."""
        return jnp.mean(self.neuron_hits == 0, dtype=jnp.float32)


def _by_panel(mask: jax.Array, panel: int) -> jax.Array:
    """(n, panel, F) bool: (M, F) in panels, the last one filled up; in one of all tokens if panel is 0."""
    if not panel:
        return mask[None]
    count = -(-len(mask) // panel)
    padded = jnp.pad(mask, ((0, count * panel - len(mask)), (0, 0)))
    return padded.reshape(count, panel, mask.shape[1])


_REDUCTIONS: dict[str, tuple[str, str | None]] = {
    "l1": ("mean", "sum"),
    "l0": ("mean", "sum"),
    "neuron_hits": ("sum", None),  # each part counts other neurons
    "max_nnz": ("max", "sum"),
    "overflow_rows": ("sum", "max"),
    "pairs": ("sum", "sum"),
    "dense_tokens": ("sum", "max"),
}
"""How each statistic is put together from those of equal parts: of the tokens, and of the neurons."""


def _pmax(value: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    return jax.lax.pmax(jax.lax.stop_gradient(value), axes)  # pmax has no derivative, and a count needs none


_OVER_DEVICES = {"mean": jax.lax.pmean, "sum": jax.lax.psum, "max": _pmax}
_OF_PARTS = {
    "mean": lambda parts: parts.mean(0),
    "sum": lambda parts: parts.sum(0),
    "max": lambda parts: parts.max(0),
}
