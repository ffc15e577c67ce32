"""``sparse-lm train``."""

import dataclasses
from typing import Annotated

import tyro

from train.cli.options import parse_options
from train.cli.presets import preset_of

DEFAULT_PRESET = "tiny"


def run(argv: list[str]) -> None:
    preset, config = preset_of(argv, DEFAULT_PRESET)

    from train.config import TrainConfig

    @dataclasses.dataclass(frozen=True)
    class TrainOptions:
        """Trains a model, or takes up the run of the same work directory where it stopped.

        Attributes:
          config: the preset that gives every option below its default.
          debug: show the traceback of an error.
        """

        run: Annotated[TrainConfig, tyro.conf.arg(name="")]
        config: str = preset
        debug: bool = False

    options = parse_options(TrainOptions, argv, "train", TrainOptions(run=config))

    from train.run import loop

    loop.run(options.run)
