"""The preset or file that a command line names, which gives every option below its default."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import configs
from train.cli.options import UsageError
from train.errors import UserError

if TYPE_CHECKING:
    from train.config import TrainConfig


def preset_of(argv: list[str], default: str) -> tuple[str, "TrainConfig"]:
    """The value of ``--config``, which must be known before the defaults of all other options are,
    and its run."""
    name = value_of(argv, "--config")
    name = default if name is None else name
    is_path = name.endswith(".json") or "/" in name
    try:
        if is_path:
            from train.config_file import read_config

            return name, read_config(name)
        return name, configs.load(name)
    except UserError as error:
        is_file = " (a file's name must end with .json)" if not is_path and Path(name).is_file() else ""
        raise UsageError(f"{error}{is_file}") from error


def value_of(argv: list[str], wanted: str) -> str | None:
    """The last value of an option on a command line that is yet to be parsed, if it is there."""
    found = None
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option == wanted:
            found = value if equals else following
    return found
