"""A published model's chat template: how it writes a conversation as the one text that it was trained on.

Templates are Jinja, and foreign code: they run in Jinja's sandbox, with what transformers gives them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from train.data.tokenizer import Tokenizer
from train.errors import UserError

Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""
_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """Writes conversations; made by `load_chat_template`.

    Args:
      source: the template.
      where: what messages call it.
      tokens: names and texts of special tokens, such as ``bos_token``, that templates may ask for.

    Raises:
      UserError: it is no Jinja template.
    """

    def __init__(self, source: str, *, where: str, tokens: Mapping[str, str] | None = None) -> None:
        self._where = where
        self._tokens = dict(tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template {where} must be a Jinja template; Jinja says: {error}"
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation, up to where the model's reply begins.

        Raises:
          UserError: the template does not take these messages.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise UserError(
                f"the chat template {self._where} does not take this conversation; it says: {error}"
            ) from error


def load_chat_template(directory: Path) -> ChatTemplate:
    """The template among a checkpoint's tokenizer files.

    Raises:
      UserError: there is none, or it is no template.
    """
    config = _read(directory / _CONFIG)
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {one.get("name"): one.get("template") for one in named if isinstance(one, dict)}.get(
            "default"
        )
    path = directory / _FILE
    where = path if path.is_file() else directory / _CONFIG
    source = path.read_text(encoding="utf-8") if path.is_file() else named
    if not isinstance(source, str):
        raise UserError(
            f"chat needs a model with a chat template; found none in {directory}: convert a model that was "
            f"published with one, or put its {_FILE} there"
        )
    tokens = {
        name: text
        for name, value in (_read(directory / "special_tokens_map.json") | config).items()
        if name.endswith("_token") and isinstance(text := _content(value), str)
    }
    return ChatTemplate(source, where=str(where), tokens=tokens)


def stop_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a reply: the tokenizer's end of text, and what the publisher names in
    ``generation_config.json``."""
    named = _read(directory / "generation_config.json").get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return frozenset({tokenizer.eos_id, *(one for one in ids if isinstance(one, int))})


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a JSON object; found a {type(content).__name__}")
    return content
