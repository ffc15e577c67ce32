"""The ``sparse-lm`` program: finds the command, and says of mistakes what there is to say.

Whatever a user can mend is one sentence on stderr and a status of 2 (the command line) or 1 (anything else);
only surprises, and ``--debug``, show a traceback. Nothing heavy is imported before a command needs it.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from train.cli import (
    analyze,
    bench,
    chat,
    compare,
    convert,
    evaluate,
    generate,
    layer_inputs,
    plot,
    sweep,
    tokenize,
    train,
)
from train.cli.mistakes import sentence_of
from train.cli.options import PROGRAM, UsageError, did_you_mean
from train.cli.train import DEFAULT_PRESET
from train.errors import LostProcessError
from train.run import background_errors
from train.run.program_exit import exit_with

_HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

Language models whose feed-forward layers are sparse.

commands:
  train         train a model, or take up a run where it stopped
  tokenize      turn documents into token shards, which train reads in place
  generate      continue prompts with a trained model
  chat          talk with a converted model that has a chat template
  evaluate      measure a trained model on its held-out text
  analyze       report which neurons a trained model's tokens activate: tables and figures
  convert       take a Hugging Face model with silent neurons, or give one back
  layer-inputs  save what enters a trained model's feed-forward layers, for the kernels' benchmark
  plot          draw the curves of runs
  sweep         train a preset for several λ and variants, and set quality beside sparsity and speed
  compare       train with sparse and with dense feed-forward layers, and compare the loss curves
  bench         time layers, models, training steps or generation: bench --help lists the benchmarks

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version says which version this is.
{PROGRAM} train, with no option, trains the preset {DEFAULT_PRESET} on the text that comes with the package.
"""


def run() -> None:
    """The program as a process: ends it with the status of ``main``."""
    background_errors.keep_quiet()
    try:
        status = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    exit_with(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as exit:  # how tyro ends after --help
        return exit.code if isinstance(exit.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None or "--debug" in argv:
            raise
        print(f"{PROGRAM}: {sentence}", file=sys.stderr, flush=True)
        if isinstance(error, LostProcessError):
            # At an orderly exit JAX would wait for the lost process, and then abort with a stack dump.
            sys.stdout.flush()
            os._exit(1)
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": train.run,
        "tokenize": tokenize.run,
        "generate": generate.run,
        "chat": chat.run,
        "evaluate": evaluate.run,
        "analyze": analyze.run,
        "convert": convert.run,
        "layer-inputs": layer_inputs.run,
        "plot": plot.run,
        "bench": bench.run,
        "compare": compare.run,
        "sweep": sweep.run,
    }
    first = argv[0] if argv else None
    if first in ("-h", "--help"):
        print(_HELP, end="")
    elif first == "--version":
        print(PROGRAM, _version())
    elif first in commands:
        return commands[first](argv[1:]) or 0
    elif first is None:
        raise UsageError(f"expected a command, one of {', '.join(commands)}; got none: see {PROGRAM} --help")
    else:
        raise UsageError(
            f"expected a command, one of {', '.join(commands)}; got {first!r}{did_you_mean(first, commands)}"
        )
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
