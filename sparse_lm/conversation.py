"""A text that grows by turns: what the model has read of it stays in a cache from one turn to the next."""

import dataclasses
from collections.abc import Collection, Generator, Sequence

from sparse_lm.decoding import Decoding
from sparse_lm.generate import check_request
from sparse_lm.inference import InferenceModel, LayerCaches
from sparse_lm.model import SparseLM
from sparse_lm.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True)
class _Held:
    """A cache, and the tokens of which it holds keys and values."""

    tokens: list[int]
    cache: LayerCaches


class Conversation:
    """Continues one text again and again, reading only what is new in it.

    Args:
      model: the language model.

    Attributes:
      read: tokens that the last reply had to read before its first one: those behind the longest beginning
        that the text had in common with the one before.
    """

    def __init__(self, model: SparseLM | InferenceModel) -> None:
        self._model = InferenceModel.of(model) if isinstance(model, SparseLM) else model
        self._held: _Held | None = None
        self.read = 0

    def reply(
        self,
        text: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        seed: int = 0,
        speculate: int = 0,
    ) -> Generator[int, None, None]:
        """What follows a text, token by token, up to the first of ``stop_ids``, which is not given out.

        The iterator may be left at any place, by an exception too: the next reply begins from what has been
        read by then, or from nothing.

        Args:
          text: all of it, token ids.
          max_new_tokens: most tokens of the reply.
          stop_ids: tokens that end it.
          sampling, seed, speculate: as in ``generate.stream``, of a batch of one row.

        Raises:
          RequestError: as ``generate.stream`` does, at once.
        """
        check_request(self._model.config, [text], max_new_tokens, seed, speculate)
        return self._reply(
            list(text), max_new_tokens, frozenset(stop_ids), Decoding(self._model, sampling, seed, speculate)
        )

    def _reply(
        self, text: list[int], max_new_tokens: int, stop_ids: frozenset[int], decoding: Decoding
    ) -> Generator[int, None, None]:
        held, self._held = self._held, None
        kept = 0 if held is None else min(_alike(held.tokens, text), len(text) - 1)
        self.read = len(text) - kept
        said: list[int] = []
        try:
            if held is None or not kept:
                first = decoding.read([text], max_new_tokens)
            else:
                first = decoding.read_on(held.cache, kept, text[kept:], max_new_tokens)
            for (block,) in decoding.rows(first, [text], max_new_tokens):
                for token in block[: max_new_tokens - len(said)]:
                    said.append(token)
                    if token in stop_ids:
                        return
                    yield token
        finally:
            if decoding.cache is not None:
                # The newest token may not have been read yet.
                self._held = _Held((text + said)[:-1], decoding.cache)


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
