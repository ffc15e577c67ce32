"""``sparse-lm compare``."""

from train.cli.options import parse_options
from train.cli.presets import preset_of


def run(argv: list[str]) -> None:
    preset, config = preset_of(argv, "small")

    from train.bench import compare

    default = compare.CompareOptions.of_preset(preset, config)
    compare.run(parse_options(compare.CompareOptions, argv, "compare", default))
