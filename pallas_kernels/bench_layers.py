"""Times whole feed-forward layers, every format against the dense one: ``python -m pallas_kernels.bench_layers``.

``forward`` times the layer as inference runs it, ``train`` a gradient of ``sum(dy y) + l1`` in x and all weights,
forward and backward. Contestants take turns in one process; errors are against f32, on sampled rows of y or over
whole gradients, and a format that is less accurate than it may be makes the program exit with 1.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import accuracy, dispatch, reference, timing
from pallas_kernels import device as device_lib
from pallas_kernels.cases import Arrays, Case
from pallas_kernels.ffn import sparse_ffn, sparse_mlp
from pallas_kernels.inputs import PROFILES, Activity
from pallas_kernels.options import FFNOptions
from pallas_kernels.shapes import PAPER, SHAPES
from pallas_kernels.timing import Timing

_FORMATS = {"forward": ("dense", "twell", "panel", "auto"), "train": ("dense", "hybrid", "panel", "auto")}


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant: its times, its error as a multiple of the dense layer's, and its temporary bytes."""

    name: str
    timing: Timing
    error: float | None
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """A case's rows, what its input was found to be, and what is wrong, one sentence each."""

    case: Case
    direction: str
    measured: dict[str, float]
    rows: list[Row]
    failures: list[str]


def layer(options: FFNOptions, inputs: Mapping[str, jax.Array]) -> Any:
    """The public call that the arguments are for."""
    return (sparse_ffn if "w_gate" in inputs else sparse_mlp)(**inputs, options=options)


def gradients(options: FFNOptions, inputs: Mapping[str, jax.Array], dy: jax.Array) -> Any:
    """Of ``sum(dy y) + l1`` in every input, by name."""

    def objective(inputs):
        y, stats = layer(options, inputs)
        return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32)) + stats.l1

    return jax.grad(objective)(inputs)


def contestants(direction: str, formats: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions of the inputs and dy, by name; the forward has the stages of the gate beside the layers."""
    programs: dict[str, Callable[..., Any]] = {}
    for name in formats:
        options = FFNOptions(format=name)  # type: ignore[arg-type] # the parser's choices are formats
        if direction == "train":
            programs[name] = partial(gradients, options)
        else:
            programs[name] = lambda inputs, dy, options=options: layer(options, inputs)
    if direction == "forward":
        programs["gate GEMM, XLA"] = lambda inputs, dy: reference.project(inputs["x"], _gate_weight(inputs))
        if "panel" in formats:
            programs["gate_panel"] = lambda inputs, dy: _gate_panel(inputs)
    return programs


def _gate_weight(inputs):
    return inputs.get("w_gate", inputs["w_up"])


def _gate_panel(inputs):
    from pallas_kernels.panel import config, vjp

    options = FFNOptions(format="panel")
    x, weight = inputs["x"], _gate_weight(inputs)
    backend = dispatch.choose(options, dispatch.Call.of(x, weight, options)).backend
    return vjp.gate_stage(x, weight, config.choose(x, weight, options), backend)


def run(case: Case, direction: str, formats: Sequence[str], *, rounds: int, chain_ms: float) -> Result:
    """Compiles, checks and times a case."""
    inputs = jax.jit(case.make_inputs())(jax.random.key(0))
    dy = jax.random.normal(jax.random.key(1), inputs["x"].shape, inputs["x"].dtype)
    programs = contestants(direction, formats)
    compiled = timing.compile_all({name: (program, (inputs, dy)) for name, program in programs.items()})
    failures = [f"{name} did not compile: {p}" for name, p in compiled.items() if isinstance(p, Exception)]
    calls = {name: partial(p, inputs, dy) for name, p in compiled.items() if not isinstance(p, Exception)}
    errors, wrong = _judge(calls, inputs, dy, direction, formats)
    times = timing.measure(calls, rounds=rounds, chain_ms=chain_ms)
    rows = [
        Row(name, times[name], errors.get(name), timing.temporary_bytes(compiled[name])) for name in calls
    ]
    return Result(case, direction, _measured(inputs), rows, failures + wrong)


def _measured(inputs: Arrays) -> dict[str, float]:
    """Mean nnz, dead share, and how many neurons 128 tokens activate, over the dense layer's own gate."""

    @jax.jit
    def measure(x, weight):
        mask = reference.active(reference.project(x, weight))
        whole = mask[: max(len(mask) // 128, 1) * 128].reshape(-1, min(len(mask), 128), mask.shape[1])
        return {
            "mean_nnz": jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
            "dead_fraction": jnp.mean(~jnp.any(mask, axis=0), dtype=jnp.float32),
            "union_128": jnp.mean(jnp.sum(jnp.any(whole, axis=1), axis=1, dtype=jnp.float32)),
        }

    return {name: float(value) for name, value in measure(inputs["x"], _gate_weight(inputs)).items()}


def _judge(calls, inputs, dy, direction, formats) -> tuple[dict[str, float], list[str]]:
    """Each format's largest error over its outputs, as a multiple of dense's; what is too large."""
    if direction == "forward":
        rows = accuracy.sample_rows(inputs["x"].shape[0])
        true = {"y": accuracy.truth(inputs, rows)[1]}
    else:
        with jax.default_matmul_precision("highest"):
            wide = jax.tree.map(lambda value: value.astype(jnp.float32), inputs)
            true = jax.jit(partial(gradients, FFNOptions(format="dense")))(wide, dy)
        true = jax.device_get(true)

    def distances(name):
        output = calls[name]()
        got = {"y": output[0][rows]} if direction == "forward" else output
        return {key: accuracy.relative_error(np.asarray(got[key], np.float32), true[key]) for key in true}

    own = distances("dense")
    errors, failures = {"dense": 1.0}, []
    for name in (name for name in formats if name != "dense" and name in calls):
        found = distances(name)
        errors[name] = max(found[key] / max(own[key], 1e-12) for key in true)
        failures += [
            f"{name}: {key} has a relative error of {found[key]:.2e}, the dense layer's is {own[key]:.2e}"
            for key in true
            if not accuracy.acceptable(found[key], own[key])
        ]
    return errors, failures


def table(result: Result) -> str:
    """A case as a heading and a table in Markdown."""
    dense = next(row for row in result.rows if row.name == "dense")
    found = result.measured
    lines = [
        f"{result.direction}: {result.case}, mean nnz {found['mean_nnz']:.1f}, {found['union_128']:.0f} neurons active in "
        f"128 tokens, {found['dead_fraction']:.0%} dead",
        "",
        "| | ms (lowest to highest) | times as fast as dense | temporary memory, MiB | error, of dense's |",
        "|---|---|---|---|---|",
    ]
    for row in result.rows:
        samples, median = row.timing.samples_ms, row.timing.median_ms
        error = "" if row.error is None else f"{row.error:.2f}"
        lines.append(
            f"| {row.name} | {median:.3f} ({min(samples):.3f} to {max(samples):.3f}) "
            f"| {dense.timing.median_ms / median:.2f} | {row.temporary_bytes / 2**20:,.0f} | {error} |"
        )
    return "\n".join(lines)


def to_json(results: Sequence[Result], command: Sequence[str]) -> dict[str, Any]:
    """Everything of a run, samples included, for `json.dumps`."""
    return {
        "command": list(command),
        "device": dataclasses.asdict(device_lib.current()),
        "jax": jax.__version__,
        "cases": [
            dataclasses.asdict(result)
            | {"rows": [dataclasses.asdict(row) | {"median_ms": row.timing.median_ms} for row in result.rows]}
            for result in results
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench_layers", description=__doc__)
    parser.add_argument("direction", choices=list(_FORMATS))
    parser.add_argument(
        "--formats", nargs="+", choices=["twell", "hybrid", "panel", "auto"], help="beside dense"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=[PAPER.name], help="models")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens of a call (65,536; 16,384 for train)")
    parser.add_argument(
        "--profile", nargs="+", choices=list(PROFILES), default=[], help="activity of a trained layer"
    )
    parser.add_argument(
        "--nnz", nargs="+", type=float, default=[], help="mean active gates of a token instead"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--chain-ms", type=float, default=30.0, help="length of a sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    activities = [PROFILES[name] for name in args.profile] + [Activity(nnz) for nnz in args.nnz]
    tokens = args.tokens or [65536 if args.direction == "forward" else 16384]
    products = itertools.product(activities or [Activity()], args.shapes, tokens)
    return (Case(SHAPES[shape], count, activity, args.dtype) for activity, shape, count in products)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 0, 1 where a result is wrong, 2 where it cannot run."""
    parser = _parser()
    args = parser.parse_args(arguments)
    device = device_lib.current()
    if not device.is_nvidia:
        print(
            "The benchmark times kernels on the device and needs an NVIDIA GPU of compute capability 8.0 (Ampere) "
            f"or newer, with JAX for CUDA; found {device.kind} ({device.platform}).",
            file=sys.stderr,
        )
        return 2
    formats = ["dense", *args.formats] if args.formats else _FORMATS[args.direction]
    command = [parser.prog, *(sys.argv[1:] if arguments is None else arguments)]
    results: list[Result] = []
    print(f"{device.kind}, JAX {jax.__version__}", flush=True)
    for case in _cases(args):
        results.append(run(case, args.direction, formats, rounds=args.rounds, chain_ms=args.chain_ms))
        print(f"\n{table(results[-1])}", flush=True)
        if args.json is not None:  # after every case: a run that is cut short keeps what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(to_json(results, command), indent=1) + "\n")
    failures = [failure for result in results for failure in result.failures]
    for failure in failures:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
