"""``sparse-lm generate``."""

import dataclasses
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from train.cli.drawing import DrawingOptions
from train.cli.options import UsageError, parse_options
from train.errors import UserError

if TYPE_CHECKING:
    from train.cli.continuation import Continuation
    from train.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Continues each prompt, as it is made for one prompt, all at the end for several.

    Attributes:
      checkpoint: a run's work directory, one checkpoint in it, or a converted model.
      prompt: text to continue; give the option several times for several texts.
      max_new_tokens: most tokens to add (default: up to 128, as far as the context reaches).
      drawing: how tokens are chosen.
      debug: show the traceback of an error.
    """

    checkpoint: str
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    max_new_tokens: int | None = None
    drawing: Annotated[DrawingOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DrawingOptions
    )
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(GenerateOptions, argv, "generate")
    if not options.prompt:
        raise UsageError("generate needs at least one --prompt TEXT; got none")
    _check_prompts_are_text(options.prompt)
    sampling = options.drawing.sampling(options.max_new_tokens)

    from sparse_lm.generate import stream
    from train.cli.continuation import Continuation
    from train.run.checkpoint_reading import load_for_inference

    model, tokenizer, _, _ = load_for_inference(options.checkpoint)
    prompts = _encoded(tokenizer, options.prompt)
    new_tokens = _new_tokens(prompts, options.max_new_tokens, model.config.context_length)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without UTF-8 shows a question mark for what it cannot, and the program goes on.
        sys.stdout.reconfigure(errors="replace")
    steps = stream(
        model,
        prompts,
        max_new_tokens=new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        seed=options.drawing.seed,
        speculate=options.drawing.speculate,
    )
    rows = [Continuation(tokenizer, prompt, options.drawing.stop) for prompt in prompts]
    speed = _Speed()
    if len(rows) == 1:
        print(options.prompt[0], end="", flush=True)
        try:
            for text in _texts(speed.watch(steps), rows):
                print(text, end="", flush=True)
        finally:
            print()
    else:
        for _ in _texts(speed.watch(steps), rows):
            pass
        for number, (prompt, row) in enumerate(zip(options.prompt, rows, strict=True), start=1):
            print(f"[{number}/{len(rows)}] {prompt}{row.text}")
    speculation = f", {steps.tokens_per_step:.2f} tokens a step" if options.drawing.speculate else ""
    print(f"{speed}{speculation}", file=sys.stderr)


def _texts(steps: Iterable[list[int | None]], rows: Sequence["Continuation"]) -> Iterator[str]:
    """What each token adds to its row; asks for no further step once every row has ended."""
    for step in steps:
        for token, row in zip(step, rows, strict=True):
            if token is not None and not row.ended:
                yield row.feed(token)
        if all(token is None or row.ended for token, row in zip(step, rows, strict=True)):
            break
    for row in rows:
        yield row.finish()


class _Speed:
    """How long the first token took, and how fast the others came."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._first = self._last = self._start
        self._tokens = self._later = 0

    def watch(self, steps: Iterable[list[int | None]]) -> Iterator[list[int | None]]:
        """The steps themselves, counted as they come."""
        for step in steps:
            self._last = time.perf_counter()
            count = sum(token is not None for token in step)
            if not self._tokens:
                self._first = self._last
            else:
                self._later += count
            self._tokens += count
            yield step

    def __str__(self) -> str:
        first = f"{self._tokens} tokens, the first after {self._first - self._start:.2f} s"
        seconds = self._last - self._first
        later = f", then {self._later / seconds:,.1f} tokens/s" if self._later and seconds else ""
        return f"{first}{later} (compilation included)"


def _encoded(tokenizer: "Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt, behind those that the model's publisher puts before every text; EOS alone, which
    ends the document before, for a prompt without any."""
    from train.data.tokenizer import EncodingError

    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            encoded.append([*tokenizer.prefix_ids, *tokenizer.encode(prompt)] or [tokenizer.eos_id])
        except EncodingError as error:
            raise UserError(f"--prompt {number}: {error}") from error
    return encoded


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
