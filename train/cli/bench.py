"""``sparse-lm bench``: one benchmark a word."""

from collections.abc import Callable

from train.cli.evaluate import check_text
from train.cli.options import PROGRAM, UsageError, did_you_mean, parse_options
from train.cli.presets import preset_of

_HELP = f"""usage: {PROGRAM} bench BENCHMARK [OPTIONS]

benchmarks:
  layers      time feed-forward layers of every format beside the dense one
  stages      time the stages of a PanelELL layer, each alone
  model       time the forward of a whole model's core, with its memory and energy
  step        time training steps, and measure their memory
  decode      time a token of generation, and a feed-forward layer of a few tokens
  order       count the neurons that panels of a trained model's tokens share, by the order of the tokens
  gate-bound  count what a low-precision gate with a proven bound would leave to compute in bf16
  scaling     time training steps on one device and on several, and count what they send each other
  curves      draw break-even curves from files of bench layers

{PROGRAM} bench BENCHMARK --help lists its options.
"""


def run(argv: list[str]) -> int | None:
    """Runs a benchmark; its exit status where it has one of its own."""
    benchmarks: dict[str, Callable[[list[str]], int | None]] = {
        "layers": _layers,
        "stages": _stages,
        "model": _model,
        "step": _step,
        "decode": _decode,
        "order": _order,
        "gate-bound": _gate_bound,
        "scaling": _scaling,
        "curves": _curves,
    }
    first = argv[0] if argv else None
    if first in ("-h", "--help"):
        print(_HELP, end="")
        return None
    if first in benchmarks:
        return benchmarks[first](argv[1:])
    found = "none" if first is None else f"{first!r}{did_you_mean(first, benchmarks)}"
    raise UsageError(f"bench expects a benchmark, one of {', '.join(benchmarks)}; got {found}")


def _layers(argv: list[str]) -> int:
    from pallas_kernels.bench import layers

    return layers.main(argv, program=f"{PROGRAM} bench layers")


def _stages(argv: list[str]) -> int:
    from pallas_kernels.bench import stages

    return stages.main(argv, program=f"{PROGRAM} bench stages")


def _model(argv: list[str]) -> None:
    preset, config = preset_of(argv, "1p5b")

    from train.bench import bench_model

    default = bench_model.BenchModelOptions(config=preset, model=config.model)
    options = parse_options(bench_model.BenchModelOptions, argv, "bench model", default)
    check_text(options.data)
    bench_model.run(options)


def _step(argv: list[str]) -> None:
    preset, config = preset_of(argv, "0p5b")

    from train.bench import bench_step

    default = bench_step.BenchStepOptions(config=preset, model=config.model)
    bench_step.run(parse_options(bench_step.BenchStepOptions, argv, "bench step", default))


def _decode(argv: list[str]) -> None:
    preset, config = preset_of(argv, "1p5b")

    from train.bench import decode

    default = decode.DecodeOptions(config=preset, model=config.model)
    decode.run(parse_options(decode.DecodeOptions, argv, "bench decode", default))


def _order(argv: list[str]) -> None:
    from train.bench import bench_order

    bench_order.run(parse_options(bench_order.BenchOrderOptions, argv, "bench order"))


def _gate_bound(argv: list[str]) -> None:
    from train.bench import bench_gate_bound

    bench_gate_bound.run(parse_options(bench_gate_bound.BenchGateBoundOptions, argv, "bench gate-bound"))


def _scaling(argv: list[str]) -> None:
    preset, config = preset_of(argv, "1p5b")

    from train.bench import scaling

    default = scaling.ScalingOptions(config=preset, model=config.model)
    scaling.run(parse_options(scaling.ScalingOptions, argv, "bench scaling", default))


def _curves(argv: list[str]) -> None:
    from train.bench import plot

    options = parse_options(plot.CurvesOptions, argv, "bench curves")
    for line in plot.plot(options.results, options.out):
        print(line)
