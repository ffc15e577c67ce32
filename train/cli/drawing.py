"""How the tokens of a continuation are chosen and where it ends: the options of every command that makes
text."""

import dataclasses
from typing import TYPE_CHECKING

import tyro

from train.cli.options import UsageError

if TYPE_CHECKING:
    from sparse_lm.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class DrawingOptions:
    """How tokens are chosen, and where a text ends.

    Attributes:
      temperature: 0 takes the most likely token, 1 draws from the model's own distribution.
      top_k: draw from the k most likely tokens only.
      top_p: draw from the fewest most likely tokens that have this probability together.
      seed: of the draws; the same seed and the same words get the same answer.
      speculate: tokens, up to 15, that each step guesses from the text so far and verifies: the same text up
        to ties between logits, sooner where it repeats itself.
      stop: text that ends an answer and is not part of it; give the option several times for several.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    speculate: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()

    def sampling(self, max_new_tokens: int | None) -> "Sampling":
        """Temperature, top k and top p as the library takes them.

        Args:
          max_new_tokens: most tokens of a text, an option of the commands themselves.

        Raises:
          UsageError: a number is out of its range, or ``stop`` is empty.
        """
        from sparse_lm.generate import Sampling, check_amounts

        if not all(self.stop):
            raise UsageError("--stop must have a character; got none")
        try:
            check_amounts(1 if max_new_tokens is None else max_new_tokens, self.seed, self.speculate)
            return Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            argument, _, rest = str(error).partition(" ")
            raise UsageError(f"--{argument.replace('_', '-')} {rest}") from error
