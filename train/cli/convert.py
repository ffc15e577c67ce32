"""``sparse-lm convert``."""

import dataclasses
import shlex
from typing import Annotated, Literal

import tyro

from train.cli.options import UsageError, parse_options
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Converts a Hugging Face model with silent neurons to one of ours, or one of ours to Hugging Face's.

    Attributes:
      source: a Hugging Face directory, or a model's name on its hub; with --to hf a run's work directory, one
        checkpoint in it, or a converted model.
      out: the directory to make; it must not exist.
      to: sparse-lm for a model that generate and evaluate take, hf for one that transformers takes.
      dtype: compute type of the converted model (default: its publisher's).
      debug: show the traceback of an error.
    """

    source: str
    out: str
    to: Literal["sparse-lm", "hf"] = "sparse-lm"
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, tyro.conf.arg(metavar="{bfloat16,float16,float32}")
    ] = None
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(ConvertOptions, argv, "convert")
    if options.to == "hf" and options.dtype is not None:
        raise UsageError(
            "--dtype is for --to sparse-lm: an exported model keeps the compute type that it has"
        )

    from train.run import convert
    from train.run.checkpoint_files import is_checkpoint
    from train.run.report import program_as_typed

    if options.to == "sparse-lm" and is_checkpoint(options.source):
        raise UserError(
            f"--source must be a Hugging Face model; {options.source} is a checkpoint of ours, which --to hf "
            "converts"
        )
    if options.to == "hf":
        made = convert.to_hf(options.source, options.out)
    else:
        made = convert.from_hf(options.source, options.out, dtype=options.dtype)
    print(made.summary())
    for note in made.notes:
        print(f"note: {note}")
    print(f"{'model' if options.to == 'hf' else 'checkpoint'}: {made.out}")
    if options.to == "sparse-lm":
        place = shlex.quote(str(made.out))
        print(f'next:\n  {program_as_typed()} generate --checkpoint {place} --prompt "Once upon a time"')
