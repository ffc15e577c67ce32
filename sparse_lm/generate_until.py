"""Texts continued until one of several strings appears, as benchmarks ask for it."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from pallas_kernels.errors import RequestError
from sparse_lm.generate import GREEDY, Sampling, stream
from sparse_lm.inference import InferenceModel
from sparse_lm.model import SparseLM

_DECODED_BEFORE = 16  # of a prompt's last tokens: more than any character or word mark reaches over


class TextTokenizer(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that stand before every text, such as that of its beginning; often none."""

    @property
    def fingerprint(self) -> str:
        """A name of its content."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without any control token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``."""


def generate_until(
    model: SparseLM | InferenceModel,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    *,
    until: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 32,
) -> list[str]:
    """What follows each text, up to the first of ``until``, the end of the text or ``max_new_tokens``.

    A text that leaves no room for the new tokens loses its beginning.

    Args:
      model: the language model.
      tokenizer: that it was trained with.
      texts: to continue; an empty one is continued from the end-of-text token.
      until: strings, none of them empty, that end a continuation and are not part of it.
      max_new_tokens: most tokens of a continuation.
      sampling: how they are drawn.
      seed: of the draws.
      batch_size: most texts of a batch.

    Returns:
      One continuation a text, in their order.

    Raises:
      RequestError: ``batch_size`` or ``max_new_tokens`` under 1, as many new tokens as the context has
        positions, or an empty string to stop at.
    """
    limit = model.config.context_length
    if batch_size < 1:
        raise RequestError(f"batch_size must be at least 1; got {batch_size}")
    if not 1 <= max_new_tokens < limit:
        raise RequestError(
            f"the new tokens must be at least 1 and leave room in the model's context of {limit}; got "
            f"{max_new_tokens}: ask for fewer"
        )
    if not all(until):
        raise RequestError("a string to stop at must have a character; got ''")
    if isinstance(model, SparseLM):
        model = InferenceModel.of(model)
    encoded = [[*tokenizer.prefix_ids, *tokenizer.encode(text)] or [tokenizer.eos_id] for text in texts]
    prompts = [ids[-(limit - max_new_tokens) :] for ids in encoded]
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    found = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        steps = stream(
            model,
            [prompts[at] for at in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
            seed=seed,
        )
        befores = [prompts[at][-_DECODED_BEFORE:] for at in batch]
        for at, text in zip(batch, _read(steps, tokenizer, befores, until), strict=True):
            found[at] = text
    return found


def _read(
    steps: Iterable[list[int | None]],
    tokenizer: TextTokenizer,
    befores: Sequence[list[int]],
    until: Sequence[str],
) -> list[str]:
    """The rows' texts; asks for no further step once every row has ended.

    Args:
      steps: the new tokens of each row.
      tokenizer: of them.
      befores: the last tokens of each row's prompt: what a token says can depend on those before it.
      until: as in `generate_until`.
    """
    lengths = [len(tokenizer.decode(before).rstrip("\ufffd")) for before in befores]
    ids = [list(before) for before in befores]
    texts: list[str | None] = [None] * len(befores)  # of the rows that have met a string to stop at

    def decoded(row: int) -> str:
        return tokenizer.decode(ids[row])[lengths[row] :]

    for step in steps:
        for row, token in enumerate(step):
            if token is not None and texts[row] is None:
                ids[row].append(token)
                texts[row] = _cut(decoded(row), until)
        if all(token is None or text is not None for token, text in zip(step, texts, strict=True)):
            break
    return [decoded(row) if text is None else text for row, text in enumerate(texts)]


def _cut(text: str, until: Sequence[str]) -> str | None:
    """What stands before the first of ``until``, or None where none of them is in the text."""
    places = [text.find(stop) for stop in until]
    first = min((place for place in places if place >= 0), default=None)
    return None if first is None else text[:first]
