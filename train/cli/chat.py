"""``sparse-lm chat``."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro

from train.cli.drawing import DrawingOptions
from train.cli.options import PROGRAM, parse_options
from train.errors import UserError

if TYPE_CHECKING:
    from sparse_lm.conversation import Conversation
    from sparse_lm.sampling import Sampling
    from train.data.tokenizer import Tokenizer
    from train.run.chat_template import ChatTemplate, Message

_DECODED_BEFORE = 16  # tokens before a reply that it is decoded with: a word mark reaches over no more


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """Talks with a model that has a chat template, one message a line. Ctrl-C ends a reply, the end of the
    input (Ctrl-D) the chat.

    Attributes:
      checkpoint: a converted model, or a run's work directory with the template among its tokenizer's files.
      system: what the model is told before the first message.
      max_new_tokens: most tokens of a reply (default: as far as the context reaches).
      drawing: how tokens are chosen.
      debug: show the traceback of an error.
    """

    checkpoint: str
    system: str | None = None
    max_new_tokens: int | None = None
    drawing: Annotated[DrawingOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=DrawingOptions
    )
    debug: bool = False


def run(argv: list[str]) -> None:
    options = parse_options(ChatOptions, argv, "chat")
    sampling = options.drawing.sampling(options.max_new_tokens)

    from sparse_lm.conversation import Conversation
    from train.run.chat_template import load_chat_template, stop_ids
    from train.run.checkpoint_files import find_checkpoint
    from train.run.checkpoint_reading import load_for_inference

    files = find_checkpoint(options.checkpoint) / "tokenizer"
    template = load_chat_template(files)
    model, tokenizer, config, _ = load_for_inference(options.checkpoint)
    _check_reply(options.max_new_tokens, config.model.context_length)
    conversation = Conversation(model)
    limit = model.config.context_length
    del model  # its f32 weights, of which the conversation has a copy in the compute type
    chat = _Chat(conversation, template, tokenizer, stop_ids(files, tokenizer), sampling, options, limit)
    for file in (sys.stdin, sys.stdout):
        if isinstance(file, io.TextIOWrapper):
            # What is no text in the terminal's encoding becomes a question mark, and the program goes on.
            file.reconfigure(errors="replace")
    for message in _typed():
        try:
            chat.say(message)
        except UserError as error:
            _note(str(error))
        except KeyboardInterrupt:
            print()  # before the reply began


class _Chat:
    """What has been said, and the model that goes on with it."""

    def __init__(
        self,
        conversation: "Conversation",
        template: "ChatTemplate",
        tokenizer: "Tokenizer",
        stop_ids: frozenset[int],
        sampling: "Sampling",
        options: ChatOptions,
        limit: int,
    ) -> None:
        self._conversation = conversation
        self._template = template
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._sampling = sampling
        self._options = options
        self._limit = limit
        self._system: list[Message] = []
        if options.system is not None:
            self._system.append({"role": "system", "content": options.system})
        self._turns: list[Message] = []  # a user's and an assistant's, one after the other

    def say(self, message: str) -> None:
        """Prints the reply as it comes; Ctrl-C ends it, and what has been said stands.

        Raises:
          UserError: the message does not fit the context, or the template does not take it. It is forgotten.
        """
        from train.cli.continuation import Continuation

        ids, turns = self._text([*self._turns, {"role": "user", "content": message}])
        room, asked = self._limit - len(ids), self._options.max_new_tokens
        tokens = self._conversation.reply(
            ids,
            max_new_tokens=room if asked is None else asked,
            stop_ids=self._stop_ids,
            sampling=self._sampling,
            seed=self._options.drawing.seed,
            speculate=self._options.drawing.speculate,
        )
        reply = Continuation(self._tokenizer, ids[-_DECODED_BEFORE:], self._options.drawing.stop)
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(tokens):
            for token in tokens:
                print(reply.feed(token), end="", flush=True)
                if reply.ended:
                    break
        print(reply.finish(), flush=True)
        self._turns = [*turns, {"role": "assistant", "content": reply.text}]

    def _text(self, turns: "list[Message]") -> "tuple[list[int], list[Message]]":
        """The conversation's ids, and its turns without the oldest, where a reply would have no room."""
        asked = self._options.max_new_tokens
        least = max(1, self._limit // 4) if asked is None else asked
        for start in range(0, len(turns), 2):
            text = self._template.render([*self._system, *turns[start:]])
            ids = self._tokenizer.encode_with_control_tokens(text) or [self._tokenizer.eos_id]
            if len(ids) + least <= self._limit:
                if start:
                    _note(
                        f"the model's context has {self._limit} tokens: the oldest {start // 2} of "
                        f"{1 + len(turns) // 2} turns are left out from here on"
                    )
                return ids, turns[start:]
        raise UserError(
            f"a message must leave room for a reply of {least} tokens in the model's context of "
            f"{self._limit}; got one of {len(ids)} with the template: shorten it"
        )


def _check_reply(most: int | None, context_length: int) -> None:
    """Raises UserError for a reply beside which no message has room."""
    if most is not None and most >= context_length:
        raise UserError(
            "--max-new-tokens must leave room for messages in the model's context of "
            f"{context_length} tokens; got {most}: ask for fewer"
        )


def _note(sentence: str) -> None:
    print(f"{PROGRAM}: {sentence}", file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    """The lines that the user types and that hold anything, until the input ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # `input` edits lines with it
        print("Ctrl-C ends a reply, Ctrl-D the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()  # the line is dropped, as a shell does
            continue
        if line.strip():
            yield line
