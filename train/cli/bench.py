"""``sparse-lm bench``: one benchmark a word."""

from train.cli.options import PROGRAM, UsageError, did_you_mean, parse_options
from train.cli.presets import preset_of

_HELP = f"""usage: {PROGRAM} bench BENCHMARK [OPTIONS]

benchmarks:
  order    count the neurons that panels of a trained model's tokens share, by the order of the tokens
  decode   time a token of generation, and a feed-forward layer of a few tokens
  scaling  time training steps on one device and on several, and count what they send each other

{PROGRAM} bench BENCHMARK --help lists its options.
"""


def run(argv: list[str]) -> None:
    benchmarks = {"order": _order, "decode": _decode, "scaling": _scaling}
    first = argv[0] if argv else None
    if first in ("-h", "--help"):
        print(_HELP, end="")
    elif first in benchmarks:
        benchmarks[first](argv[1:])
    else:
        found = "none" if first is None else f"{first!r}{did_you_mean(first, benchmarks)}"
        raise UsageError(f"bench expects a benchmark, one of {', '.join(benchmarks)}; got {found}")


def _order(argv: list[str]) -> None:
    from train.bench import bench_order

    bench_order.run(parse_options(bench_order.BenchOrderOptions, argv, "bench order"))


def _decode(argv: list[str]) -> None:
    preset, config = preset_of(argv, "1p5b")

    from train.bench import decode

    default = decode.DecodeOptions(config=preset, model=config.model)
    decode.run(parse_options(decode.DecodeOptions, argv, "bench decode", default))


def _scaling(argv: list[str]) -> None:
    preset, config = preset_of(argv, "1p5b")

    from train.bench import scaling

    default = scaling.ScalingOptions(config=preset, model=config.model)
    scaling.run(parse_options(scaling.ScalingOptions, argv, "bench scaling", default))
