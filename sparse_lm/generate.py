"""Text generation: prompts of any lengths in one batch, a cache written in place, tokens in blocks.

Prompts are padded behind their end and every row keeps its own position, so that what a row says depends on
its prompt, its place in the batch and the seed, and never on the other rows.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence

from pallas_kernels.errors import RequestError
from sparse_lm.config import ModelConfig
from sparse_lm.decoding import Decoding
from sparse_lm.inference import InferenceModel
from sparse_lm.model import SparseLM
from sparse_lm.sampling import GREEDY, Sampling, sample

__all__ = ["GREEDY", "MOST_GUESSES", "Sampling", "TokenStream", "generate", "sample", "stream"]

MOST_GUESSES = 15
"""Tokens that speculation looks up for a step at most: with the one before them, a run of 16."""


def generate(
    model: SparseLM | InferenceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
    speculate: int = 0,
) -> list[list[int]]:
    """Continues every prompt; arguments and errors as for ``stream``.

    Returns:
      The new tokens of each row, without its prompt and without ``eos_id``.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=eos_id,
        seed=seed,
        speculate=speculate,
    )
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


class TokenStream(Iterator[list[int | None]]):
    """Steps of new tokens, as ``stream`` describes them."""

    def __init__(self, steps: Generator[list[int | None], None, None], decoding: Decoding) -> None:
        self._steps = steps
        self._decoding = decoding

    def __next__(self) -> list[int | None]:
        return next(self._steps)

    def close(self) -> None:
        """Ends the stream and lets its cache go."""
        self._steps.close()

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gained in each step behind its first token so far, on average; 1 without
        speculation."""
        return self._decoding.tokens / self._decoding.steps if self._decoding.steps else 1.0


def stream(
    model: SparseLM | InferenceModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_id: int | None = None,
    seed: int = 0,
    speculate: int = 0,
) -> TokenStream:
    """Continues every prompt, one token a row at a time.

    Args:
      model: the language model. A `SparseLM`'s weights are split and cast at every call, those of an
        `InferenceModel` have been already.
      prompts: token ids, at least one a prompt; lengths may differ.
      max_new_tokens: most tokens that a row gains.
      sampling: how tokens are drawn.
      eos_id: the token that ends a row; ``None`` never ends one early.
      seed: of the draws. A row's draws follow from the seed, its place in the batch and its positions.
      speculate: tokens that are guessed from the row's own text and verified in one step; 0 decodes token by
        token. The text is the same, up to ties: logits of several tokens at once may differ in the last bits
        from those of one.

    Returns:
      An iterator of steps, each the new token of every row, or ``None`` for a row that has ended (the end
      token itself is not given out). It stops when all rows have ended. The first token comes by itself, the
      others leave the device in blocks of up to 16, or of four steps with speculation: the next block runs
      there while the caller handles this one.

    Raises:
      RequestError: at once, not at the first step: no prompt, an empty prompt, a token outside the
        vocabulary, ``max_new_tokens`` under 1, a seed outside 0 to 2^32 - 1, ``speculate`` outside 0 to 15,
        or a prompt that does not fit the context with its new tokens.
    """
    check_request(model.config, prompts, max_new_tokens, seed, speculate)
    if isinstance(model, SparseLM):
        model = InferenceModel.of(model)
    decoding = Decoding(model, sampling, seed, speculate)
    return TokenStream(
        _steps(decoding, [list(prompt) for prompt in prompts], max_new_tokens, eos_id), decoding
    )


def _steps(
    decoding: Decoding, prompts: list[list[int]], max_new_tokens: int, eos_id: int | None
) -> Generator[list[int | None], None, None]:
    waiting: list[deque[int]] = [deque() for _ in prompts]
    ended, given = [False] * len(prompts), 0
    first = decoding.read(prompts, max_new_tokens)
    for block in decoding.rows(first, prompts, max_new_tokens):
        for queue, tokens in zip(waiting, block, strict=True):
            queue.extend(tokens)
        while given < max_new_tokens and all(
            over or queue for over, queue in zip(ended, waiting, strict=True)
        ):
            values = [None if over else queue.popleft() for over, queue in zip(ended, waiting, strict=True)]
            ended = [over or value == eos_id for over, value in zip(ended, values, strict=True)]
            if all(ended):
                return
            yield [None if over else value for over, value in zip(ended, values, strict=True)]
            given += 1


def check_request(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int, speculate: int
) -> None:
    """Raises RequestError for what ``stream`` cannot do."""
    check_amounts(max_new_tokens, seed, speculate)
    if not prompts:
        raise RequestError("generation needs at least one prompt; got none")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise RequestError(
                f"prompt {number} is empty: give it at least one token, such as the end-of-text token"
            )
        strange = next((token for token in prompt if not 0 <= token < config.vocab_size), None)
        if strange is not None:
            raise RequestError(
                f"prompt {number} holds token {strange}, outside the model's vocabulary of "
                f"{config.vocab_size}: encode it with the tokenizer that the model was trained with"
            )
        if len(prompt) + max_new_tokens > config.context_length:
            raise RequestError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for, "
                f"beyond the model's context of {config.context_length}: "
                "shorten the prompt or ask for fewer new tokens"
            )


def check_amounts(max_new_tokens: int, seed: int, speculate: int) -> None:
    """Raises RequestError for a number that ``stream`` takes of no model and no prompt."""
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise RequestError(f"seed must be at least 0 and under 2^32; got {seed}")
    if not 0 <= speculate <= MOST_GUESSES:
        raise RequestError(f"speculate must be from 0 to {MOST_GUESSES} tokens a step; got {speculate}")
