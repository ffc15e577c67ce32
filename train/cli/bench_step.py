"""``sparse-lm bench-step``."""

from train.cli.options import parse_options
from train.cli.presets import preset_of


def run(argv: list[str]) -> None:
    preset, config = preset_of(argv, "0p5b")

    from train.bench import bench_step

    default = bench_step.BenchStepOptions(config=preset, model=config.model)
    bench_step.run(parse_options(bench_step.BenchStepOptions, argv, "bench-step", default))
