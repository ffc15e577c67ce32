"""``sparse-lm analyze``."""

from train.cli.evaluate import check_text
from train.cli.options import parse_options


def run(argv: list[str]) -> None:
    from train.analyze import command

    options = parse_options(command.AnalyzeOptions, argv, "analyze")
    check_text(options.data)
    command.run(options)
