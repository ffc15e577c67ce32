"""Texts that a run continues after each evaluation, for people to read."""

import jax

from sparse_lm import SparseLM
from sparse_lm.generate import Sampling, generate
from train.config import TrainConfig
from train.data.tokenizer import Tokenizer
from train.errors import UserError

_TOKENS = 64
_SAMPLING = Sampling(temperature=0.8, top_p=0.95)


class Samples:
    """The beginnings of texts that ``report.samples`` names.

    Raises:
      UserError: one of them leaves no room in the model's context, or the run has several processes.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = config.report.samples, tokenizer
        self._ids = [tokenizer.encode(text) or [tokenizer.eos_id] for text in self._texts]
        longest, context_length = max(map(len, self._ids), default=0), config.model.context_length
        if longest >= context_length:
            raise UserError(
                f"report.samples must leave room in the model's context of {context_length} tokens; got one "
                f"of {longest}: shorten it"
            )
        if self._texts and jax.process_count() > 1:
            raise UserError(
                f"report.samples needs a run of one process; got {jax.process_count()}: leave the option out"
            )
        self._new_tokens = min(_TOKENS, context_length - longest)

    def continued(self, model: SparseLM, seed: int) -> list[str]:
        """Each text with what ``model`` adds to it."""
        rows = generate(
            model, self._ids, max_new_tokens=self._new_tokens, sampling=_SAMPLING,
            eos_id=self._tokenizer.eos_id, seed=seed,
        )  # fmt: skip
        return [text + self._tokenizer.decode(row) for text, row in zip(self._texts, rows, strict=True)]
