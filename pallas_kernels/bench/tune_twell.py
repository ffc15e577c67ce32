"""Finds the fastest configs for a layer on this machine's device and writes them to its tables."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import device as device_lib
from pallas_kernels import reference, tuning
from pallas_kernels.bench import accuracy, timing
from pallas_kernels.bench.cases import layout as twell_layout
from pallas_kernels.common.row_kernel import up_down
from pallas_kernels.options import FFNOptions
from pallas_kernels.twell import config as configs
from pallas_kernels.twell.pallas_triton_gate import gate_pack

_ROUNDS = 5
_CHAIN_MS = 10.0


def tune_twell(
    make_inputs: Callable[[jax.Array], Mapping[str, jax.Array]],
    options: FFNOptions,
    *,
    directory: Path | None = None,
) -> str:
    """Times every config of the search space on a layer's arguments and keeps the fastest of each kernel.

    Candidates that the compiler rejects, or whose gates are less accurate than they may be, do not count.

    Args:
      make_inputs: from a random key to `ffn_inputs`' arrays.
      options: tile and slots to tune for.
      directory: where the tables stand, if not in the package.

    Returns:
      What was chosen, in one line.

    Raises:
      RuntimeError: no candidate compiled, or none was right.
    """
    device = device_lib.current()
    inputs = jax.jit(make_inputs)(jax.random.key(0))
    x, weight = inputs["x"], inputs.get("w_gate", inputs["w_up"])
    interpret, layout = options.backend == "interpret", twell_layout(options)
    gate_packs, up_downs = configs.search_space(x, weight, layout, device)
    pack = partial(gate_pack, tile=layout.tile, slots=layout.slots, interpret=interpret)
    packs = {config: (partial(pack, config=config), (x, weight)) for config in gate_packs}
    best_pack, pack_ms, packed = _fastest(packs, partial(_gates_are_right, inputs))
    up_weight = inputs["w_up"] if "w_gate" in inputs else None
    project = partial(up_down, name="twell_up_down", interpret=interpret)
    arguments = (packed[0], x, up_weight, inputs["w_down"])
    projections: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        config: (partial(project, config=config), arguments) for config in up_downs
    }
    best_projection, projection_ms, _ = _fastest(projections, partial(_y_is_right, inputs, packed[0]))
    chosen = [(best_pack, pack_ms), (best_projection, projection_ms)]
    for (op, key), (config, ms) in zip(configs.buckets(x, weight, layout).items(), chosen, strict=True):
        entry = {"config": dataclasses.asdict(config), "ms": round(ms, 4)}
        tuning.save(device.table_name, op, {key: entry}, directory=directory)
    return ", ".join(f"{config} {ms:.3f} ms" for config, ms in chosen)


def _fastest(
    programs: Mapping[Any, tuple[Callable[..., Any], tuple[Any, ...]]], is_right: Callable[[Any], bool]
):
    """The fastest config whose output is right, its milliseconds and its output."""
    compiled = {
        config: partial(program, *programs[config][1])
        for config, program in timing.compile_all(programs).items()
        if not isinstance(program, Exception)
    }
    times = timing.measure(compiled, rounds=_ROUNDS, chain_ms=_CHAIN_MS)
    for config in sorted(times, key=lambda config: times[config].median_ms):
        output = compiled[config]()
        if is_right(output):
            return config, times[config].median_ms, output
    raise RuntimeError(
        f"of {len(programs)} candidates {len(compiled)} compiled and none gave the right result: "
        "nothing was kept"
    )


def _gates_are_right(inputs: Mapping[str, jax.Array], output: Any) -> bool:
    rows = accuracy.sample_rows(inputs["x"].shape[0])
    sample = accuracy.take_rows(output[0], rows)
    fits = ~np.asarray(sample.overflows)
    gate, _ = accuracy.truth(inputs, rows)
    dense = np.maximum(reference.project(inputs["x"][rows], inputs.get("w_gate", inputs["w_up"])), 0)
    error = accuracy.relative_error(np.asarray(sample.to_dense())[fits], gate[fits])
    return accuracy.acceptable(error, accuracy.relative_error(dense[fits], gate[fits]))


def _y_is_right(inputs: Mapping[str, jax.Array], packed: Any, output: Any) -> bool:
    rows = accuracy.sample_rows(inputs["x"].shape[0])
    fits = ~np.asarray(accuracy.take_rows(packed, rows).overflows)
    _, y = accuracy.truth(inputs, rows)
    dense, _ = reference.ffn(inputs["x"][rows], inputs.get("w_gate"), inputs["w_up"], inputs["w_down"])
    error = accuracy.relative_error(np.asarray(output[0][rows])[fits], y[fits])
    return accuracy.acceptable(error, accuracy.relative_error(np.asarray(dense)[fits], y[fits]))
