"""Finds the fastest configs of PanelELL's stages on this machine's device and writes them to its table.

Each stage runs alone, on the arrays that it is given within a call, and candidates take turns with the
heuristic's config. Stages are independent but for one number, the lists' chunk, which all
that `TIED` names share. Those are searched with every chunk, the others once. What is kept beats the
heuristic in a second measurement by more than the gain's own spread over its rounds.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device as device_lib
from pallas_kernels import dispatch, tuning
from pallas_kernels.bench import timing
from pallas_kernels.bench.panel_stages import (
    CHUNKS,
    DIRECTIONS,
    GATE_STAGES,
    STAGES,
    TIED,
    Config,
    Given,
    candidates,
    with_chunk,
)
from pallas_kernels.common import gate_stage
from pallas_kernels.options import FFNOptions, Panel
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import gate as panel_gate
from pallas_kernels.panel import gathered
from pallas_kernels.panel.config import PanelConfig
from pallas_kernels.panel.pallas_triton import Hidden
from pallas_kernels.panel.pallas_triton_backward import Gradients
from pallas_kernels.panel.pallas_triton_counts import GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import NeuronLists, build_lists, n_chunks

_SAMPLED_PANELS = 4
_search = partial(timing.measure, rounds=3, chain_ms=6.0)
_compare = partial(timing.measure, rounds=9, chain_ms=15.0)

Calls = dict[tuple[int, Config], Callable[[], Any]]
"""What to time of a stage, by the lists' chunk and the stage's config."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What was chosen: stages that changed, and milliseconds of the direction's stages before and after."""

    panel: int
    changed: Mapping[str, Config]
    before_ms: float
    after_ms: float
    path: Path

    def __str__(self) -> str:
        if not self.changed:
            return (
                f"panels of {self.panel}: nothing beats the heuristic by more than the spread "
                f"({self.before_ms:.3f} ms)"
            )
        kept = ", ".join(f"{name}={config}" for name, config in self.changed.items())
        return (
            f"panels of {self.panel}: {self.before_ms:.3f} to {self.after_ms:.3f} ms with {kept}; "
            f"in {self.path}"
        )


@dataclasses.dataclass(frozen=True)
class _Contender:
    """A stage, its lists' chunk, its config, and the milliseconds it took."""

    stage: str
    chunk: int
    config: Config
    ms: float


def tune_panel(
    inputs: Mapping[str, jax.Array],
    dy: jax.Array,
    options: FFNOptions,
    direction: str,
    *,
    deadline: float = math.inf,
    directory: Path | None = None,
    say: Callable[[str], None] = print,
) -> Found:
    """Searches for the configs of a layer's stages and keeps those that beat the heuristic.

    All stages are searched, also those that the direction has not, so that the entry serves both; the
    direction says which stages' times decide about the lists' chunk.

    Args:
      inputs: arguments of `sparse_ffn` or `sparse_mlp`.
      dy: as x, (M, D).
      options: of a `Panel` format; its P and capacity are those of the call.
      direction: ``"forward"`` or ``"train"``.
      deadline: of `time.monotonic`: stages whose turn comes later keep the heuristic.
      directory: where the tables stand, if not in the package.
      say: is told of every stage, and of each candidate that is left out and why.

    Raises:
      ValueError: the layer cannot run PanelELL here.
      RuntimeError: a config of the heuristic does not run; or the layer's products are Mosaic GPU's here,
        whose tiles are no configs.
    """
    search = _Search(inputs, dy, options, say)
    x, weight, plain = inputs["x"], inputs["w_up"], search.plain
    best = search.fastest(deadline)
    counted = [stage for stage in DIRECTIONS[direction] if stage in search.stages]
    chosen, before, after = _choose(search, best, counted)
    changed = {
        stage: getattr(chosen, stage) for stage in STAGES if getattr(chosen, stage) != getattr(plain, stage)
    }
    entry: dict[str, Any] = {stage: dataclasses.asdict(config) for stage, config in changed.items()}
    if chosen.chunk != plain.chunk:
        entry["chunk"] = chosen.chunk
    key, device = configs.bucket(x, weight, plain.panel), device_lib.current()
    path = tuning.save(
        device.table_name, "panel", {key: {"config": entry, "ms": round(after, 4)}}, directory=directory
    )
    return Found(plain.panel, changed, before, after, path)


def _layout(options: FFNOptions) -> Panel:
    layout = options.layout
    if not isinstance(layout, Panel):
        raise ValueError(f"panel configs are tuned for format='panel'; got '{layout}'")
    return layout


class _Search:
    """One layer's stages with the arrays that each is given, with every chunk of the lists."""

    def __init__(self, inputs, dy, options, say) -> None:
        x, weight, self._say = inputs["x"], inputs["w_up"], say
        self._device = device_lib.current()
        self._itemsize, self._gated = x.dtype.itemsize, "w_gate" in inputs
        self._ready: dict[tuple[str, int, Config], Callable[[], Any]] = {}
        self.plain = configs.heuristic(x, _layout(options).tokens, self._device)
        backend = dispatch.choose(options, dispatch.Call.of(x, weight)).backend
        up = weight if self._gated else None
        products = gathered.implementation(self.plain, backend, x, up, in_blocks=False, by_token=False)
        if products != "triton":
            raise RuntimeError(
                f"the products of {x.shape[0]:,} tokens run on Mosaic GPU on {self._device.kind}, and what "
                "is searched is Triton's tiles"
            )
        self._interpret = backend == "interpret"
        implementation = gate_stage.implementation(backend, x, weight, self._device)
        self.stages = [
            name for name in STAGES if name not in ("gate", "pack") or name in GATE_STAGES[implementation]
        ]
        gate_weight, up_weight = (inputs["w_gate"], weight) if self._gated else (weight, None)
        gate = jax.jit(panel_gate.stage(self.plain, backend, options.rule))(x, gate_weight)
        layer: Given = {
            "x": x, "gate_weight": gate_weight, "up_weight": up_weight, "w_down": inputs["w_down"], "dy": dy,
            "scale": jnp.full((1,), 1 / x.shape[0], jnp.float32), "gate": gate,
        }  # fmt: skip
        if "pack" in self.stages:
            layer["product"] = jax.jit(gate_stage.xla_product)(x, gate_weight)
        self.bases = {
            chunk: base
            for chunk in dict.fromkeys([self.plain.chunk, *CHUNKS])
            if (base := with_chunk(self.plain, chunk)) is not None
        }
        self.given = {chunk: layer | self._lists(gate, weight, chunk, options) for chunk in self.bases}

    def _lists(self, gate: GatePanel, weight: jax.Array, chunk: int, options: FFNOptions) -> Given:
        """The lists of a forward, and those with the room that is kept for a backward
        (all, if that is too small)."""
        d_ff = weight.shape[0]
        counts = jax.jit(partial(count_active, d_ff=d_ff, interpret=self._interpret))(gate)
        build_all = partial(build_lists, tokens=gate.nnz.shape[1], chunk=chunk, interpret=self._interpret)
        build = jax.jit(build_all, static_argnames="room")
        lists, _ = build(counts)
        chunks = n_chunks(gate.values.shape[0], d_ff, chunk)
        room = max(1, round(chunks * _layout(options).capacity))
        kept = build(counts, room=room)[0] if int(lists.needed) <= room else lists
        return {"lists": lists, "kept_lists": kept}

    def fastest(self, deadline: float) -> dict[str, dict[int, _Contender]]:
        """The fastest right config of each stage, by chunk; what later stages are given comes from it."""
        best: dict[str, dict[int, _Contender]] = {}
        for stage in self.stages:
            late = time.monotonic() > deadline
            best[stage] = self._fastest(stage, late)
            if late:
                self._say(f"  {stage}: no time is left, the heuristic stays")
        return best

    def _fastest(self, stage: str, late: bool) -> dict[int, _Contender]:
        own = self.plain.chunk
        tried = [
            (chunk, config)
            for chunk, base in self.bases.items()
            if chunk == own or (stage in TIED and not late)
            for config in candidates(stage, base, self._itemsize, self._gated, self._device)[
                : 1 if late else None
            ]
            if self._has_what_it_needs(stage, chunk)
        ]
        calls = self.compiled(stage, tried)
        heuristic = own, getattr(self.plain, stage)
        if heuristic not in calls:
            raise RuntimeError(f"{stage}: the heuristic's {heuristic[1]} does not run, so nothing was tuned")
        right = self._only_right(stage, calls, heuristic)
        times = _search(right)
        found: dict[int, _Contender] = {}
        for (chunk, config), timed in sorted(times.items(), key=lambda item: item[1].median_ms):
            found.setdefault(chunk, _Contender(stage, chunk, config, timed.median_ms))
        for chunk, contender in found.items():
            if stage in ("up_keep", "dh"):
                self.given[chunk][stage] = right[chunk, contender.config]()
            lists = f", lists of {chunk}" if stage in TIED else ""
            self._say(
                f"  {stage}{lists}: {contender.ms:.4f} ms by {contender.config}; "
                f"heuristic {times[heuristic].median_ms:.4f} ms"
            )
        return found

    def _has_what_it_needs(self, stage: str, chunk: int) -> bool:
        """A chunk with which an earlier stage had no candidate is out."""
        given = self.given[chunk]
        return stage not in ("dh",) or "up_keep" in given

    def compiled(self, stage: str, tried: Sequence[tuple[int, Config]]) -> Calls:
        """Calls of a stage by chunk and config, compiled once;
        what the compiler rejects is left out, and said."""
        arrays = {chunk: dict(given) for chunk, given in self.given.items()}  # they grow stage by stage
        programs = {
            (chunk, config): (self._stage(stage, chunk, config), (arrays[chunk],))
            for chunk, config in tried
            if (stage, chunk, config) not in self._ready
        }
        for (chunk, config), program in timing.compile_all(programs).items():
            if isinstance(program, Exception):
                self._leave_out(stage, config, program)
            else:
                self._ready[stage, chunk, config] = partial(program, arrays[chunk])
        return {key: self._ready[stage, *key] for key in tried if (stage, *key) in self._ready}

    def _stage(self, stage: str, chunk: int, config: Config) -> Callable[[Given], Any]:
        whole = dataclasses.replace(self.bases[chunk], **{stage: config})
        return lambda given: STAGES[stage](given, whole, self._interpret)

    def _only_right(self, stage, calls, heuristic) -> Calls:
        """Those that run and give what the heuristic's config gives."""
        d_ff = self.given[heuristic[0]]["gate_weight"].shape[0]

        def digest(chunk, output):
            lists = self.given[chunk]["lists" if stage == "up" else "kept_lists"]
            return _digest(output, lists, d_ff)

        wanted = digest(heuristic[0], calls[heuristic]())
        allowed = max(float(jnp.finfo(self.given[heuristic[0]]["x"].dtype).eps), 1e-5)
        right = {}
        for (chunk, config), call in calls.items():
            try:
                distance = float(_distance(digest(chunk, jax.block_until_ready(call())), wanted))
            except RuntimeError as error:  # what the driver says of a launch that asks for too much
                self._leave_out(stage, config, error)
                continue
            if distance <= allowed:
                right[chunk, config] = call
            else:
                self._leave_out(
                    stage, config, f"its result is off by {distance:.1e}, at most {allowed:.1e} is rounding"
                )
        return right

    def _leave_out(self, stage: str, config: Config, reason: Any) -> None:
        lines = str(reason).strip().splitlines() or [type(reason).__name__]
        self._say(f"  {stage}: {config} is left out: {lines[0][:200]}")


@partial(jax.jit, static_argnames="d_ff")
def _digest(output: Any, lists: NeuronLists, d_ff: int) -> Any:
    """What of a stage's output means something, in an order that no config changes."""
    if isinstance(output, GatePanel):
        values = output.values[:_SAMPLED_PANELS, :d_ff]
        by_segment = output.hits[:, :d_ff].reshape(-1, output.segments, d_ff)
        written = jnp.repeat(by_segment > 0, values.shape[2] // output.segments, axis=1)
        return (
            jnp.where(written[:_SAMPLED_PANELS].transpose(0, 2, 1), values, 0),
            by_segment,
            jnp.sum(output.nnz, axis=0),
        )
    if not isinstance(output, Hidden | Gradients):
        return output
    assert lists.slots is not None
    slots = lists.slots[:_SAMPLED_PANELS]

    def by_neuron(leaf):
        return jnp.where((slots >= 0)[:, :, None], leaf[jnp.maximum(slots, 0)], 0) if leaf.ndim == 2 else leaf

    return jax.tree.map(by_neuron, output)


@jax.jit
def _distance(result: Any, wanted: Any) -> jax.Array:
    """() f32, the largest relative distance of two arrays of the trees; NaN if there is one."""

    def distance(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.sqrt(jnp.sum((a - b) ** 2) / jnp.maximum(jnp.sum(b**2), 1e-30))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(distance, result, wanted))))


# -- choice --------------------------------------------------------------------------------------------------


def _choose(
    search: _Search, best: Mapping[str, Mapping[int, _Contender]], counted: Sequence[str]
) -> tuple[PanelConfig, float, float]:
    """The config that beat the heuristic, and milliseconds of the stages that count, before and after.

    Another chunk is taken or left as a whole, by the sum of the tied stages that count.
    """
    own = search.plain.chunk
    whole = [chunk for chunk in best["up"] if all(chunk in best[stage] for stage in TIED)]
    tied = [stage for stage in TIED if stage in counted]
    fastest = min(whole, key=lambda chunk: sum(best[stage][chunk].ms for stage in tied))
    for chunk in dict.fromkeys([fastest, own]):
        new = {stage: best[stage][chunk if stage in TIED else own] for stage in best}
        old, now = _duel(search, new)
        better = {stage: _beats(now[stage], old[stage]) for stage in new}
        if chunk != own:
            if not _beats(_sum(now, tied), _sum(old, tied)):
                continue
            better |= dict.fromkeys(TIED, True)
        changes = {stage: new[stage].config for stage, gained in better.items() if gained}
        try:
            config = dataclasses.replace(search.plain, chunk=chunk, **changes)
        except ValueError:  # a slice of the down projection that the other chunk does not hold
            continue
        after = {stage: now[stage] if better[stage] else old[stage] for stage in new}
        before_ms, after_ms = (statistics.median(_sum(times, counted)) for times in (old, after))
        return config, before_ms, after_ms
    raise AssertionError("the heuristic's own chunk always is a choice")


def _duel(search: _Search, new: Mapping[str, _Contender]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples of each stage by the heuristic's config and by the new one, taking turns."""
    own = search.plain.chunk
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for stage, contender in new.items():
        plain = own, getattr(search.plain, stage)
        challenger = contender.chunk, contender.config
        compiled = search.compiled(stage, list(dict.fromkeys([plain, challenger])))
        calls["old", stage] = compiled[plain]
        if challenger != plain:
            calls["new", stage] = compiled[challenger]
    samples = {key: timed.samples_ms for key, timed in _compare(calls).items()}
    old = {stage: samples["old", stage] for stage in new}
    return old, {stage: samples.get(("new", stage), old[stage]) for stage in new}


def _sum(times: Mapping[str, Sequence[float]], stages: Sequence[str]) -> list[float]:
    """Round by round."""
    return [sum(values) for values in zip(*(times[stage] for stage in stages), strict=True)]


def _beats(new: Sequence[float], old: Sequence[float]) -> bool:
    """Whether the median gain is larger than the gain's own spread over the rounds."""
    gains = [1 - after / before for after, before in zip(new, old, strict=True)]
    return statistics.median(gains) > max(gains) - min(gains)
