"""``sparse-lm plot``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from train.cli.options import UsageError, parse_options
from train.picture import check_ending


@dataclasses.dataclass(frozen=True)
class PlotOptions:
    """Draws the curves of runs: loss, active and dead neurons and speed, against tokens of training.

    Attributes:
      runs: work directories of runs.
      out: the picture to write: .png, .svg or .pdf.
      json: also write the runs' figures to this file: the curves, means over the last hundred steps, held-out
        figures and the formats of the layers.
      debug: show the traceback of an error.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    out: str
    json: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        check_ending(self.out, option="--out")


def run(argv: list[str]) -> None:
    options = parse_options(PlotOptions, argv, "plot")
    if not options.runs:
        raise UsageError("plot needs at least one work directory of a run; got none")

    from train.output import JsonFile
    from train.run import curves, figures

    file = JsonFile(options.json)
    lines = curves.plot(options.runs, options.out)
    if options.json is not None:
        file.write({"runs": [figures.read(Path(each)) for each in options.runs]})
        lines.append(f"figures: {options.json}")
    for line in lines:
        print(line)
