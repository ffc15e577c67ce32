"""``sparse-lm sweep``."""

import dataclasses
from typing import Annotated

import tyro

from train.cli.options import UsageError, parse_options
from train.cli.presets import preset_of

DEFAULT_PRESET = "study"


def run(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        if any(word.partition("=")[0] == "--config" for word in argv):
            raise UsageError(f"sweep takes one preset; got {argv[0]} and --config: leave one out")
        argv = ["--config", *argv]
    preset, config = preset_of(argv, DEFAULT_PRESET)

    from pallas_kernels.errors import RequestError
    from train.config import TrainConfig
    from train.sweep import rows
    from train.sweep.sweep import FormatName
    from train.sweep.sweep import run as run_sweep

    @dataclasses.dataclass(frozen=True)
    class SweepOptions:
        """Trains a preset, or the run of a JSON file, once for each λ and for each variant.

        Makes one table, one figure and one JSON file of how good, how sparse and how fast the rows are. The
        same command goes on where it was stopped: sparse-lm sweep study --l1 0 1e-5 1e-4 --data.paths FILES.

        Attributes:
          config: the preset, or the JSON file such as a run's own config.json, that gives every option below
            its default; also as the first word, without --config.
          l1: values of λ, a row each.
          variants: further rows, with the λ of --at: silu (dense, λ 0), reset and keep (dead neurons
            re-initialised, with their moments reset or kept), non-gated, relu2.
          at: λ of the variants, one of --l1; by default the middle one of those above 0.
          formats: sparse formats to time beside the dense one, on a GPU.
          times: measure speed, memory and energy when all rows are trained, on a GPU.
          figure: draw the figure, which needs matplotlib.
          debug: show the traceback of an error.
        """

        run: Annotated[TrainConfig, tyro.conf.arg(name="")]
        config: str = preset
        l1: tuple[float, ...] = rows.DEFAULT_L1
        variants: tuple[rows.VariantName, ...] = rows.VARIANTS
        at: float | None = None
        formats: tuple[FormatName, ...] = ("auto",)
        times: bool = True
        figure: bool = True
        debug: bool = False

    base = dataclasses.replace(config, workdir=f"{config.workdir}-sweep")
    options = parse_options(SweepOptions, argv, "sweep", SweepOptions(run=base))
    try:
        sweep = rows.Sweep(options.run, options.l1, options.variants, options.at)
    except RequestError as error:
        raise UsageError(str(error)) from error
    run_sweep(sweep, preset=preset, formats=options.formats, times=options.times, figure=options.figure)
