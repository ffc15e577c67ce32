"""Times the stages of a PanelELL layer, each alone, beside the layers that they make up:
``python -m pallas_kernels.bench stages``.

What the stages' sum leaves of a layer's time is launches, statistics, and what one stage's data in the cache
spares the next. Beside each stage stands the rate of its arithmetic over the neurons that panels activate.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device as device_lib
from pallas_kernels import dispatch
from pallas_kernels.bench import machine, timing
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.inputs import PROFILES, Activity
from pallas_kernels.bench.json_file import JsonFile
from pallas_kernels.bench.layers import cotangent, gradients, layer
from pallas_kernels.bench.shapes import PAPER, SHAPES
from pallas_kernels.bench.timing import Timing
from pallas_kernels.options import FFNOptions, Panel
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import gate as panel_gate
from pallas_kernels.panel.gathered import make_lists, panel_dh, panel_down, panel_up
from pallas_kernels.panel.pallas_triton_counts import count_active
from pallas_kernels.panel.weights import panel_dw

OPTIONS = FFNOptions(format=Panel(capacity=1.0))
FORWARD = ("gate", "counts", "lists", "up", "down")
TRAIN = ("gate", "counts", "lists", "up_keep", "down", "dh", "dx", "dw")
_PROGRAM = "python -m pallas_kernels.bench stages"
_PRODUCTS = {"gate": 1, "up": 1, "up_keep": 1, "down": 1, "dh": 1, "dx": 2, "dw": 3}
"""How many products of a gated layer a stage is, each over a panel's neurons; the gate's is over all."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A stage or a whole layer: its times, and FLOPs where it multiplies."""

    name: str
    timing: Timing
    flops: float | None

    @property
    def teraflops(self) -> float | None:
        """TFLOP/s at the median."""
        return None if self.flops is None else self.flops / self.timing.median_ms / 1e9


@dataclasses.dataclass(frozen=True)
class Result:
    """One case: the mean number of neurons that a panel activates, and a row a stage."""

    case: Case
    union: float
    rows: list[Row]

    def sum_ms(self, names: Sequence[str]) -> float:
        """Of some stages' medians."""
        return sum(row.timing.median_ms for row in self.rows if row.name in names)


def stages(
    inputs: Mapping[str, jax.Array], dy: jax.Array, options: FFNOptions = OPTIONS
) -> tuple[dict[str, tuple[Callable[..., Any], tuple[Any, ...]]], float]:
    """Every stage by name with what it is given in a call, made by the stages before it; and the mean union.

    Args:
      inputs: arguments of `sparse_ffn` or `sparse_mlp`, x (M, D).
      dy: (M, D).
      options: of a `Panel` format.
    """
    x, w_up, w_down = inputs["x"], inputs["w_up"], inputs["w_down"]
    gate_weight, up_weight = (inputs["w_gate"], w_up) if "w_gate" in inputs else (w_up, None)
    layout, rule = options.layout, options.rule
    assert isinstance(layout, Panel)
    backend = dispatch.choose(options, dispatch.Call.of(x, w_up)).backend
    config, interpret = configs.choose(x, w_up, layout.tokens), backend == "interpret"
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def stage(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        programs[name] = function, arguments
        return jax.jit(function)(*arguments)

    gate = stage("gate", panel_gate.stage(config, backend, rule), x, gate_weight)
    counts = stage("counts", partial(count_active, d_ff=w_up.shape[0], interpret=interpret), gate)
    make = partial(make_lists, config=config, backend=backend)
    lists, _ = stage("lists", make, counts, x, up_weight)
    up = partial(panel_up, config=config, backend=backend, rule=rule)
    stage("up", up, gate, lists, x, up_weight)
    kept = stage("up_keep", partial(up, keep=True), gate, lists, x, up_weight)
    down = partial(panel_down, tokens=x.shape[0], config=config, backend=backend)
    stage("down", down, [(kept.h, w_down)], lists)
    dh = partial(panel_dh, config=config, backend=backend, rule=rule)
    scale = jnp.full((1,), 1 / x.shape[0], jnp.float32)
    pulled = stage("dh", dh, kept.gate, kept.up, lists, dy, w_down, scale)
    terms = [(pulled.gate, gate_weight)] + ([] if up_weight is None else [(pulled.up, up_weight)])
    stage("dx", partial(down, gradient=True), terms, lists)
    dw = partial(panel_dw, config=config, backend=backend, dtype=x.dtype)
    stage("dw", dw, pulled, kept.gate, lists, x, dy)
    return programs, float(jnp.mean(counts.neurons.astype(jnp.float32)))


def run(
    case: Case, *, rounds: int, chain_ms: float, rest_s: float = 0.0, options: FFNOptions = OPTIONS
) -> Result:
    """Compiles and times a case's stages, and the whole layer forward and with its gradients.

    Raises:
      RuntimeError: a stage does not compile.
    """
    inputs = case.arrays()
    dy = cotangent(inputs)
    programs, union = stages(inputs, dy, options)
    programs["whole forward"] = partial(layer, options), (inputs,)
    programs["whole with gradients"] = partial(gradients, options), (inputs, dy)
    calls = {}
    for name, compiled in timing.compile_all(programs).items():
        if isinstance(compiled, Exception):
            raise RuntimeError(f"{name} did not compile: {compiled}") from compiled
        calls[name] = partial(compiled, *programs[name][1])
    times = timing.measure(calls, rounds=rounds, chain_ms=chain_ms, rest_s=rest_s)
    tokens, d_model = inputs["x"].shape
    products = _PRODUCTS if case.shape.gated else _PRODUCTS | {"up": 0, "up_keep": 0, "dx": 1, "dw": 2}

    def flops(name):
        if not products.get(name):
            return None
        return 2.0 * tokens * d_model * products[name] * (case.shape.d_ff if name == "gate" else union)

    return Result(case, union, [Row(name, times[name], flops(name)) for name in calls])


def table(result: Result) -> str:
    """A case as a heading and a table in Markdown."""
    lines = [
        f"{result.case}, {result.union:.0f} neurons active in a panel",
        "",
        "| stage | ms (lowest to highest) | TFLOP/s |",
        "|---|---|---|",
    ]
    for row in result.rows:
        samples, rate = row.timing.samples_ms, row.teraflops
        shown = "" if rate is None else f"{rate:.0f}"
        spread = f"{min(samples):.3f} to {max(samples):.3f}"
        lines.append(f"| {row.name} | {row.timing.median_ms:.3f} ({spread}) | {shown} |")
    lines.append(f"| the forward's stages in all | {result.sum_ms(FORWARD):.3f} | |")
    lines.append(f"| those of a training step in all | {result.sum_ms(TRAIN):.3f} | |")
    return "\n".join(lines)


def to_json(results: Sequence[Result], command: Sequence[str]) -> dict[str, Any]:
    """Everything of a run, samples included, for `json.dumps`."""
    return {
        "command": list(command),
        **machine.record(),
        "cases": [
            {
                "case": str(result.case),
                "union": result.union,
                "rows": [
                    dataclasses.asdict(row) | {"median_ms": row.timing.median_ms, "teraflops": row.teraflops}
                    for row in result.rows
                ],
            }
            for result in results
        ],
    }


def _parser(program: str = _PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=(__doc__ or "").replace("`", ""))
    parser.add_argument("--shape", choices=list(SHAPES), default=PAPER.name, help="model (%(default)s)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384], help="tokens of a call (16,384)")
    parser.add_argument(
        "--profile", nargs="+", choices=list(PROFILES), default=["layer-3"], help="activity of trained layers"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time")
    parser.add_argument("--chain-ms", type=float, default=20.0, help="length of a sample")
    parser.add_argument(
        "--rest", type=float, default=0.0, metavar="SECONDS", help="let the device rest before each sample"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


def main(arguments: Sequence[str] | None = None, *, program: str = _PROGRAM) -> int:
    """The program; returns its exit status: 0, or 2 where it cannot run."""
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
    try:
        file = JsonFile(args.json)
        cases = [_case(args.shape, name, tokens) for name in args.profile for tokens in args.tokens]
    except ValueError as error:
        parser.error(str(error))
    command = [parser.prog, *(sys.argv[1:] if arguments is None else arguments)]
    print(machine.title(), flush=True)
    results: list[Result] = []
    for case in cases:
        results.append(run(case, rounds=args.rounds, chain_ms=args.chain_ms, rest_s=args.rest))
        print(f"\n{table(results[-1])}", flush=True)
        file.write(to_json(results, command))
    return 0


def _case(shape: str, profile: str, tokens: int) -> Case:
    activity: Activity = PROFILES[profile]
    case = Case(SHAPES[shape], tokens, activity, "bfloat16", "like trained layers")
    case.input_shapes()  # raises where there can be no such layer
    return case


if __name__ == "__main__":
    sys.exit(main())
