"""Times whole feed-forward layers, every format against the dense one:
``python -m pallas_kernels.bench layers``.

``forward`` times the layer as inference runs it, ``train`` a gradient of ``sum(dy y) + l1`` in x and all
weights, forward and backward. Contestants take turns in one process; errors are against f32, on sampled rows
of y or over whole gradients, and a format that is less accurate than it may be makes the program exit with 1.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device as device_lib
from pallas_kernels import dispatch, reference
from pallas_kernels.bench import accuracy, machine, recorded, timing
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.inputs import PROFILES, Activity, like_trained, measure
from pallas_kernels.bench.json_file import JsonFile
from pallas_kernels.bench.recorded import RecordedCase
from pallas_kernels.bench.shapes import PAPER, SHAPES
from pallas_kernels.bench.timing import Timing
from pallas_kernels.bench.tune_panel import tune_panel
from pallas_kernels.ffn import sparse_ffn, sparse_mlp
from pallas_kernels.options import FFNOptions, Panel, parse_layout

_PROGRAM = "python -m pallas_kernels.bench layers"
_COMPARABLE = ("twell", "hybrid", "panel", "auto")
_FORMATS = {"forward": ("dense", "twell", "panel", "auto"), "train": ("dense", "hybrid", "panel", "auto")}
_TUNING_SECONDS = (
    150.0  # then the search keeps the heuristic for what is left, so that a run ends within four minutes
)


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

    case: Case | RecordedCase
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


def layers(formats: Sequence[str], panels: Sequence[int] = (Panel.tokens,)) -> dict[str, FFNOptions]:
    """The layers to compare, by name; plain ``"panel"`` at every P asked for,
    each but the usual one with P in its name."""
    found: dict[str, FFNOptions] = {}
    for name in formats:
        options = FFNOptions(format=name)
        if name != "panel":
            found[name] = options
            continue
        for panel in panels:
            label = name if panel == Panel.tokens else f"{name}-{panel}"
            found[label] = FFNOptions(format=Panel(tokens=panel))
    return found


def contestants(direction: str, compared: Mapping[str, FFNOptions]) -> dict[str, Callable[..., Any]]:
    """Functions of the inputs and dy, by name; the forward has the stages of the gate beside the layers."""
    programs: dict[str, Callable[..., Any]] = {}
    for name, options in compared.items():
        if direction == "train":
            programs[name] = partial(gradients, options)
        else:
            programs[name] = lambda inputs, dy, options=options: layer(options, inputs)
    if direction == "forward":
        programs["gate GEMM, XLA"] = lambda inputs, dy: reference.project(inputs["x"], _gate_weight(inputs))
        if "panel" in compared:
            programs["gate_panel"] = lambda inputs, dy: _gate_panel(inputs)
    return programs


def _gate_weight(inputs):
    return inputs.get("w_gate", inputs["w_up"])


def _gate_panel(inputs):
    from pallas_kernels.panel import config, gate

    options = FFNOptions(format="panel")
    x, weight = inputs["x"], _gate_weight(inputs)
    backend = dispatch.choose(options, dispatch.Call.of(x, weight)).backend
    return gate.stage(config.choose(x, weight, Panel.tokens), backend, options.rule)(x, weight)


def run(
    case: Case | RecordedCase,
    direction: str,
    compared: Mapping[str, FFNOptions],
    *,
    rounds: int,
    chain_ms: float,
    rest_s: float = 0.0,
) -> Result:
    """Compiles, checks and times a case.

    Raises:
      RuntimeError: the dense layer does not compile, or the device has no room for the case.
    """
    inputs = case.arrays()
    dy = cotangent(inputs)
    programs = contestants(direction, compared)
    compiled = timing.compile_all({name: (program, (inputs, dy)) for name, program in programs.items()})
    if isinstance(compiled["dense"], Exception):
        raise RuntimeError(f"the dense layer did not compile: {compiled['dense']}") from compiled["dense"]
    failures = [f"{name} did not compile: {p}" for name, p in compiled.items() if isinstance(p, Exception)]
    calls = {name: partial(p, inputs, dy) for name, p in compiled.items() if not isinstance(p, Exception)}
    errors, wrong = _judge(calls, inputs, dy, direction, list(compared))
    times = timing.measure(calls, rounds=rounds, chain_ms=chain_ms, rest_s=rest_s)
    rows = [
        Row(name, times[name], errors.get(name), timing.temporary_bytes(compiled[name])) for name in calls
    ]
    return Result(case, direction, measure(inputs["x"], _gate_weight(inputs)), rows, failures + wrong)


def cotangent(inputs: Mapping[str, jax.Array]) -> jax.Array:
    """dy of a case: as x, standard normal."""
    return jax.random.normal(jax.random.key(1), inputs["x"].shape, inputs["x"].dtype)


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
        f"{result.direction}: {result.case}, mean nnz {found['mean_nnz']:.1f}, {found['union_128']:.0f} "
        f"neurons active in 128 tokens, {found['dead_fraction']:.0%} dead",
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
        **machine.record(),
        "cases": [
            dataclasses.asdict(result)
            | {"source": result.case.source}
            | {"rows": [dataclasses.asdict(row) | {"median_ms": row.timing.median_ms} for row in result.rows]}
            for result in results
        ],
    }


def _format(text: str) -> str:
    """A format of ``--formats`` as it was typed."""
    try:
        name = parse_layout(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if name not in _COMPARABLE:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_COMPARABLE)}; got {text!r}")
    return text


def _parser(program: str = _PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").replace("`", ""))
    parser.add_argument("direction", choices=list(_FORMATS))
    parser.add_argument(
        "--formats", nargs="+", type=_format, metavar="FORMAT",
        help=f"beside dense: {', '.join(_COMPARABLE)}, or one with options, as in 'panel(capacity=1.0)'",
    )  # fmt: skip
    parser.add_argument(
        "--panels", nargs="+", type=int, choices=[16, 32, 64, 128], default=[Panel.tokens],
        help="tokens of a panel",
    )  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help=f"models ({PAPER.name})")
    parser.add_argument("--tokens", nargs="+", type=int, help="tokens of a call (65,536; 16,384 for train)")
    parser.add_argument("--profile", nargs="+", choices=list(PROFILES), help="activity of a trained layer")
    parser.add_argument("--nnz", nargs="+", type=float, help="mean active gates of a token instead")
    parser.add_argument(
        "--like-trained",
        action="store_true",
        help="with --nnz: as uneven, dead and shared as in trained layers",
    )
    parser.add_argument(
        "--alike",
        action="store_true",
        help="with --profile or --like-trained: tokens of a topic together, as a model's order puts them",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="(bfloat16)")
    parser.add_argument(
        "--inputs", type=Path, metavar="FILE", help="layers recorded by sparse-lm layer-inputs instead"
    )
    parser.add_argument("--layer", nargs="+", type=int, help="with --inputs: which layers (all)")
    parser.add_argument(
        "--tune", action="store_true", help="first search for the fastest panel configs and keep them"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--chain-ms", type=float, default=30.0, help="length of a sample")
    parser.add_argument(
        "--rest", type=float, default=0.0, metavar="SECONDS",
        help="let the device rest so long before each sample, instead of running it in with the same calls",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


def _cases(args: argparse.Namespace) -> list[Case] | list[RecordedCase]:
    """What was asked for.

    Raises:
      ValueError: options that exclude each other, or a layer that cannot be as active as asked.
    """
    if not args.rest >= 0:
        raise ValueError(f"--rest must be at least 0 seconds; got {args.rest}")
    if args.like_trained and not args.nnz:
        raise ValueError("--like-trained goes with --nnz, which says how active the layers are; got none")
    if args.alike and not (args.profile or args.like_trained):
        raise ValueError(
            "--alike goes with --profile or --like-trained, whose tokens have topics; got neither"
        )
    if args.inputs is not None:
        for name in ("shapes", "profile", "nnz", "dtype"):
            if getattr(args, name) is not None:
                raise ValueError(f"--inputs brings shape, activity and type with it: leave out --{name}")
        return recorded.cases(args.inputs, layers=args.layer or (), tokens=args.tokens or ())
    if args.layer is not None:
        raise ValueError("--layer goes with --inputs FILE, which holds the layers; got none")
    tokens = args.tokens or [65536 if args.direction == "forward" else 16384]
    trained = "like trained layers" + (", alike tokens together" if args.alike else "")
    dtype = args.dtype or "bfloat16"
    cases = []
    for shape in (SHAPES[name] for name in args.shapes or [PAPER.name]):
        chosen = [(PROFILES[name], trained) for name in args.profile or ()]
        if args.like_trained:
            chosen += [(like_trained(nnz, shape.d_ff), trained) for nnz in args.nnz]
        else:
            chosen += [(Activity(nnz), Case.source) for nnz in args.nnz or ()]
        for (activity, source), count in itertools.product(chosen or [(Activity(), Case.source)], tokens):
            cases.append(Case(shape, count, activity, dtype, source, args.alike))
            cases[-1].input_shapes()
    return cases


def _tune(cases: Sequence[Case | RecordedCase], direction: str, panels: Sequence[FFNOptions]) -> None:
    """Searches for every case and P, as far as the time goes, and says what comes of it."""
    deadline = time.monotonic() + _TUNING_SECONDS
    for case in cases:
        inputs = case.arrays()
        for options in panels:
            print(f"tuning {options.layout}: {case}", flush=True)
            try:
                print(
                    tune_panel(inputs, cotangent(inputs), options, direction, deadline=deadline), flush=True
                )
            except RuntimeError as error:  # such as no room for the stages' arrays
                print(f"not tuned: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None, *, program: str = _PROGRAM) -> int:
    """The program; returns its exit status: 0, 1 where a result is wrong, 2 where it cannot run."""
    parser = _parser(program)
    args = parser.parse_args(arguments)
    device = device_lib.current()
    if not device.is_nvidia:
        print(
            "The benchmark times kernels on the device and needs an NVIDIA GPU of compute capability 8.0 "
            f"(Ampere) or newer, with JAX for CUDA; found {device.kind} ({device.platform}).",
            file=sys.stderr,
        )
        return 2
    compared = layers(["dense", *args.formats] if args.formats else _FORMATS[args.direction], args.panels)
    try:
        cases, file = _cases(args), JsonFile(args.json)
    except ValueError as error:
        parser.error(str(error))
    if args.tune:
        panels = [options for options in compared.values() if isinstance(options.layout, Panel)]
        if not panels:
            parser.error(
                "--tune searches for panel configs, and no panel is compared: add panel to --formats"
            )
        _tune(cases, args.direction, panels)
    command = [parser.prog, *(sys.argv[1:] if arguments is None else arguments)]
    sampling = {"rounds": args.rounds, "chain_ms": args.chain_ms, "rest_s": args.rest}
    results: list[Result] = []
    failures: list[str] = []
    print(machine.title(), flush=True)
    for case in cases:
        try:
            results.append(run(case, args.direction, compared, **sampling))
        except RuntimeError as error:  # such as no room on the device: the other cases may have it
            failures.append(f"{case} did not run: {error}")
            continue
        failures += [f"{case}: {failure}" for failure in results[-1].failures]
        print(f"\n{table(results[-1])}", flush=True)
        file.write(to_json(results, command))  # after every case: a run that is cut short keeps what it has
    for failure in failures:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
