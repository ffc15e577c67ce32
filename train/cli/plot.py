"""``sparse-lm plot``."""

import dataclasses

import tyro

from train.cli.options import UsageError, parse_options


@dataclasses.dataclass(frozen=True)
class PlotOptions:
    """Draws how long the formats take against nnz and against tokens, and where they break even with dense.

    Attributes:
      results: files that python -m pallas_kernels.bench layers --json has written, of one GPU.
      out: the picture to write: .png, .svg or .pdf.
      debug: show the traceback of an error.
    """

    results: tyro.conf.Positional[tuple[str, ...]]
    out: str
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(PlotOptions, argv, "plot")
    if not options.results:
        raise UsageError("plot needs at least one file of results; got none")

    from train.bench.plot import plot

    for line in plot(options.results, options.out):
        print(line)
