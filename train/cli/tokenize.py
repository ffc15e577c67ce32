"""``sparse-lm tokenize``."""

import dataclasses
import errno
import os
import shlex
from pathlib import Path

from train.cli.options import UsageError, parse_options
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenizeData:
    """The text to tokenize.

    Attributes:
      paths: files or globs of documents (JSONL, plain text or Parquet; the first two plain or .gz/.xz/.zst);
        by default the corpus that ships with the package.
      text_field: field of a JSONL document, or column of Parquet, that holds its text.
      tokenizer: byte, bpe (fitted on the training documents, needs --vocab-size), or the path of a Hugging
        Face tokenizer.json.
      holdout: share of documents to keep out of training for evaluation; each document's own hash decides.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"
    tokenizer: str = "byte"
    holdout: float = 0.05


@dataclasses.dataclass(frozen=True)
class TokenizeOptions:
    """Turns documents into token shards, which train reads with --data.paths DIR. The same command goes on
    where it was stopped.

    Attributes:
      out: the directory of the token shards: a new or empty one, or one that was begun.
      vocab_size: ids of a tokenizer that is fitted.
      processes: that encode (default: one a core).
      debug: show the traceback of an error.
    """

    out: str
    data: TokenizeData = dataclasses.field(default_factory=TokenizeData)
    vocab_size: int | None = None
    processes: int | None = None
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(TokenizeOptions, argv, "tokenize")
    fitted = options.data.tokenizer == "bpe"
    if fitted != (options.vocab_size is not None):
        raise UsageError(
            "--data.tokenizer bpe needs --vocab-size; got none"
            if fitted
            else f"--vocab-size is for --data.tokenizer bpe; got {options.data.tokenizer}: leave it out"
        )
    if options.processes is not None and options.processes < 1:
        raise UsageError(f"--processes must be at least 1; got {options.processes}")
    try:
        _tokenize(options, Path(options.out).expanduser())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {options.out} could not be written to: free some space and run the same "
                "command again; it goes on where it stopped"
            ) from error
        raise UserError(
            f"--out must be a directory that can be made and written to; {options.out} cannot "
            f"({error.strerror or error}): choose another"
        ) from error


def _tokenize(options: TokenizeOptions, out: Path) -> None:
    from rich.console import Console

    from train.config import DataConfig
    from train.data.corpus import choose_split, fit_tokenizer
    from train.data.documents import find_sources
    from train.data.shards import is_shards, read_index
    from train.data.tokenize import tokenize
    from train.data.tokenizer import check_fitted_size, load_tokenizer
    from train.output import tokenize_bar
    from train.run.report import program_as_typed

    try:
        config = DataConfig(**dataclasses.asdict(options.data))
    except ValueError as error:
        raise UsageError(str(error)) from error
    console = Console(highlight=False, soft_wrap=True)
    for path in config.paths:
        if is_shards(path):
            raise UserError(f"data.paths must name documents; {path} holds token shards: leave it out")
    sources = find_sources(config.paths)
    if is_shards(out):
        index = read_index(out)
        given = tuple(source.path for source in sources)
        if (index.sources, index.holdout) != (given, config.holdout):
            raise UserError(
                f"{out} holds token shards of other files or with another holdout: choose another --out"
            )
        console.print(f"{out} was finished before: {index}", markup=False)
        return
    threshold = choose_split(config, sources)
    if options.vocab_size is not None:
        check_fitted_size(options.vocab_size)
        console.print(f"fitting a tokenizer of {options.vocab_size:,} ids to the corpus", markup=False)
        tokenizer = fit_tokenizer(config, options.vocab_size, sources, threshold)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    for note in tokenizer.notes:
        console.print(note, markup=False)
    with tokenize_bar(console) as on_progress:
        index = tokenize(
            sources,
            tokenizer,
            out,
            text_field=config.text_field,
            holdout=config.holdout,
            threshold=threshold,
            processes=options.processes or len(os.sched_getaffinity(0)),
            on_progress=on_progress,
        )
    next_command = f"{program_as_typed()} train --data.paths {shlex.quote(str(out))}"
    console.print(f"{index}: {out}\nnext:\n  {next_command}", markup=False)
