"""The ``sparse-lm`` program: finds the command, and says of mistakes what there is to say.

Whatever a user can mend is one sentence on stderr and a status of 2 (the command line) or 1 (anything else);
only surprises, and ``--debug``, show a traceback. Nothing heavy is imported before a command needs it.
"""

import gc
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from train.cli import (
    bench,
    bench_step,
    compare,
    convert,
    evaluate,
    generate,
    layer_inputs,
    plot,
    tokenize,
    train,
)
from train.cli.mistakes import sentence_of
from train.cli.options import PROGRAM, UsageError, did_you_mean
from train.cli.train import DEFAULT_PRESET
from train.errors import LostProcessError
from train.run import background_errors

_HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

Language models whose feed-forward layers are sparse.

commands:
  train      train a model, or take up a run where it stopped
  tokenize   turn documents into token shards, which train reads in place
  generate   continue prompts with a trained model
  evaluate   measure a trained model on its held-out text
  convert    take a Hugging Face model with silent neurons, or give one back
  layer-inputs   save what enters a trained model's feed-forward layers, for the kernels' benchmark
  plot       draw break-even curves from the kernels' benchmark
  compare    train with sparse and with dense feed-forward layers, and compare the loss curves
  bench      count or time what the name says: bench order, bench decode, bench scaling
  bench-step   time training steps with sparse and dense feed-forward layers, and measure their memory

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version says which version this is.
{PROGRAM} train, with no option, trains the preset {DEFAULT_PRESET} on the text that comes with the package.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    with background_errors.kept_quiet():
        status = _main(list(sys.argv[1:] if argv is None else argv))
        if status:
            gc.collect()  # Python complains of tasks that an error cut off once it collects them
        return status


def _main(argv: list[str]) -> int:
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
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train.run,
        "tokenize": tokenize.run,
        "generate": generate.run,
        "evaluate": evaluate.run,
        "convert": convert.run,
        "layer-inputs": layer_inputs.run,
        "plot": plot.run,
        "bench": bench.run,
        "bench-step": bench_step.run,
        "compare": compare.run,
    }
    first = argv[0] if argv else None
    if first in ("-h", "--help"):
        print(_HELP, end="")
    elif first == "--version":
        print(PROGRAM, _version())
    elif first in commands:
        commands[first](argv[1:])
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
