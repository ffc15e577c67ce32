"""The ``sparse-lm`` program: its commands, their options, and what it says of mistakes.

Whatever a user can mend is one sentence on stderr and a status of 2 (the command line) or 1 (anything else);
only surprises, and ``--debug``, show a traceback. Nothing heavy is imported before a command needs it.
"""

import dataclasses
import dis
import importlib.metadata
import io
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import configs
from train.errors import UserError
from train.options import PROGRAM, UsageError, did_you_mean, parse_options

if TYPE_CHECKING:
    from sparse_lm import SparseLM
    from sparse_lm.generate import Sampling
    from train.config import TrainConfig
    from train.tokenizer import Tokenizer

DEFAULT_PRESET = "tiny"
_OUR_PACKAGES = ("train", "sparse_lm", "pallas_kernels", "configs")
_HELP = f"""usage: {PROGRAM} COMMAND [OPTIONS]

Language models whose feed-forward layers are sparse.

commands:
  train      train a model, or take up a run where it stopped
  generate   continue prompts with a trained model
  evaluate   measure a trained model on its held-out text
  layer-inputs   save what enters a trained model's feed-forward layers, for the kernels' benchmark
  plot       draw break-even curves from the kernels' benchmark
  compare    train with sparse and with dense feed-forward layers, and compare the loss curves
  bench-step   time training steps with sparse and dense feed-forward layers, and measure their memory

{PROGRAM} COMMAND --help lists a command's options; {PROGRAM} --version says which version this is.
{PROGRAM} train, with no option, trains the preset {DEFAULT_PRESET} on the text that comes with the package.
"""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continues each prompt, as it is made for one prompt, all at the end for several.

    Attributes:
      checkpoint: a run's work directory, or one checkpoint in it.
      prompt: text to continue; give the option several times for several texts.
      max_new_tokens: most tokens to add (default: up to 128, as far as the context reaches).
      temperature: 0 takes the most likely token, 1 draws from the model's own distribution.
      top_k: draw from the k most likely tokens only.
      top_p: draw from the fewest most likely tokens that have this probability together.
      seed: of the draws; the same seed says the same.
      debug: show the traceback of an error.
    """

    checkpoint: str
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    debug: bool = False


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Measures a checkpoint on the documents that its training held out.

    Attributes:
      checkpoint: a run's work directory, or one checkpoint in it.
      batches: most batches to evaluate (default: as in training).
      batch_size: sequences of a batch (default: as in training).
      json: also write the figures as JSON to this file; - writes them to stdout and the table to stderr.
      debug: show the traceback of an error.
    """

    checkpoint: str
    batches: int | None = None
    batch_size: int | None = None
    json: str | None = None
    debug: bool = False


@dataclasses.dataclass(frozen=True)
class LayerInputsOptions:
    """Runs a checkpoint over its held-out text and saves, for each layer, what enters its feed-forward part
    and its weights: a file for python -m pallas_kernels.bench layers --inputs.

    Attributes:
      checkpoint: a run's work directory, or one checkpoint in it.
      out: the file to write, .npz.
      tokens: most tokens, in whole sequences (default: 65536, as far as the text reaches).
      layers: numbers of the layers to save, from 0 (default: all).
      debug: show the traceback of an error.
    """

    checkpoint: str
    out: str
    tokens: int | None = None
    layers: tuple[int, ...] = ()
    debug: bool = False


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
        sentence = _sentence(error)
        if sentence is None or "--debug" in argv:
            raise
        print(f"{PROGRAM}: {sentence}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "generate": _generate,
        "evaluate": _evaluate,
        "layer-inputs": _layer_inputs,
        "plot": _plot,
        "bench-step": _bench_step,
        "compare": _compare,
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


def _train(argv: list[str]) -> None:
    preset, config = _preset(argv, DEFAULT_PRESET)

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

    from train import loop

    loop.run(options.run)


def _preset(argv: list[str], default: str) -> tuple[str, "TrainConfig"]:
    """The value of ``--config``, which must be known before the defaults of all other options are,
    and its run."""
    name = default
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option == "--config":
            name = value if equals else following
    try:
        return name, configs.load(name)
    except UserError as error:
        raise UsageError(str(error)) from error


def _generate(argv: list[str]) -> None:
    options = parse_options(GenerateOptions, argv, "generate")
    if not options.prompt:
        raise UsageError("generate needs at least one --prompt TEXT; got none")
    _check_prompts_are_text(options.prompt)

    from sparse_lm.generate import Sampling, generate
    from train.checkpoint import load_for_inference

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, tokenizer, _, _ = load_for_inference(options.checkpoint)
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in options.prompt]
    new_tokens = _new_tokens(prompts, options.max_new_tokens, model.config.context_length)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 shows a question mark for what it cannot, and the program goes on.
        sys.stdout.reconfigure(errors="replace")
    if len(prompts) == 1:
        _print_stream(model, tokenizer, options, prompts[0], new_tokens, sampling)
        return
    rows = generate(
        model,
        prompts,
        max_new_tokens=new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        seed=options.seed,
    )
    for number, (prompt, row) in enumerate(zip(options.prompt, rows, strict=True), start=1):
        print(f"[{number}/{len(rows)}] {prompt}{tokenizer.decode(row)}")


def _print_stream(
    model: "SparseLM",
    tokenizer: "Tokenizer",
    options: GenerateOptions,
    prompt: list[int],
    new_tokens: int,
    sampling: "Sampling",
) -> None:
    from sparse_lm.generate import stream
    from train.tokenizer import TextStream

    steps = stream(
        model,
        [prompt],
        max_new_tokens=new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        seed=options.seed,
    )
    print(options.prompt[0], end="", flush=True)
    text = TextStream(tokenizer)
    try:
        for (token,) in steps:
            if token is not None:
                print(text.feed(token), end="", flush=True)
    finally:
        print()


def _new_tokens(prompts: list[list[int]], asked: int | None, context_length: int) -> int:
    room = context_length - max(map(len, prompts))
    if room < 1:
        raise UserError(
            f"a prompt must leave room in the model's context of {context_length} tokens; got one of "
            f"{context_length - room}: shorten it"
        )
    return min(128, room) if asked is None else asked


def _check_prompts_are_text(prompts: Sequence[str]) -> None:
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"--prompt must be UTF-8 text; prompt {number} is not") from error


def _evaluate(argv: list[str]) -> None:
    options = parse_options(EvaluateOptions, argv, "evaluate")

    from rich.console import Console

    from train.evaluate import evaluate_checkpoint

    report = evaluate_checkpoint(options.checkpoint, batches=options.batches, batch_size=options.batch_size)
    Console(stderr=options.json == "-", highlight=False, soft_wrap=True).print(report.table())
    if options.json == "-":
        print(report.to_json())
    elif options.json is not None:
        try:
            Path(options.json).write_text(report.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json must name a file that can be written; {options.json}: {error.strerror}"
            ) from error


def _layer_inputs(argv: list[str]) -> None:
    options = parse_options(LayerInputsOptions, argv, "layer-inputs")

    from rich.console import Console

    from train import layer_inputs
    from train.report import print_table

    tokens, found = layer_inputs.save_layer_inputs(
        options.checkpoint, options.out, tokens=options.tokens, layers=options.layers
    )
    console = Console(highlight=False, soft_wrap=True)
    print_table(console, layer_inputs.table(found))
    console.print(
        f"{tokens:,} tokens of each layer: {options.out}\n"
        f"next: python -m pallas_kernels.bench layers forward --inputs {shlex.quote(options.out)}",
        markup=False,
    )


def _plot(argv: list[str]) -> None:
    options = parse_options(PlotOptions, argv, "plot")
    if not options.results:
        raise UsageError("plot needs at least one file of results; got none")

    from train.plot import plot

    for line in plot(options.results, options.out):
        print(line)


def _bench_step(argv: list[str]) -> None:
    preset, config = _preset(argv, "0p5b")

    from train import bench_step

    default = bench_step.BenchStepOptions(config=preset, model=config.model)
    bench_step.run(parse_options(bench_step.BenchStepOptions, argv, "bench-step", default))


def _compare(argv: list[str]) -> None:
    preset, config = _preset(argv, "small")

    from train import compare

    default = compare.CompareOptions.of_preset(preset, config)
    compare.run(parse_options(compare.CompareOptions, argv, "compare", default))


def _sentence(error: Exception) -> str | None:
    """What to tell the user, or None if this is no mistake of theirs."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device must have room for model and batch; it ran out of memory: lower the batch size or "
            "the context length, or in training raise --optimizer.accumulation or set --model.remat full"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the operating system'}: {error.strerror}"
    return str(error) if isinstance(error, ValueError) and _is_raised_by_us(error) else None


def _is_raised_by_us(error: Exception) -> bool:
    """Whether a ``raise`` of our packages made the error, so that its text is a sentence for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return package in _OUR_PACKAGES and instruction == "RAISE_VARARGS"


def _version() -> str:
    try:
        return importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
