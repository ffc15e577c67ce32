"""``sparse-lm generate``."""

import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from train.cli.options import UsageError, parse_options
from train.errors import UserError

if TYPE_CHECKING:
    from sparse_lm import SparseLM
    from sparse_lm.generate import Sampling
    from train.data.tokenizer import Tokenizer


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


def run(argv: list[str]) -> None:
    options = parse_options(GenerateOptions, argv, "generate")
    if not options.prompt:
        raise UsageError("generate needs at least one --prompt TEXT; got none")
    _check_prompts_are_text(options.prompt)

    from sparse_lm.generate import Sampling, generate
    from train.data.tokenizer import decode_continuation
    from train.run.checkpoint import load_for_inference

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, tokenizer, _, _ = load_for_inference(options.checkpoint)
    prompts = _encoded(tokenizer, options.prompt)
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
    for number, (prompt, ids, row) in enumerate(zip(options.prompt, prompts, rows, strict=True), start=1):
        print(f"[{number}/{len(rows)}] {prompt}{decode_continuation(tokenizer, ids, row)}")


def _print_stream(
    model: "SparseLM",
    tokenizer: "Tokenizer",
    options: GenerateOptions,
    prompt: list[int],
    new_tokens: int,
    sampling: "Sampling",
) -> None:
    from sparse_lm.generate import stream
    from train.data.tokenizer import TextStream

    steps = stream(
        model,
        [prompt],
        max_new_tokens=new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
        seed=options.seed,
    )
    print(options.prompt[0], end="", flush=True)
    text = TextStream(tokenizer, prompt)
    try:
        for (token,) in steps:
            if token is not None:
                print(text.feed(token), end="", flush=True)
    finally:
        print()


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
