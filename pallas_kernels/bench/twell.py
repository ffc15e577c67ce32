"""Times the sparse layers against the dense one on this machine's GPU:
``python -m pallas_kernels.bench twell``.

Every number of a case comes from one process in which the contestants take turns; a result that is less
accurate than it may be makes the program exit with 1.
"""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device as device_lib
from pallas_kernels.bench import accuracy, machine, timing
from pallas_kernels.bench.cases import (
    Arrays,
    Case,
    Work,
    choose_backend,
    choose_config,
    contestants,
    default_cases,
    dense,
    work,
)
from pallas_kernels.bench.inputs import PROFILES, Activity
from pallas_kernels.bench.json_file import JsonFile
from pallas_kernels.bench.shapes import PAPER, SHAPES, TOKENS
from pallas_kernels.bench.timing import Ceilings, Timing
from pallas_kernels.bench.tune_twell import tune_twell
from pallas_kernels.formats import TwELL
from pallas_kernels.options import FFNOptions, Twell
from pallas_kernels.twell.config import TwELLConfig

_LABELS = {
    "dense_ffn": "dense FFN, XLA",
    "gate_gemm": "gate GEMM, XLA",
    "gate_pack": "gate_pack",
    "gate_pack_triton": "gate_pack, Triton",
    "up_down": "up_down",
    "sparse_ffn": "sparse FFN",
    "sparse_ffn_y": "sparse FFN, y alone",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant's times, work and relative error (None where no row could be compared)."""

    name: str
    timing: Timing
    work: Work
    error: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A case's rows, and what is wrong with them, one sentence each.

    ``memory`` holds the temporary bytes of the compiled calls, ``measured`` what the input was found to be.
    """

    case: Case
    options: FFNOptions
    backend: str
    config: TwELLConfig
    rows: dict[str, Row]
    measured: dict[str, float]
    memory: dict[str, int]
    failures: list[str]


def run(
    cases: Sequence[Case], options: FFNOptions, *, rounds: int = 7, chain_ms: float = 40.0
) -> Iterator[tuple[Result | None, list[str]]]:
    """Compiles a case's programs side by side, checks and times them, and goes on to the next case.

    Yields:
      For each case its result, None if it did not run, and all that is wrong with it, one sentence each.
    """
    for case in cases:
        programs = timing.compile_all(_programs(case, options))
        errors = [f"{name}: {p}" for name, p in programs.items() if isinstance(p, Exception)]
        if errors:
            yield None, [f"{case} did not compile: {error}" for error in errors]
            continue
        try:
            result = _run_case(case, options, programs, rounds=rounds, chain_ms=chain_ms)
        except jax.errors.JaxRuntimeError as error:
            yield None, [f"{case} did not run: {error}"]
        else:
            yield result, [f"{case}: {failure}" for failure in result.failures]


def _programs(case: Case, options: FFNOptions) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """A case's contestants, the maker of their inputs and the dense call with
    statistics, for `compile_all`."""
    entries = contestants(case, options)
    pack, pack_arguments = entries["gate_pack"]
    shapes = case.input_shapes()
    shapes["packed"], _ = jax.eval_shape(pack, *(shapes[name] for name in pack_arguments))
    entries["dense_stats"] = (dense, entries["dense_ffn"][1])
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        name: (function, tuple(shapes[argument] for argument in arguments))
        for name, (function, arguments) in entries.items()
    }
    programs["inputs"] = (case.make_inputs(), (jax.random.key(0),))
    return programs


def _run_case(case, options, compiled, *, rounds, chain_ms) -> Result:
    arrays = compiled["inputs"](jax.random.key(0))
    entries = contestants(case, options)

    def call(name):
        return compiled[name](*(arrays[argument] for argument in entries[name][1]))

    packs = {name: call(name) for name in entries if name.startswith("gate_pack")}
    arrays["packed"], hits = packs["gate_pack"]
    dense_y, dense_stats = compiled["dense_stats"](*(arrays[name] for name in entries["dense_ffn"][1]))
    outputs = {name: call(name) for name in ("gate_gemm", "up_down", "sparse_ffn")}
    outputs |= {name: packed for name, (packed, _) in packs.items()} | {"dense_ffn": dense_y}
    stats = outputs["sparse_ffn"][1]
    errors, failures = _judge(arrays, outputs)
    failures += accuracy.stats_failures(stats, dense_stats)
    overflow_rows = int(arrays["packed"].overflow_count)
    if int(stats.overflow_rows) != overflow_rows:
        failures.append(
            f"overflow_rows is {int(stats.overflow_rows)}, gate_pack's counts say {overflow_rows}"
        )
    if not jnp.array_equal(hits, stats.neuron_hits):
        failures.append("gate_pack's hits are not the call's neuron_hits")
    measured = {
        "mean_nnz": float(dense_stats.l0),
        "max_nnz": int(dense_stats.max_nnz),
        "dead_fraction": float(dense_stats.dead_fraction),
        "overflow_rows": overflow_rows,
    }
    del outputs, packs, dense_y
    times = timing.measure({name: partial(call, name) for name in entries}, rounds=rounds, chain_ms=chain_ms)
    works = work(case, options, measured["mean_nnz"])
    rows = {name: Row(name, times[name], works[name], errors.get(name)) for name in entries}
    memory = {name: timing.temporary_bytes(compiled[name]) for name in ("dense_ffn", "sparse_ffn")}
    return Result(
        case=case,
        options=options,
        backend=choose_backend(case, options),
        config=choose_config(case, options),
        rows=rows,
        measured=measured,
        memory=memory,
        failures=failures,
    )


def _judge(arrays: Arrays, outputs: Arrays) -> tuple[dict[str, float | None], list[str]]:
    """Relative errors by contestant, against an f32 truth on sampled rows, and those that are too large."""
    rows = accuracy.sample_rows(arrays["x"].shape[0])
    gate, y = accuracy.truth(arrays, rows)
    results: dict[str, tuple[Any, Any, str]] = {}
    results["gate_gemm"] = (np.maximum(outputs["gate_gemm"][rows], 0), gate, "gate_gemm")
    results["dense_ffn"] = (outputs["dense_ffn"][rows], y, "dense_ffn")
    results["sparse_ffn"] = (outputs["sparse_ffn"][0][rows], y, "dense_ffn")
    for name in (name for name in outputs if name.startswith("gate_pack")):
        sample: TwELL = accuracy.take_rows(outputs[name], rows)
        fits = ~np.asarray(sample.overflows)
        if fits.any():
            results[name] = (np.asarray(sample.to_dense())[fits], gate[fits], "gate_gemm")
            results["up_down"] = (np.asarray(outputs["up_down"][0][rows])[fits], y[fits], "dense_ffn")
    errors = {name: accuracy.relative_error(result, truth) for name, (result, truth, _) in results.items()}
    failures = [
        f"{_LABELS[name]} has a relative error of {errors[name]:.2e}, "
        f"{_LABELS[judge]} has {errors[judge]:.2e}"
        for name, (_, _, judge) in results.items()
        if not accuracy.acceptable(errors[name], errors[judge])
    ]
    return dict(errors), failures


def table(result: Result, limits: Ceilings) -> str:
    """A case as a heading, a table in Markdown, and a line on what the table does not show."""
    rows, measured, memory = result.rows, result.measured, result.memory
    dense_ms = rows["dense_ffn"].timing.median_ms
    lines = [
        f"{result.case}, mean nnz {measured['mean_nnz']:.1f}, gates by {result.backend}",
        "",
        "| | ms (lowest to highest) | of dense | rate | share of ceiling | relative error |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        samples, median = row.timing.samples_ms, row.timing.median_ms
        share = limits.floor_ms(row.work.flops, row.work.bytes) / median
        error = "" if row.error is None else f"{row.error:.2e}"
        mark = "*" if median < 2 * limits.dispatch_ms else ""
        lines.append(
            f"| {_LABELS[row.name]} | {median:.3f}{mark} ({min(samples):.3f} to {max(samples):.3f}) "
            f"| {median / dense_ms:.3f} | {_rate(row)} | {share:.1%} | {error} |"
        )
    pack = rows["gate_pack"].timing.median_ms / rows["gate_gemm"].timing.median_ms
    whole, without = (rows[name].timing.median_ms for name in ("sparse_ffn", "sparse_ffn_y"))
    share_of_memory = memory["sparse_ffn"] / max(memory["dense_ffn"], 1)
    lines += [
        "",
        f"gate_pack takes {pack:.3f} of the gate GEMM; l1, l0 and hits {(whole - without) / whole:.1%} of "
        f"the call; temporary memory {memory['sparse_ffn'] / 2**20:,.0f} MiB, {share_of_memory:.1%} of "
        f"dense; rows that overflow: {measured['overflow_rows']:,}.",
    ]
    return "\n".join(lines)


def _rate(row: Row) -> str:
    seconds = row.timing.median_ms / 1e3
    if row.name == "up_down":
        return f"{row.work.gathered / seconds / 1e12:.2f} TB/s gathered"
    return f"{row.work.flops / seconds / 1e12:.1f} TF/s"


def _legend(limits: Ceilings) -> str:
    return (
        f"Ceilings, measured in this run: {limits.flops / 1e12:.0f} TF/s (product of 8192 x 8192 matrices, "
        f"XLA), {limits.bytes / 1e12:.2f} TB/s (copy, read + written). The share of the ceiling is the least "
        "time that a row's FLOPs, or its fewest bytes to memory, can take at these rates; gathered weight "
        "rows come mostly from L2 and do not count. "
        f"A * marks a time near the host's {limits.dispatch_ms:.3f} ms a call, which is no device time."
    )


def to_json(results: Sequence[Result], limits: Ceilings, command: Sequence[str]) -> dict[str, Any]:
    """Everything of a run, samples and configs included, for `json.dumps`."""
    return {
        "command": list(command),
        **machine.record(),
        "ceilings": dataclasses.asdict(limits),
        "cases": [
            dataclasses.asdict(result) | {"rows": [_row_to_json(row, limits) for row in result.rows.values()]}
            for result in results
        ],
    }


def _row_to_json(row: Row, limits: Ceilings) -> dict[str, Any]:
    floor = limits.floor_ms(row.work.flops, row.work.bytes)
    return dataclasses.asdict(row) | {"median_ms": row.timing.median_ms, "floor_ms": floor}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench twell", description=(__doc__ or "").replace("`", "")
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=list(SHAPES), help="models (default: a fixed list of cases)"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, help="tokens of a call (default: as the list has it)"
    )
    activity = parser.add_mutually_exclusive_group()
    activity.add_argument("--nnz", nargs="+", type=float, default=[30.0], help="mean active gates of a token")
    activity.add_argument(
        "--profile", nargs="+", choices=list(PROFILES), help="activity of a trained layer instead"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--backend", default="auto", choices=["auto", "mosaic_gpu", "triton"])
    parser.add_argument("--tile", type=int, default=Twell.tile, help="columns of a TwELL tile")
    parser.add_argument(
        "--compression", type=int, default=Twell.compression, help="columns for a packed word"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    parser.add_argument(
        "--tune", action="store_true", help="first search for the fastest configs and keep them"
    )
    return parser


def _cases(args: argparse.Namespace) -> list[Case]:
    activities = [PROFILES[name] for name in args.profile or ()] or [Activity(nnz) for nnz in args.nnz]
    if args.shapes is None and args.tokens is None:
        return list(itertools.chain.from_iterable(default_cases(each, args.dtype) for each in activities))
    shapes = [SHAPES[name] for name in args.shapes or [PAPER.name]]
    products = itertools.product(activities, shapes, args.tokens or TOKENS[1:2])
    return [Case(shape, tokens, activity, args.dtype) for activity, shape, tokens in products]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 0, 1 where a result is wrong, 2 where it cannot run."""
    parser = _parser()
    args = parser.parse_args(arguments)
    device = device_lib.current()
    if not device.is_nvidia:
        print(
            "The benchmark times kernels on the device and needs an NVIDIA GPU of compute capability 8.0 "
            f"(Ampere) or newer, with JAX for CUDA; found {device.kind} ({device.platform}).",
            file=sys.stderr,
        )
        return 2
    try:
        options = FFNOptions(Twell(args.tile, args.compression), backend=args.backend)
        cases, file = _cases(args), JsonFile(args.json)
        for case in cases:
            choose_backend(case, options)
    except ValueError as error:
        parser.error(str(error))
    if args.tune:
        for case in dict.fromkeys(cases):
            print(f"{case}: {tune_twell(case.make_inputs(), options)}", flush=True)
    limits = timing.ceilings(args.dtype)
    command = [parser.prog, *(sys.argv[1:] if arguments is None else arguments)]
    results: list[Result] = []
    failures: list[str] = []
    print(f"{machine.title()}\n\n{_legend(limits)}", flush=True)
    for result, wrong in run(cases, options, rounds=args.rounds):
        failures += wrong
        if result is None:
            continue
        results.append(result)
        print(f"\n{table(result, limits)}", flush=True)
        file.write(to_json(results, limits, command))  # after every case: what is cut short keeps what it has
    for failure in failures:
        print(f"WRONG: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
