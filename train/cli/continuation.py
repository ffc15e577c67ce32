"""What a model adds to a text, as it is shown while it comes."""

from collections.abc import Sequence

from train.data.tokenizer import TextStream, Tokenizer


class Continuation:
    """One continuation as text, up to the first of the strings that end it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, prompt)
        self._stops = stops
        self._held = ""
        self.text = ""
        self.ended = False

    def feed(self, token: int) -> str:
        """What there is to show once a token has come: no part of a string that may yet end the text."""
        pending = self._held + self._stream.feed(token)
        places = [place for stop in self._stops if (place := pending.find(stop)) >= 0]
        if places:
            self.ended, self._held = True, ""
            return self._show(pending[: min(places)])
        held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if pending.endswith(stop[:n])), default=0
        )
        self._held = pending[len(pending) - held :]
        return self._show(pending[: len(pending) - held])

    def finish(self) -> str:
        """What was held back when no further token comes."""
        held, self._held = self._held, ""
        return self._show(held)

    def _show(self, text: str) -> str:
        self.text += text
        return text
