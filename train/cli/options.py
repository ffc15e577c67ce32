"""A dataclass from a command line: tyro parses and writes the help, mistakes become one sentence each.

tyro hands over what it rejects through a hook that is not yet part of its public interface, so pyproject.toml
names its version exactly.
"""

import dataclasses
import difflib
import inspect
import itertools
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import tyro
from tyro import _errors

from train.cli.help_texts import add_help_texts, plain_text
from train.errors import UserError

PROGRAM = "sparse-lm"

Options = TypeVar("Options")


class UsageError(UserError):
    """The command line itself is wrong."""


def parse_options(
    kind: type[Options],
    argv: list[str],
    command: str,
    default: Any = tyro.MISSING_NONPROP,
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
    explained: Mapping[str, str] = MappingProxyType({}),
    description: str | None = None,
) -> Options:
    """The ``kind`` that ``argv`` describes; ``--help`` prints and exits.

    Args:
      kind: a dataclass, whose docstring and attributes are the help.
      argv: what follows the command.
      command: its name.
      default: a ``kind`` for all that ``argv`` does not say; by default the fields' own defaults.
      aliases: short names of options, ``{"--lr": "--optimizer.learning-rate"}``.
      explained: options that people look for and that there are not, each with what there is in its place.
      description: what ``--help`` says first; by default the docstring of ``kind``.

    Raises:
      UsageError: an option that there is not, or a value of a wrong type or out of its range.
    """

    argv = [_full_name(word, aliases) for word in argv]
    for word in argv:
        if word.partition("=")[0] in explained:
            raise UsageError(f"there is no {word.partition('=')[0]}: {explained[word.partition('=')[0]]}")

    def reject(event: _errors.ParseErrorEvent) -> None:
        raise UsageError(_sentence(event, command))

    try:
        with _errors.on_parse_error(reject):
            options, unknown = tyro.cli(
                kind,
                prog=f"{PROGRAM} {command}",
                args=argv,
                default=default,
                return_unknown_args=True,
                registry=_registry(),
                description=_wrapped(description or (kind.__doc__ or "").partition("Attributes:")[0]),
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if unknown:
        raise UsageError(_unknown(unknown[0], argv, dict(_options(options)), command))
    return options


def _wrapped(text: str) -> str:
    """A description in lines that the terminal has room for; those of an indented table stay as they are.

    Each begins with a space, and no empty line is between them: tyro would join them, and double that.
    """
    width = shutil.get_terminal_size().columns
    paragraphs = plain_text(inspect.cleandoc(text)).split("\n\n")
    lines = "\n".join(part if part[:1] == " " else textwrap.fill(part, width - 1) for part in paragraphs)
    return textwrap.indent(lines, " ")


def _full_name(word: str, aliases: Mapping[str, str]) -> str:
    """A word of the command line with an alias in front of it replaced."""
    name, equals, value = word.partition("=")
    return aliases.get(name, name) + equals + value


def _registry() -> tyro.constructors.ConstructorRegistry:
    """What tyro reads in another way than its own: numbers, and values that have a text."""
    registry = tyro.constructors.ConstructorRegistry()
    add_help_texts(registry)
    _add_numbers(registry)
    _add_sequences_of_numbers(registry)
    _add_texts(registry)
    return registry


def _add_numbers(registry: tyro.constructors.ConstructorRegistry) -> None:
    """Says what a number must be, in place of what Python's ``int`` and ``float`` say; and shows a text that
    may be left out as it shows any text."""
    kinds: dict[Any, type] = {
        int: int, float: float, int | None: int, float | None: float, str | None: str
    }  # fmt: skip

    @registry.primitive_rule
    def number(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = kinds.get(info.type)
        if kind is None:
            return None
        optional = kind is not info.type
        wanted = ("a whole number" if kind is int else "a number") + (" or None" if optional else "")

        def convert(values: list[str]) -> Any:
            if optional and values[0] == "None":
                return None
            try:
                return kind(values[0])
            except ValueError:
                raise ValueError(f"must be {wanted}; got {values[0]!r}") from None

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=convert,
            is_instance=lambda value: isinstance(value, kind) or (optional and value is None),
            str_from_instance=lambda value: [str(value)],
        )


def _add_sequences_of_numbers(registry: tyro.constructors.ConstructorRegistry) -> None:
    """Says the same of each number of a tuple; tyro would say that it found no valid parse."""
    kinds: dict[Any, type] = {tuple[int, ...]: int, tuple[float, ...]: float}

    @registry.primitive_rule
    def numbers(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        kind = kinds.get(info.type)
        if kind is None:
            return None

        def convert(values: list[str]) -> Any:
            try:
                return tuple(map(kind, values))
            except ValueError:
                wanted = "whole numbers" if kind is int else "numbers"
                raise ValueError(f"must be {wanted}; got {' '.join(values)}") from None

        name = kind.__name__.upper()
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=f"[{name} [{name} ...]]",
            instance_from_str=convert,
            is_instance=lambda value: isinstance(value, tuple) and all(isinstance(v, kind) for v in value),
            str_from_instance=lambda value: [str(v) for v in value],
        )


def _add_texts(registry: tyro.constructors.ConstructorRegistry) -> None:
    """Takes a format such as ``panel(tokens=64)`` and an activation as one text; tyro would make a subcommand
    of each of their dataclasses."""

    @registry.primitive_rule
    def text(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if not _has_text(info.type):
            return None
        # Who has such a field has imported this; other commands are not made to wait for it.
        from pallas_kernels import activations

        parse = activations.parse if activations.Threshold in typing.get_args(info.type) else str

        def convert(values: list[str]) -> Any:
            try:
                return parse(values[0])
            except ValueError:
                return values[0]  # refused by the dataclass of the field, which names it

        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=convert,
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )


def _has_text(kind: Any) -> bool:
    """Whether ``kind`` is a union with dataclasses, as those of `FFNOptions.format` and ``.activation`` are,
    whose values each have a text that stands for them, their ``str``."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return is_union and any(dataclasses.is_dataclass(member) for member in typing.get_args(kind))


def _sentence(event: _errors.ParseErrorEvent, command: str) -> str:
    """What tyro rejects, in our words."""
    match event:
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{argument.display_name()} must be one of {', '.join(map(repr, choices))}; got {value!r}"
        case _errors.BadValue(argument=argument, offending_value=None):
            return f"{argument.display_name()} needs a value; got none"
        case _errors.MissingArgs(missing_arguments=[first, *_]):
            return f"{command} needs {first.arg.display_name()}; got none"
        case _errors.InstantiationFailure(message=message, argument=argument):
            # What a dataclass says of its own fields names them.
            name = "" if argument is None else argument.display_name()
            return f"{name} {message}" if name.startswith("--") else message
    return f"{command} cannot be run with these options ({type(event).__name__}): see its --help"


def _unknown(token: str, argv: list[str], known: dict[str, Any], command: str) -> str:
    if not token.startswith("-"):
        flag = _flag_before(token, argv, known)
        if flag:
            section, _, leaf = flag.removeprefix("--").rpartition(".")
            negated = f"--{section}.no-{leaf}" if section else f"--no-{leaf}"
            return f"{flag} takes no value; got {token!r}: write {flag} or {negated}"
        return f"unexpected argument {token!r}: {PROGRAM} {command} takes options only, see its --help"
    name = token.partition("=")[0].replace("_", "-")
    leaf = name.lstrip("-").rpartition(".")[2]
    same_leaf = [option for option in known if re.split(r"\.|--", option)[-1] == leaf]
    hint = f"; did you mean {same_leaf[0]}?" if same_leaf else did_you_mean(name, known)
    return f"unknown option {name}{hint or f': see {PROGRAM} {command} --help'}"


def _flag_before(token: str, argv: list[str], known: dict[str, Any]) -> str | None:
    """The yes-or-no option that ``token`` was meant to be the value of, if it was."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    before = [word.replace("_", "-") for word, value in itertools.pairwise(words) if value == token]
    return next((name for name in before if isinstance(known.get(name), bool)), None)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what of ``known`` comes nearest, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _given_name(field: dataclasses.Field) -> str:
    """A field's own name, or the one that ``tyro.conf.arg`` gives its option."""
    given = [getattr(extra, "name", None) for extra in getattr(field.type, "__metadata__", ())]
    return next((name for name in given if name is not None), field.name)


def _options(values: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Each option's name and value."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        name = prefix + _given_name(field).replace("_", "-")
        if dataclasses.is_dataclass(value) and not _has_text(field.type):
            yield from _options(value, f"{name}." if _given_name(field) else prefix)
        else:
            yield name, value
