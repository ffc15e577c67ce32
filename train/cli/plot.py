"""``sparse-lm plot``."""

import dataclasses
from pathlib import Path

import tyro

from train.cli.options import UsageError, parse_options


@dataclasses.dataclass(frozen=True)
class PlotOptions:
    """Draws the curves of runs; or, of a benchmark, how long the formats take against nnz and against tokens,
    and where they break even with dense.

    Attributes:
      results: work directories of runs, or files that python -m pallas_kernels.bench layers --json has
      written,
        of one GPU.
      out: the picture to write: .png, .svg or .pdf.
      debug: show the traceback of an error.
    """

    results: tyro.conf.Positional[tuple[str, ...]]
    out: str
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(PlotOptions, argv, "plot")
    if not options.results:
        raise UsageError("plot needs at least one work directory or file of results; got none")
    runs = [result for result in options.results if Path(result).is_dir()]
    if runs and len(runs) < len(options.results):
        raise UsageError("plot draws either runs or a benchmark's files; got both")
    if runs:
        from train.run import curves

        lines = curves.plot(runs, options.out)
    else:
        from train.bench.plot import plot

        lines = plot(options.results, options.out)
    for line in lines:
        print(line)
